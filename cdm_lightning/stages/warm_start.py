"""Warm start: a training that begins with the weights of another stage, and computes the same function at step 0."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import read_table
from cdm_lightning.stages.checkpoints import load_safely, newest_checkpoint

# Arguments that decide on the function, and that the shapes of the weights do not show.
OF_THE_FUNCTION = (
    "num_heads", "num_head_channels", "norm_groups", "timesteps", "schedule", "prediction", "continuous", "upsampling",
)  # fmt: skip
OF_A_LEVEL = ("low_res_timesteps", "low_res_schedule")  # what s means, to a stage that is told it
# The value of a weight that the other stage lacks: the last layer of a new embedding is zero, so that it adds nothing.
NEW = {"level_embedding.2.weight", "level_embedding.2.bias", "label_embedding.weight"}


def warm_start(stage: Any, source: str | Path, skip: Sequence[str] = ()) -> None:
    """Copy the weights of another stage into `stage`: those of the same name and shape.

    What is new adds nothing at first: the last layer of a new level embedding and a new class embedding are zero, and
    classes beyond the other stage's start at the mean of its classes. All else that does not fit is refused by name.

    source: a checkpoint, a run folder (its newest checkpoint), a bundle (its stage of the same name), or the
    .safetensors of one of its stages. skip: beginnings of names of weights that are left out (such as unet.conv_in),
    which keep their random start, and names of arguments that may differ. Raises InputError.
    """
    weights, arguments, where = read_stage(Path(source), stage.name)
    unused = set(skip)

    def skipped(name: str) -> bool:
        found = {word for word in skip if name == word or name.startswith(word + ".")}
        unused.difference_update(found)
        return bool(found)

    told_levels = arguments.get("augmentation") == stage.hparams.get("augmentation") == "gaussian"
    for name in (*OF_THE_FUNCTION, *(OF_A_LEVEL if told_levels else ())):
        own, other = stage.hparams.get(name), arguments.get(name)
        if name in arguments and own != other and not skipped(name):
            raise InputError(
                f"init_from {where} has {name} {other}, and the configuration says {own}: the same weights are another "
                f"function; add {name} to init_skip to take them all the same"
            )
    state = stage.state_dict()
    left = sorted(name for name in weights.keys() - state.keys() if not skipped(name))
    if left:
        raise InputError(
            f"init_from {where} holds {left[0]}, and the stage does not: add it to init_skip to leave it out"
        )
    for name, own in state.items():
        if skipped(name):
            continue
        if name in weights and (fitted := fit_classes(name, weights[name], own)) is not None:
            state[name] = fitted
        elif name not in weights and name.removeprefix("unet.") in NEW:
            state[name] = torch.zeros_like(own)
        elif name in weights or "level_embedding" not in name:  # the first layer of a new level embedding is random
            shape = f"{name} of shape {tuple(weights[name].shape)}" if name in weights else f"no {name}"
            raise InputError(
                f"init_from {where} has {shape}, and the stage takes {tuple(own.shape)}: add it to init_skip to leave "
                "it out"
            )
    if unused:
        raise InputError(f"init_skip {sorted(unused)[0]} names no weight or argument that differs from {where}")
    stage.load_state_dict(state)


def fit_classes(name: str, value: torch.Tensor, own: torch.Tensor) -> torch.Tensor | None:
    """A weight in the shape of `own`, or None. More classes than before: the others get the mean of those there are."""
    if value.shape == own.shape:
        return value
    if name != "unet.label_embedding.weight" or value.shape[1:] != own.shape[1:] or len(value) > len(own):
        return None
    return torch.cat([value, value.mean(0, keepdim=True).expand(len(own) - len(value), -1)])


def read_stage(source: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any], Path]:
    """The float32 weights of a stage, its arguments as far as they are known, and the file that was read."""
    if (source / "bundle.json").is_file():
        source = source / f"{name}.safetensors"
    elif source.is_dir():
        newest = newest_checkpoint([source / "checkpoints"])
        source = newest or source / "checkpoints" / "last.ckpt"
    if not source.is_file():
        raise InputError(f"init_from {source} does not exist: a checkpoint, a run folder or a bundle is expected")
    weights: Any
    if source.suffix == ".safetensors":
        table = read_table(source.with_name("bundle.json"), "stages")
        entries = [e for e in table["stages"] if isinstance(e, dict) and e.get("weights") == source.name]
        try:
            weights, arguments = load_file(source), entries[0].get("arguments") if entries else None
            whole = bool(entries) and sha256_of(source) == entries[0].get("sha256")
        except SafetensorError as error:
            raise InputError(f"init_from {source} is not a safetensors file: {error}") from error
        if not whole:
            raise InputError(f"init_from {source} is not the file of its bundle: its SHA-256 differs from bundle.json")
    else:
        checkpoint = load_safely(source, mmap=True)
        checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
        weights, arguments = checkpoint.get("state_dict"), checkpoint.get("hyper_parameters")
    if not isinstance(weights, dict) or not isinstance(arguments, dict) or not arguments:
        raise InputError(f"init_from {source} is not a stage: it holds no weights with the arguments of a stage")
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor) or not value.isfinite().all():
            raise InputError(f"init_from {source} has a {name} that is no tensor of finite numbers")
    return {name: value.float() for name, value in weights.items()}, arguments, source


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
