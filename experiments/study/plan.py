"""The list of a study and its tasks: trainings, searches and samples of one data set and one training seed."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cdm_lightning.evaluation.detectors import load_detector
from cdm_lightning.evaluation.search.search import search
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.parser import read_yaml
from cdm_lightning.sampling.sample import sample

HERE = Path("experiments/study")  # the commands are for the project's root
CDM = "cdm"  # run as a module, so that the checkout need not be installed
SAMPLED = {"n": 2000, "repeats": 3, "truncated": False, "precision": "bf16-mixed", "block_size": 200}
PARTS = ("data", "levels", "recipe", "sampled", "trainings", "searches", "samples")


@dataclass(frozen=True)
class Task:
    """Commands to run in order, once the tasks in `needs` are finished. found: folders of results."""

    commands: list[list[str]]
    needs: list[str]
    found: dict[str, Path] = field(default_factory=dict)


def tasks_of(plan: dict[str, Any], data: str, seed: int, folder: Path) -> dict[str, Task]:
    """All tasks of one data set and one training seed, by name. folder: of all runs of the plan."""
    about, run = plan["data"][data], folder / data / str(seed)
    sampled = {**SAMPLED, **plan.get("sampled", {})}
    detector, shared = about["detector"], {"shards": about["root"], "detector": about["detector"]}
    if "/" not in detector:
        load_detector(detector)  # refuses a name that means nothing
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
    for name, options in plan.get("searches", {}).items():
        bundle, out = run / "bundles" / name, run / "searches" / name
        make, needs = bundled(run, options["stages"], bundle)
        given = {"bundle": bundle, "out": out, **shared, **sampled, **without(options, "stages", "base")}
        commands, found = [make, [CDM, "search", *flags(given)]], {"search": out}
        if options.get("base"):  # the low-resolution samples by themselves
            folders = [out / "low_res" / f"{needs[0]}-seed{number}" for number in range(given["repeats"])]
            found["base"] = run / "evaluations" / f"low_res-{name}"
            commands.append(evaluated(folders, "reference16", found["base"]))
            needs = [*needs, "reference16"]
        tasks[f"search {name}"] = Task(commands, ["detector", *needs], found)
    for name, options in plan.get("samples", {}).items():
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


def read_plan(path: Path) -> dict[str, Any]:
    """The list in a YAML file. Raises InputError for what could not run, before anything is trained."""
    if not path.is_file():
        raise InputError(f"{path} is missing: a plan lists data, trainings, searches and samples")
    read_yaml(path)
    plan: dict[str, Any] = yaml.safe_load(path.read_text("utf-8-sig"))
    for wrong in mistakes(plan):
        raise InputError(f"{path}: {wrong}")
    return plan


def mistakes(plan: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a list: names and keys that mean nothing, and recipes that are missing."""
    yield from unknown("the plan", plan, PARTS)
    for part in ("data", "trainings", "searches", "samples"):
        entries = plan.get(part, {})
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            yield f"{part} must be a mapping of names to mappings"
            return
    for part in ("data", "trainings"):
        if not plan.get(part):
            yield f"{part} is missing"
    for name, about in plan["data"].items():
        yield from unknown(f"data {name}", about, ("root", "channels", "detector", "inception"), 3)
    trainings = plan["trainings"]
    if "recipe" in plan and not Path(plan["recipe"]).is_file():
        yield f"recipe {plan['recipe']} is missing"
    for name, options in trainings.items():
        recipe = HERE / f"{options.get('recipe')}.yaml"
        if not recipe.is_file():
            yield f"training {name}: recipe {recipe} is missing"
        before = [name]
        while "after" in trainings.get(before[-1], {}):
            before.append(trainings[before[-1]]["after"])
            if before[-1] not in trainings or before[-1] in before[:-1]:
                yield f"training {name}: after must name another training, without a circle, and gives {before[-1]}"
                return
    own = {"searches": (search, ("stages", "base")), "samples": (sample, ("stages", "seeds", "score", "count"))}
    for part, (command, keys) in own.items():
        options = inspect.signature(command).parameters
        for name, entry in plan.get(part, {}).items():
            required = 1 if part == "searches" else 2
            known = [*keys, *(option for option in options if option not in (*keys, "bundle", "out"))]
            yield from unknown(f"{part} {name}", entry, known, required)
            for stage in entry["stages"]:
                if str(stage).partition("@")[0] not in trainings:
                    yield f"{part} {name}: stage {stage} is none of the trainings {', '.join(trainings)}"
            levels = entry.get("levels", "" if part == "samples" else [])
            if part == "samples" and not isinstance(levels, str):
                yield f'{part} {name}: levels must be text, such as "{levels}" in quotes'
            for found in re.findall(r"{best of (.+?)}", str(levels)):
                if found not in plan.get("searches", {}):
                    yield f"{part} {name}: {found} is none of the searches"


def unknown(where: str, entry: dict[str, Any], known: Sequence[str], required: int = 0) -> Iterator[str]:
    """Keys of an entry that are not among the known ones; the first `required` of these must be there."""
    for key in entry:
        if key not in known:
            yield f"{where}: {key} is none of {', '.join(known)}"
    for key in known[:required]:
        if key not in entry:
            yield f"{where}: {key} is missing"
