"""Bundles, checkpoints and run folders, and a bundle's single file of weights. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cdm_lightning.cascade.bundle import read_bundle
from cdm_lightning.cascade.metadata import bundle_file, digest, origin, read_bundle_metadata
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.inspection.findings import Findings, about_classes, settings, size_of, written
from cdm_lightning.stages.checkpoints import load_safely, newest_checkpoint

STAGE = ("resolution", "image_channels", "channels", "channel_mult", "num_res_blocks", "attention_resolutions")
DIFFUSION = ("schedule", "prediction", "variance", "augmentation", "timesteps", "lr", "seed")


def inspect_bundle(path: Path, check: bool) -> Findings:
    """What a bundle holds. check: compare every hash, build every stage, and look at every number."""
    metadata, folder = read_bundle_metadata(path), bundle_file(path).parent
    found = Findings(
        f"a bundle, a cascade of {len(metadata['stages'])} stages",
        ("stage", "resolution", "numbers", "weights", "steps", "images seen", "averaged", "size"),
    )
    if metadata.get("stages_sha256") != digest(metadata["stages"]):
        found.damage.append(f"{folder}/bundle.json was changed after it was written: the SHA-256 of its stages differs")
    for entry in metadata["stages"]:
        trained, name = entry.get("trained", {}), str(entry.get("weights"))
        arguments = entry.get("arguments") if isinstance(entry.get("arguments"), dict) else {}
        weights = folder / name
        if Path(name).name != name or not weights.is_file():
            found.damage.append(f"{weights} is missing: bundle.json lists it")
            continue
        numbers, kinds = found.try_to(tensors_in, weights) or ("?", "?")
        about = ["imported" if "imported" in trained else trained.get("steps"), trained.get("images")]
        texts = [f"{value:,}" if type(value) is int else str(value or "?") for value in about]
        averaged, size = "yes" if trained.get("averaged") else "no", size_of(weights.stat().st_size)
        found.rows.append((weights.stem, str(arguments.get("resolution")), numbers, kinds, *texts, averaged, size))
        if check and sha256_of(weights) != entry.get("sha256"):
            found.damage.append(f"{weights} was changed: its SHA-256 differs from that in bundle.json")
    if check and not found.damage and (read := found.try_to(lambda: read_bundle(folder))):
        for stage in read[0]:
            found.damage += not_finite(stage.state_dict(), f"{folder}/{stage.name}.safetensors")
    known = found.try_to(lambda: origin(metadata)) if not found.damage else None
    known = known or {"classes": metadata.get("classes"), "crop": None}
    levels, data = metadata.get("levels"), metadata.get("data")
    found.note(
        classes=about_classes(known["classes"]), levels=levels,
        sampling="truncated" if metadata.get("truncated") else "non-truncated", crop=known["crop"],
        data=data, license=metadata.get("license"), written=written(folder / "bundle.json"),
        stages_SHA256=str(metadata.get("stages_sha256"))[:16],
    )  # fmt: skip
    return found


def inspect_weights(path: Path, check: bool) -> Findings | None:
    """A .safetensors of a bundle, of which the file beside it says more; None for another file."""
    if not bundle_file(path.parent).is_file():
        return None
    metadata = read_bundle_metadata(path.parent)
    entry = next((entry for entry in metadata["stages"] if entry.get("weights") == path.name), None)
    if entry is None:
        return None
    arguments = entry.get("arguments") if isinstance(entry.get("arguments"), dict) else {}
    found = Findings(f"the weights of a {entry.get('kind')}, of the bundle {path.parent}")
    numbers, kinds = found.try_to(lambda: tensors_in(path)) or ("?", "?")
    found.note(
        numbers=f"{numbers}, {kinds}", size=size_of(path.stat().st_size), network=choose(arguments, STAGE),
        diffusion=choose(arguments, DIFFUSION), trained=settings(without_classes(entry.get("trained", {}))),
        classes=about_classes(entry.get("trained", {}).get("classes")), written=written(path),
    )  # fmt: skip
    if check:
        if sha256_of(path) != entry.get("sha256"):
            found.damage.append(f"{path} was changed: its SHA-256 differs from that in bundle.json")
        else:
            with safe_open(path, "pt") as stored:
                names = list(stored.keys())
                found.damage += not_finite({name: stored.get_tensor(name) for name in names}, str(path))
    return found


def inspect_run(path: Path, files: list[Path], check: bool) -> Findings:
    """What the checkpoints of a run hold: its newest whole one, and which are damaged."""
    newest = newest_checkpoint({file.parent: None for file in files})
    if newest is None:
        raise InputError(f"{path} holds {len(files)} checkpoints, and none of them is whole: the first is {files[0]}")
    found = inspect_checkpoint(newest, check)
    found.kind = f"a run, of {len(files)} checkpoints; the newest is {newest.name}, {found.kind}"
    for file in files:
        if file != newest:
            found.damage += inspect_checkpoint_safely(file, check)
    return found


def inspect_checkpoint_safely(file: Path, check: bool) -> list[str]:
    """The damage of a checkpoint; one that cannot be read is damage itself."""
    try:
        return inspect_checkpoint(file, check).damage
    except InputError as error:
        return [str(error)]


def inspect_checkpoint(path: Path, check: bool) -> Findings:
    """What a checkpoint of a stage holds. check: compare every CRC-32 of the file, and look at every number."""
    state = load_safely(path, map_location="meta", mmap=True)
    state = state if isinstance(state, dict) else {}
    if "stage" not in state or not isinstance(state.get("hyper_parameters"), dict):
        raise InputError(
            f"{path} is a checkpoint, and not of a stage of cdm"
            + ("; a network of ADM becomes one by `cdm import`" if "time_embed.0.weight" in state else "")
        )
    weights, data = state.get("state_dict"), state.get("ShardDataModule")
    weights, data = weights if isinstance(weights, dict) else {}, data if isinstance(data, dict) else {}
    arguments, imported = state["hyper_parameters"], state.get("imported")
    found = Findings(f"a checkpoint of a {state['stage']}")
    numbers = sum(value.numel() for value in weights.values() if isinstance(value, torch.Tensor))
    steps, seen = state.get("global_step"), data.get("images_seen")
    found.note(
        trained=f"{steps:,} steps, epoch {state.get('epoch')}" if type(steps) is int and not imported else None,
        imported=settings(imported.get("imported", imported)) if isinstance(imported, dict) else None,
        images_seen=f"{seen:,}" if type(seen) is int else None,
        averaged="yes" if "averaging_state" in state or imported else "no",
        weights=f"{numbers / 1e6:.2f} M numbers", size=size_of(path.stat().st_size),
        network=choose(arguments, STAGE), diffusion=choose(arguments, DIFFUSION),
        classes=about_classes(data.get("classes")) if data.get("classes") else arguments.get("num_classes") or "none",
        crop=data.get("crop"), begun_from=arguments.get("init_from"),
        Lightning=state.get("pytorch-lightning_version"), written=written(path),
    )  # fmt: skip
    if check and not found.damage:
        if torn := torn_member(path):
            found.damage.append(f"{path} is damaged: the CRC-32 of {torn} is another")
        else:
            found.damage += not_finite(load_safely(path, mmap=True), str(path))
    return found


def tensors_in(path: Path) -> tuple[str, str]:
    """How many numbers a safetensors file holds, in millions, and their types, by its header alone."""
    try:
        with safe_open(path, "pt") as stored:
            slices = [stored.get_slice(name) for name in stored.keys()]  # noqa: SIM118  # no mapping
            kinds = sorted({one.get_dtype() for one in slices})
            return f"{sum(math.prod(one.get_shape()) for one in slices) / 1e6:.2f} M", ", ".join(kinds)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {str(error).splitlines()[0]}") from error


def torn_member(path: Path) -> str | None:
    """The first file in a zip, such as a checkpoint or an .npz, whose CRC-32 is wrong; None if all are right."""
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except (OSError, ValueError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return "one of its parts"


def not_finite(state: Any, source: str) -> list[str]:
    """A sentence if a tensor holds numbers that are not finite."""
    for name, value in tensors(state):
        if value.is_floating_point() and not value.isfinite().all():
            return [f"{source} holds numbers that are not finite in {name}"]
    return []


def tensors(state: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors in nested tables and lists, by their names."""
    if isinstance(state, torch.Tensor):
        yield name, state
    elif isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            if key != "callbacks":  # their best values begin at infinity
                yield from tensors(value, f"{name}.{key}".strip("."))


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def choose(table: dict[str, Any], names: tuple[str, ...]) -> str:
    """Those settings of a table, in one line."""
    return settings({name: table.get(name) for name in names})


def without_classes(trained: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in trained.items() if name != "classes"}
