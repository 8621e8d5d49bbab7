"""Run the study: `python experiments/study DATA SEED`, such as `python experiments/study fashion 0`.

study.yaml lists what is trained and measured for one data set and one training seed; --plan names another such list,
such as wide/study.yaml, which is for a GPU. Every task is a few commands, printed as they start; their output is in
runs/study/DATA/SEED/logs. A task takes one core, --jobs sets how many run at a time, and other seeds may run beside.
A measurement leaves its figures in experiments/study/results/DATA-SEED.json. It is not repeated, nor is a training that
no missing measurement needs. Other finished tasks are kept in runs/study, and a stopped command resumes: the same call
continues a stopped study.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cdm_lightning.foundation.files import write_atomically

HERE = Path("experiments/study")  # the commands are for the project's root
CDM = "cdm"  # run as a module, so that the checkout need not be installed
SAMPLED = {"n": 2000, "repeats": 3, "truncated": False, "precision": "bf16-mixed", "block_size": 200}


@dataclass(frozen=True)
class Task:
    """Commands to run in order, once the tasks in `needs` are finished. found: folders of results."""

    commands: list[list[str]]
    needs: list[str]
    found: dict[str, Path] = field(default_factory=dict)


def tasks_of(plan: dict[str, Any], data: str, seed: int) -> dict[str, Task]:
    """All tasks of one data set and one training seed, by name."""
    about, run = plan["data"][data], Path("runs/study") / data / str(seed)
    sampled = {**SAMPLED, **plan.get("sampled", {})}
    detector, shared = about["detector"], {"shards": about["root"], "detector": about["detector"]}
    train = f".venv/bin/python data/detector.py {about['root']} {detector} --width 32 --epochs 8"
    tasks = {"detector": Task([["sh", "-c", f"test -e {detector} || {train}"]] if "/" in detector else [], [])}
    cards = {"reference": (detector, 32), "reference16": (detector, 16)}
    cards |= {"inception": ("inception", 32)} if about.get("inception") else {}
    for name, (judge, size) in cards.items():
        made = {**shared, "detector": judge, "split": "val", "resolution": size}
        command = [CDM, "reference", *flags({**made, "out": run / f"{name}.safetensors"})]
        tasks[name] = Task([command], ["detector"])

    def evaluated(folders: list[Path], card: str, out: Path) -> list[str]:
        given = {
            "samples": list(map(str, folders)),
            "references": [str(run / f"{card}.safetensors")],
            "out": out,
        }
        return [CDM, "evaluate", *flags({**given, "detector": cards[card][0]})]

    for name, options in plan["trainings"].items():
        recipes = [Path("experiments/defaults.yaml"), *(HERE / f"{r}.yaml" for r in ("defaults", options["recipe"]))]
        recipes += [plan["recipe"]] if "recipe" in plan else []
        given = {
            "data.root": about["root"], "model.image_channels": about["channels"], "seed_everything": seed,
            "trainer.default_root_dir": run / name, **without(options, "recipe", "after"),
        }  # fmt: skip
        before = [options["after"]] if "after" in options else []  # the training whose weights it begins with
        given |= {"model.init_from": run / before[0]} if before else {}
        tasks[name] = Task([[CDM, "fit", *(f"--config={path}" for path in recipes), *flags(given)]], before)
    for name, options in plan["searches"].items():
        bundle, out = run / "bundles" / name, run / "searches" / name
        make, needs = bundled(run, options["stages"], bundle)
        given = {"bundle": bundle, "out": out, **shared, **sampled, **without(options, "stages", "base")}
        commands, found = [make, [CDM, "search", *flags(given)]], {"search": out}
        if options.get("base"):  # the low-resolution samples by themselves
            folders = [out / "low_res" / f"{needs[0]}-seed{number}" for number in range(sampled["repeats"])]
            found["base"] = run / "evaluations" / f"low_res-{name}"
            commands.append(evaluated(folders, "reference16", found["base"]))
            needs = [*needs, "reference16"]
        tasks[f"search {name}"] = Task(commands, [*needs, "detector"], found)
    for name, options in plan["samples"].items():
        bundle = run / "bundles" / name
        make, needs = bundled(run, options["stages"], bundle)
        needs += [f"search {found}" for found in re.findall(r"{best of (\S+)}", options.get("levels", ""))]
        folders = {number: run / "samples" / f"{name}-{number}" for number in options["seeds"]}
        shown = {name: sampled[name] for name in ("precision", "block_size") if name in plan.get("sampled", {})}
        given = {"bundle": bundle, "precision": "bf16-mixed", **shown, **without(options, "stages", "seeds", "score")}
        draw = [[CDM, "sample", *flags({**given, "seed": s, "out": folder})] for s, folder in folders.items()]
        tasks[f"samples {name}"] = Task([make, *draw], needs)
        for card in ["reference", *(["inception"] if "inception" in cards and options.get("score") else [])]:
            out = run / "evaluations" / f"{name}-{card}"
            command = evaluated(list(folders.values()), card, out)
            tasks[f"{card} {name}"] = Task([command], [f"samples {name}", card], {"evaluate": out})
        if options.get("score"):
            out = run / "cas" / name
            command = [CDM, "cas", f"--config={HERE / 'cas.yaml'}"]
            command += flags({"samples": folders[0], "shards": about["root"], "out": out})
            tasks[f"cas {name}"] = Task([command], [f"samples {name}"], {"cas": out})
    return tasks


def bundled(run: Path, stages: list[str], out: Path) -> tuple[list[str], list[str]]:
    """The command that bundles stages, and the trainings that it needs. base16@160 is base16 after 160 steps."""
    parts = [stage.partition("@") for stage in stages]
    files = [run / name / (f"checkpoints/step={step}.ckpt" if step else "") for name, _, step in parts]
    return [CDM, "bundle", *flags({"checkpoints": list(map(str, files)), "out": out})], [name for name, _, _ in parts]


def without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """The options but for some."""
    return {name: value for name, value in options.items() if name not in names}


def flags(options: dict[str, Any]) -> list[str]:
    """Options of a command: text and paths as they are, and all else as JSON."""
    return [f"--{name}={v if isinstance(v, (str, Path)) else json.dumps(v)}" for name, v in options.items()]


class Study:
    """The state of a study: which tasks are finished, and what they found. results: the file of figures."""

    def __init__(self, tasks: dict[str, Task], run: Path, results: Path) -> None:
        self.tasks, self.run, self.results = tasks, run, results
        self.found: dict[str, Any] = json.loads(results.read_text()) if results.is_file() else {}
        self.processes: list[subprocess.Popen[bytes]] = []

    def stop(self) -> None:
        """End the commands that run; a training saves itself first."""
        for process in self.processes:
            process.terminate()

    def finished(self, name: str) -> bool:
        """Whether a task needs no run: its figures, or its mark, have its signature."""
        if self.tasks[name].found:
            return self.found.get(name, {}).get("signature") == self.signature(name)
        mark = self.run / "done" / name
        return mark.is_file() and mark.read_text() == self.signature(name)

    def signature(self, name: str) -> str:
        """SHA-256 of a task's commands, of their recipes in this folder, and of what it needs."""
        told = [self.text(name), *(self.signature(needed) for needed in self.tasks[name].needs)]
        told += [str(yaml.safe_load(Path(path).read_text())) for path in re.findall(rf"--config=({HERE}\S+)", told[0])]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()

    def text(self, name: str) -> str:
        """The commands of a task as text, without the folder of the program."""
        return "".join(shlex.join([Path(c[0]).name, *c[1:]]) + "\n" for c in self.tasks[name].commands)

    def wanted(self, measurements: list[str]) -> list[str]:
        """The tasks to run for the measurements, in an order that respects what they need."""
        order: list[str] = []

        def visit(name: str) -> None:
            if name not in order and not self.finished(name):
                for needed in self.tasks[name].needs:
                    visit(needed)
                order.append(name)

        for name in measurements:
            visit(name)
        return order

    def measure(self, measurements: list[str], jobs: int = 1) -> list[str]:
        """Run what the measurements need, `jobs` tasks at a time; returns the tasks that failed. What needs them is
        left out."""
        left, failed = self.wanted(measurements), []
        running: dict[Future[None], str] = {}
        with ThreadPoolExecutor(jobs) as pool:
            while True:
                ready = [name for name in left if all(map(self.finished, self.tasks[name].needs))]
                for name in ready[: jobs - len(running)]:
                    left.remove(name)
                    running[pool.submit(self.execute, name)] = name
                if not running:
                    return failed
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    name = running.pop(done)
                    try:
                        done.result()
                        self.finish(name)
                    except (RuntimeError, OSError, ValueError, KeyError) as error:
                        print(error, file=sys.stderr, flush=True)
                        failed.append(name)

    def execute(self, name: str) -> None:
        """Run a task's commands with one thread. Raises RuntimeError if a command fails.

        A folder that other commands began is refused: a training would go on from there, and say that it is finished.
        """
        begun, signature = self.run / "begun" / name, self.signature(name)
        if not self.tasks[name].found and begun.is_file() and begun.read_text() != signature:
            raise RuntimeError(f"{name} was begun by other commands or recipes: remove {begun} and what it left")
        write_atomically(begun, signature.encode())
        log = self.run / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": os.environ.get("WANDB_MODE", "disabled")}
        with log.open("ab") as file:
            for command in self.tasks[name].commands:
                command = [re.sub(r"{best of (\S+)}", lambda m: str(self.best_level(m[1])), part) for part in command]
                print(f"{name}: {shlex.join([Path(command[0]).name, *command[1:]])}", flush=True)
                if command[0] == CDM:
                    command = [sys.executable, "-m", "cdm_lightning", *command[1:]]
                command = [part.replace(" .venv/bin/python ", f" {shlex.quote(sys.executable)} ") for part in command]
                process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
                self.processes.append(process)
                code = process.wait()
                self.processes.remove(process)
                if code:
                    raise RuntimeError(f"{name} ended with code {code}: {log} says why")

    def best_level(self, search: str) -> int:
        """The level s > 0 of least distance on generated input in a search."""
        rows = [
            row
            for row in self.found[f"search {search}"]["search"]["rows"]
            if row["s"] and row["kind"] != "real low-res"
        ]
        return int(min(rows, key=lambda row: row["figures"][0]["value"])["s"])

    def finish(self, name: str) -> None:
        """Note that a task is finished, and keep the figures of a measurement."""
        if folders := self.tasks[name].found:
            known = {part: figures(folder / "results.json") for part, folder in folders.items()}
            about = {"commands": self.text(name).splitlines(), "signature": self.signature(name)}
            self.found[name] = {**about, **known}
            text = json.dumps(dict(sorted(self.found.items())), indent=1) + "\n"
            write_atomically(self.results, re.sub(r"\n {4,}|\n {3}(?=[\]}])", " ", text).encode())
        else:
            write_atomically(self.run / "done" / name, self.signature(name).encode())


