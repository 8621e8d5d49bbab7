"""Run the study: `python experiments/study DATA SEED`, such as `python experiments/study fashion 0`.

study.yaml lists what is trained and measured for one data set and one training seed; --plan names another such list,
such as wide/study.yaml, which is for a GPU. Every task is a few commands, printed as they start; their output is in
runs/study/DATA/SEED/logs. A task takes one core, --jobs sets how many run at a time, and other seeds may run beside.
A measurement leaves its figures in experiments/study/results/DATA-SEED.json, that of another plan in
runs/study/PLAN/results. It is not repeated, nor is a training that no missing measurement needs. Other finished tasks
are kept beside the logs, and a stopped command resumes: the same call continues a stopped study.

A plan of your own: copy study.yaml, leave out what you do not want, and add trainings: a recipe of this folder and the
options of `cdm fit` in which yours differs. A search takes `stages`, the options of `cdm search`, and `base: true` for
the distance of the low-resolution samples; samples take `stages`, `seeds`, the options of `cdm sample`, and
`score: true` for CAS. NAME@STEP is a training at one of its checkpoints, every 160 steps. `recipe` names a YAML that
is read after every recipe, `sampled` options of all searches. A detector whose path has a slash is trained if its file
is missing. tables.py --results FOLDER prints the tables.
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
from pathlib import Path
from typing import Any

import yaml
from jsonargparse.typing import PositiveInt
from plan import BEST, CDM, HERE, Task, read_plan, tasks_of

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import write_atomically


class Study:
    """The state of a study: which tasks are finished, and what they found. results: the file of figures."""

    def __init__(self, tasks: dict[str, Task], run: Path, results: Path) -> None:
        self.tasks, self.run, self.results = tasks, run, results
        self.found: dict[str, Any] = json.loads(results.read_text()) if results.is_file() else {}
        self.processes: list[subprocess.Popen[bytes]] = []

    def stop(self) -> None:
        """End the commands that run; a training saves itself first."""
        for process in list(self.processes):  # an ended one is taken out meanwhile
            process.terminate()

    def finished(self, name: str) -> bool:
        """Whether a task needs no run: its figures, or its mark, have its signature."""
        if self.tasks[name].found:
            return self.found.get(name, {}).get("signature") == self.signature(name)
        mark = self.run / "done" / name
        return mark.is_file() and mark.read_text() == self.signature(name)

    def signature(self, name: str) -> str:
        """SHA-256 of a task's commands, of the recipes that they read, and of what it needs."""
        told = [self.text(name), *(self.signature(needed) for needed in self.tasks[name].needs)]
        options = [option for command in self.tasks[name].commands for option in command]
        recipes = [Path(option.removeprefix("--config=")) for option in options if option.startswith("--config=")]
        told += [str(yaml.safe_load(path.read_text())) for path in recipes]
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
        if known := sum(map(self.finished, measurements)):
            told = f"{known} of {len(measurements)} measurements are in {self.results}"
            print(f"{told} already; move it away to make them again", flush=True)
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
                command = [BEST.sub(lambda m: str(self.best_level(m[1])), part) for part in command]
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
    parser.add_argument("--jobs", type=PositiveInt, default=1, help="how many tasks run at a time")
    parser.add_argument("--only", default="", help="a regular expression: measure only what it matches")
    parser.add_argument("--list", action="store_true", help="print the commands of all tasks, and run nothing")
    arguments = parser.parse_args()
    if not HERE.is_dir():
        parser.error(f"{HERE} is missing: call it from the folder of the project")
    ours = arguments.plan.resolve().is_relative_to(HERE.resolve()) and arguments.plan.name == "study.yaml"
    folder = Path("runs/study") / ("" if ours else arguments.plan.stem)
    try:
        only = re.compile(arguments.only)
        plan = read_plan(arguments.plan)
        if arguments.data not in plan["data"]:
            raise InputError(f"{arguments.data} is none of the data of {arguments.plan}: {', '.join(plan['data'])}")
        tasks = tasks_of(plan, arguments.data, arguments.seed, folder)
    except (InputError, re.error) as error:
        parser.error(f"--only {arguments.only}: {error}" if isinstance(error, re.error) else str(error))
    run = folder / arguments.data / str(arguments.seed)
    results = (HERE if ours else folder) / "results" / f"{arguments.data}-{arguments.seed}.json"
    study = Study(tasks, run, results)
    if arguments.list:
        print("".join(map(study.text, tasks)), end="")
        return
    measurements = [name for name, task in tasks.items() if task.found and only.search(name)]
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
