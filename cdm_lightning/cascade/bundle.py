"""The bundle: a trained cascade as one folder of safetensors weights and a bundle.json with their SHA-256."""

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

from cdm_lightning.cascade.hub import HUB_FILES, own_card, write_hub_files
from cdm_lightning.cascade.metadata import FORMAT, bundle_file, digest, read_bundle_metadata
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import check_output_folder, write_atomically
from cdm_lightning.stages import DiffusionStage
from cdm_lightning.stages.diffusion_stage import kind_of
from cdm_lightning.stages.loading import build_stage, stage_class


def write_bundle(
    folder: Path,
    stages: Sequence[DiffusionStage],
    metadata: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    card: bytes | None = None,
) -> None:
    """Write the bundle `folder`: stages from low to high resolution, and `metadata` (classes, levels, ...) as JSON.

    dtype: of the stored weights; `read_bundle` returns float32 stages. The folder is written under another name and
    then renamed, so that it is complete or absent. An existing bundle of that name is replaced, and a folder of
    anything else is refused. card: a person's README.md, for a folder that has none of a person.
    """
    folder = Path(folder)
    check_output_folder(folder)
    of_bundle = {*folder.glob("*.safetensors"), *(folder / name for name in HUB_FILES)}
    ours = of_bundle if (folder / "bundle.json").is_file() else set()
    ours |= {folder / "bundle.json", *(folder / f"{stage.name}.safetensors" for stage in stages)}
    if others := sorted(set(folder.glob("*")) - ours):
        raise InputError(
            f"{folder} holds {others[0].name}, which is of no bundle and would be lost: give another folder"
        )
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        entries = []
        for stage in stages:
            state = {name: value.detach().cpu().to(dtype).contiguous() for name, value in stage.state_dict().items()}
            weights = save_safetensors(state)
            file = f"{stage.name}.safetensors"
            write_atomically(partial / file, weights)
            entry = {"kind": kind_of(stage), "weights": file, "sha256": hashlib.sha256(weights).hexdigest()}
            diffusion = stage.diffusion  # its sampler and steps may have been set since the stage was made
            in_force = {"sampler": diffusion.sampler, "sampling_steps": diffusion.sampling_steps}
            entries.append({**entry, "trained": stage.trained, "arguments": {**stage.hparams, **in_force}})
        table = {"format": FORMAT, "stages_sha256": digest(entries), "stages": entries, **metadata}
        text = json.dumps(table, indent=1) + "\n"
        write_atomically(partial / "bundle.json", text.encode())
        kept = own_card(folder)
        write_hub_files(partial, table, card if kept is None else kept)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    replaced = folder.with_name(folder.name + ".replaced")
    if folder.exists():
        folder.replace(replaced)
    partial.replace(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def read_bundle(folder: Path) -> tuple[list[DiffusionStage], dict[str, Any]]:
    """The stages, frozen and in eval mode, and the metadata. Refuses a file whose SHA-256 is not the recorded one."""
    metadata, stages = read_bundle_metadata(folder), []
    folder = bundle_file(folder).parent
    if metadata.get("stages_sha256") != digest(metadata["stages"]):
        raise InputError(f"{folder}/bundle.json was changed after it was written: the SHA-256 of its stages differs")
    for entry in metadata["stages"]:
        kind = stage_class(entry.get("kind"), f"a stage of {folder}/bundle.json")
        if not isinstance(entry.get("arguments"), dict):
            raise InputError(f"{folder}/bundle.json lists a stage without arguments")
        name = str(entry.get("weights"))
        if not name.isprintable():
            raise InputError(f"{folder}/bundle.json lists a file {name!r}, a name that cannot be printed")
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise InputError(f"{path} is missing: bundle.json lists it")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
            raise InputError(f"{path} was changed after the bundle was written: its SHA-256 differs from bundle.json")
        try:
            state = load_safetensors(data)
        except SafetensorError as error:
            raise InputError(f"{path} is not a safetensors file: {error}") from error
        stages.append(build_stage(kind, entry["arguments"], state, str(path)))
        stages[-1].trained = entry.get("trained", {})
    return stages, metadata