def figures(path: Path) -> dict[str, Any]:
    """What is kept of a results.json: its figures, and when they were made with what."""

    def short(row: dict[str, Any]) -> list[dict[str, Any]]:
        return [{name: figure[name] for name in ("key", "value", "spread", "n")} for figure in row["figures"]]

    results = json.loads(path.read_text())
    kept: dict[str, Any] = {"date": results["made"]["date"], "versions": results["made"]["versions"]}
    if "rows" in results:  # of a search
        named = ("stage", "s", "kind", "sampler", "steps", "compared")
        rows = [{**{name: row[name] for name in named}, "figures": short(row)} for row in results["rows"]]
        kept |= {"floor": results["floor"], "rows": rows}
    elif "figures" in results:
        kept["figures"] = short(results)
    if "ratio" in results:  # of a classification accuracy score
        generated, ratio = results["generated"]["top1"], results["ratio"]["top1"]
        kept |= {"top1": generated["mean"], "sd": generated["sd"], "ratio": ratio["mean"]}
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("seed", type=int)
    parser.add_argument("--plan", type=Path, default=HERE / "study.yaml", help="the list of trainings and measurements")
    parser.add_argument("--jobs", type=int, default=1, help="how many tasks run at a time")
    parser.add_argument("--only", default="", help="a regular expression: measure only what it matches")
    parser.add_argument("--list", action="store_true", help="print the commands of all tasks, and run nothing")
    arguments = parser.parse_args()
    plan = yaml.safe_load(arguments.plan.read_text())
    if arguments.data not in plan["data"]:
        parser.error(f"{arguments.data} is none of the data of {arguments.plan}: {', '.join(plan['data'])}")
    tasks = tasks_of(plan, arguments.data, arguments.seed)
    run = Path("runs/study") / arguments.data / str(arguments.seed)
    study = Study(tasks, run, HERE / "results" / f"{arguments.data}-{arguments.seed}.json")
    if arguments.list:
        print("".join(map(study.text, tasks)), end="")
        return
    measurements = [name for name, task in tasks.items() if task.found and re.search(arguments.only, name)]
    if not measurements:
        sys.exit(f"--only {arguments.only} matches no measurement")
    run.mkdir(parents=True, exist_ok=True)
    with (run / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit(f"{run} is locked: another process runs this study")

        def stop(*_: Any) -> None:
            study.stop()
            sys.exit(128 + signal.SIGTERM)

        signal.signal(signal.SIGTERM, stop)
        failed = study.measure(measurements, arguments.jobs)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; what needs them was not begun")


if __name__ == "__main__":
    main()
