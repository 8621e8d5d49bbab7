"""The list of a study and its tasks: trainings, searches and samples of one data set and one training seed."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
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
BEST = re.compile(r"{best of ([^}]+)}")  # in levels of samples: the one above 0 with the least distance in a search
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
            seeds = range(given.get("seed", 0), given.get("seed", 0) + given["repeats"])
            drawn = [out / "low_res" / f"base16-seed{number}" for number in seeds]
            found["base"] = run / "evaluations" / f"low_res-{name}"
            commands.append(evaluated(drawn, "reference16", found["base"]))
            needs = [*needs, "reference16"]
        tasks[f"search {name}"] = Task(commands, ["detector", *needs], found)
    for name, options in plan.get("samples", {}).items():
        bundle = run / "bundles" / name
        make, needs = bundled(run, options["stages"], bundle)
        needs += [f"search {found}" for found in BEST.findall(options.get("levels", ""))]
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
            command += flags({"samples": folders[options["seeds"][0]], "shards": about["root"], "out": out})
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
    """What is wrong with a list: names and keys that mean nothing, values of another kind, recipes that are missing.

    The caller stops at the first mistake: what is checked later may rely on what was checked before.
    """
    yield from unknown("the plan", plan, PARTS)
    for part in ("data", "trainings", "searches", "samples"):
        entries = plan.get(part, {})
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            yield f"{part} must be a mapping of names to mappings"
    for part in ("data", "trainings"):
        if not plan.get(part):
            yield f"{part} is missing"
    for name, about in plan["data"].items():
        yield from unknown(f"data {name}", about, ("root", "channels", "detector", "inception"), 3)
        if not isinstance(about["detector"], str):
            yield f"data {name}: detector must be a name or a path, not {about['detector']}"
    trainings, searches, samples = plan["trainings"], plan.get("searches", {}), plan.get("samples", {})
    for name, options in trainings.items():
        recipe = HERE / f"{options.get('recipe')}.yaml"
        if not recipe.is_file():
            yield f"training {name}: recipe {recipe} is missing"
        before = [name]
        while "after" in trainings[before[-1]]:
            before.append(str(trainings[before[-1]]["after"]))
            if before[-1] not in trainings or before[-1] in before[:-1]:
                yield f"training {name}: after must name another training, without a circle, and gives {before[-1]}"
    if "recipe" in plan and not Path(str(plan["recipe"])).is_file():
        yield f"recipe {plan['recipe']} is missing"
    if not isinstance(sampled := plan.get("sampled", {}), dict):
        yield f"sampled must be a mapping of options of `cdm search`, not {sampled}"
    yield from unknown("sampled", sampled, options_of(search))
    for name, entry in [*searches.items(), *samples.items()]:
        stages = entry.get("stages")
        if not isinstance(stages, list) or not stages:
            yield f"{name}: stages must be a list of trainings, such as [base16, sr32], not {stages}"
        for stage in stages:
            if str(stage).partition("@")[0] not in trainings:
                yield f"{name}: stage {stage} is none of the trainings {', '.join(trainings)}"
    for name, entry in searches.items():
        yield from unknown(f"search {name}", entry, ["stages", "base", *options_of(search)], 1)
        if BEST.search(str(entry.get("levels"))):
            yield f"search {name}: {{best of ...}} is for the levels of samples"
        if entry.get("base") and not entry["stages"][0].startswith("base16"):
            yield f"search {name}: base: true measures samples of 16x16, of a training whose name begins with base16"
        if not isinstance(repeats := {**SAMPLED, **sampled, **entry}["repeats"], int):
            yield f"search {name}: repeats must be a whole number, not {repeats}"
    for name, entry in samples.items():
        yield from unknown(f"samples {name}", entry, ["stages", "seeds", "score", *options_of(sample)], 2)
        if name in searches:
            yield f"samples {name}: a search has that name, and they would share a bundle"
        if not isinstance(entry["seeds"], list) or not entry["seeds"]:
            yield f"samples {name}: seeds must be a list such as [0, 1, 2], not {entry['seeds']}"
        if not isinstance(levels := entry.get("levels", ""), str):
            yield f'samples {name}: levels must be text, such as "{levels}" in quotes'
        for found in BEST.findall(levels):
            if found not in searches:
                yield f"samples {name}: {found} is none of the searches"


def options_of(command: Callable[..., Any]) -> list[str]:
    """The options of a command but for those that the runner gives."""
    given = ("bundle", "out", "stages")
    return [option for option in inspect.signature(command).parameters if option not in given]


def unknown(where: str, entry: dict[str, Any], known: Sequence[str], required: int = 0) -> Iterator[str]:
    """Keys of an entry that are not among the known ones; the first `required` of these must be there."""
    for key in entry:
        if key not in known:
            yield f"{where}: {key} is none of {', '.join(known)}"
    for key in known[:required]:
        if key not in entry:
            yield f"{where}: {key} is missing"
