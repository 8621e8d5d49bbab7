"""A trained cascade as one folder: weights as safetensors, everything else in bundle.json, each file with its hash."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import write_atomically
from cdm_lightning.stages import DiffusionStage
from cdm_lightning.stages.loading import KINDS, build_stage

FORMAT = 1


def write_bundle(
    folder: Path, stages: Sequence[DiffusionStage], about: dict[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    """Write stages, low to high, and what is known `about` them (classes, levels, ...) as the bundle `folder`.

    dtype: of the weights in the file; stages are float32 again when they are read.
    The folder appears whole, under its name, or not at all; an existing bundle of that name is replaced.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        entries = []
        for stage in stages:
            state = {name: value.detach().cpu().to(dtype).contiguous() for name, value in stage.state_dict().items()}
            weights = save_safetensors(state)
            file = f"{stage.name}.safetensors"
            write_atomically(partial / file, weights)
            entry = {"kind": type(stage).__name__, "weights": file, "sha256": hashlib.sha256(weights).hexdigest()}
            entries.append({**entry, "trained": stage.trained, "arguments": dict(stage.hparams)})
        described = {"format": FORMAT, "stages_sha256": digest(entries), "stages": entries, **about}
        text = json.dumps(described, indent=1) + "\n"
        write_atomically(partial / "bundle.json", text.encode())
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    replaced = folder.with_name(folder.name + ".replaced")
    if folder.exists():
        folder.replace(replaced)
    partial.replace(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def digest(entries: list[Any]) -> str:
    """SHA-256 of what bundle.json says of the stages; levels and results beside them stay open to change."""
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def read_bundle_metadata(folder: Path) -> dict[str, Any]:
    """bundle.json as a dictionary; refuses a folder that is not a bundle."""
    path = Path(folder) / "bundle.json"
    if not path.is_file():
        raise InputError(f"{folder} is not a bundle: it holds no bundle.json, which `cdm bundle` writes")
    try:
        about = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT or not isinstance(about.get("stages"), list):
        raise InputError(f"{path} is not a bundle of format {FORMAT}")
    check_bundle_metadata(path, about)
    return about


def origin(about: dict[str, Any]) -> dict[str, Any]:
    """What bundle.json, or the like, knows of the images its stages were trained on: `classes`, `crop` and `filter`.

    None is unknown. classes: their names; None too where no stage is told the class.
    """
    trained = [stage.get("trained", {}) for stage in about["stages"]]
    named = [{"classes": about.get("classes")}, *trained]
    known = {name: next((t[name] for t in named if t.get(name)), None) for name in ("classes", "crop", "filter")}
    if all(stage["arguments"].get("num_classes") is None for stage in about["stages"]):
        known["classes"] = None  # names of classes that its images do not have
    return known


def check_bundle_metadata(path: Path, about: dict[str, Any]) -> None:
    """Refuse a bundle.json whose fields are of other types than they should be."""
    for entry in about["stages"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("trained", {}), dict):
            raise InputError(f"{path} lists a stage that is no table")
    for name, kind in (("levels", int), ("classes", str)):
        value = about.get(name)
        if value is not None and not (isinstance(value, list) and all(type(each) is kind for each in value)):
            raise InputError(f"{path} says {name} {value!r}: a list of {kind.__name__} is expected")
    if type(about.get("truncated", False)) is not bool:
        raise InputError(f"{path} says truncated {about['truncated']!r}: true or false is expected")


def read_bundle(folder: Path) -> tuple[list[DiffusionStage], dict[str, Any]]:
    """The stages, frozen and in eval mode, and bundle.json; a file that changed since it was written is refused."""
    about, stages = read_bundle_metadata(folder), []
    if about.get("stages_sha256") != digest(about["stages"]):
        raise InputError(f"{folder}/bundle.json was changed after it was written: the SHA-256 of its stages differs")
    for entry in about["stages"]:
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("kind"), str)
            or entry["kind"] not in KINDS
            or not isinstance(entry.get("arguments"), dict)
        ):
            raise InputError(f"{folder}/bundle.json lists a stage that is none of {sorted(KINDS)}")
        name = str(entry.get("weights"))
        if not name.isprintable():
            raise InputError(f"{folder}/bundle.json lists a file {name!r}, a name that cannot be printed")
        path = Path(folder) / name
        if Path(name).name != name or not path.is_file():
            raise InputError(f"{path} is missing: bundle.json lists it")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
            raise InputError(f"{path} was changed after the bundle was written: its SHA-256 differs from bundle.json")
        try:
            state = load_safetensors(data)
        except SafetensorError as error:
            raise InputError(f"{path} is not a safetensors file: {error}") from error
        stages.append(build_stage(entry["kind"], entry["arguments"], state, str(path)))
        stages[-1].trained = entry.get("trained", {})
    return stages, about
