"""Loading trained stages from checkpoints without unpickling, and finding the newest complete checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.stages.base_and_super_resolution import BaseStage, DiffusionStage, SuperResolutionStage

STAGE_CLASSES: dict[str, type[DiffusionStage]] = {kind.__name__: kind for kind in (BaseStage, SuperResolutionStage)}


def load_stage(path: str | Path) -> DiffusionStage:
    """The stage in a training checkpoint, with its EMA weights, frozen and in eval mode. Nothing is unpickled."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist: a checkpoint of a stage is expected")
    checkpoint = load_safely(path)
    kind = checkpoint.get("stage") if isinstance(checkpoint, dict) else None
    if (
        not isinstance(kind, str)
        or kind not in STAGE_CLASSES
        or not {"hyper_parameters", "state_dict", "global_step"} <= checkpoint.keys()
    ):
        raise InputError(
            f"{path} is not a checkpoint of a stage: its stage is {kind!r}, and known are {sorted(STAGE_CLASSES)}"
        )
    stage = build_stage(kind, checkpoint["hyper_parameters"], checkpoint["state_dict"], str(path))
    data = checkpoint.get("ShardDataModule", {})
    stage.trained = {
        "averaged": "averaging_state" in checkpoint,
        "steps": checkpoint["global_step"],
        "images": data.get("images_seen"),
        **{name: data.get(name) for name in ("classes", "crop", "filter")},
    }
    return stage


def load_safely(path: str | Path, **options: Any) -> Any:
    """torch.load with weights_only: reads numbers and tables, and runs no code. Raises InputError for other files."""
    try:
        return torch.load(path, **{"map_location": "cpu", **options}, weights_only=True)
    except Exception as error:  # torch raises many kinds of error for a foreign or truncated file
        raise InputError(
            f"{path} is not a checkpoint that can be loaded safely (weights_only): {type(error).__name__}"
        ) from error


def validated_arguments(kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a stage, checked against the types in its constructor; the file may not be trusted."""
    hints = {**get_type_hints(DiffusionStage.__init__), **get_type_hints(STAGE_CLASSES[kind].__init__)}
    for name, value in arguments.items():
        if value is None and type(None) not in get_args(hints.get(name)):
            raise TypeError(f"{name} is null")  # jsonargparse accepts null for any type
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(STAGE_CLASSES[kind], fail_untyped=False)
    return parser.parse_object(arguments).as_dict()


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).splitlines()), "")


def check_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint without the values of its tensors. Refuses a file that Lightning cannot resume from.

    Such a file is truncated, foreign, or in need of unpickling.
    """
    checkpoint = load_safely(path, map_location="meta", mmap=True)
    needed = {"pytorch-lightning_version", "epoch", "global_step", "loops", "state_dict", "hyper_parameters"}
    missing = sorted(needed - set(checkpoint)) if isinstance(checkpoint, dict) else sorted(needed)
    if missing:
        raise InputError(f"{path} is not a checkpoint of a training: it holds no {missing[0]}")
    return checkpoint


def build_stage(kind: str, arguments: dict[str, Any], state: dict[str, torch.Tensor], source: str) -> DiffusionStage:
    """A frozen stage in eval mode, from its class name, constructor arguments and weights. source: for errors."""
    arguments = {name: value for name, value in arguments.items() if not name.startswith("_")}
    try:
        stage = STAGE_CLASSES[kind](**validated_arguments(kind, arguments))
        stage.load_state_dict(state)
    except InputError:
        raise
    except Exception as error:  # wrong types or sizes make torch and Python raise many kinds of error
        raise InputError(f"{source} does not fit {kind}: {type(error).__name__}: {first_line(error)}") from error
    nn.Module.requires_grad_(stage, False)
    return stage.eval()


def newest_checkpoint(folders: Iterable[Path], at_most: int | None = None) -> Path | None:
    """The complete checkpoint with the most steps in `folders`, or None; incomplete files are skipped with a warning.

    at_most: the largest number of steps allowed. Of checkpoints with equal steps, the last written one counts. A file
    is complete when torch can open it and it holds the state of a training. Nothing is unpickled.
    """
    complete = []
    for file in sorted(file for folder in folders for file in Path(folder).glob("*.ckpt")):
        try:
            state = load_safely(file, map_location="meta", mmap=True)
            step, _ = int(state["global_step"]), (state["state_dict"], state["optimizer_states"])
        except Exception as error:  # torch raises many kinds of error for a truncated or foreign file
            rank_zero_warn(f"{file} is not a whole checkpoint and is passed over: {type(error).__name__}")
            continue
        if at_most is None or step <= at_most:
            complete.append((step, file.stat().st_mtime_ns, file))
    return max(complete)[2] if complete else None
