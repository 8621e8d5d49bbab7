"""Trained stages read from checkpoint files without unpickling, and the newest checkpoint that is whole."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.stages.kinds import BaseStage, DiffusionStage, SuperResolutionStage

KINDS: dict[str, type[DiffusionStage]] = {kind.__name__: kind for kind in (BaseStage, SuperResolutionStage)}


def load_stage(path: str | Path) -> DiffusionStage:
    """The stage of a training checkpoint with its EMA weights, in eval mode, frozen; nothing is unpickled."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist: a checkpoint of a stage is expected")
    checkpoint = load_safely(path)
    kind = checkpoint.get("stage") if isinstance(checkpoint, dict) else None
    if (
        not isinstance(kind, str)
        or kind not in KINDS
        or not {"hyper_parameters", "state_dict", "global_step"} <= checkpoint.keys()
    ):
        raise InputError(f"{path} is not a checkpoint of a stage: it says {kind!r}, and known are {sorted(KINDS)}")
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
    """What torch.load finds in a file with weights_only: numbers and tables, and no code runs."""
    try:
        return torch.load(path, **{"map_location": "cpu", **options}, weights_only=True)
    except Exception as error:  # whatever a foreign or torn file makes torch raise
        raise InputError(
            f"{path} is not a checkpoint that can be loaded safely (weights_only): {type(error).__name__}"
        ) from error


def typed(kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a stage as its constructor states their types; they may be a stranger's."""
    hints = {**get_type_hints(DiffusionStage.__init__), **get_type_hints(KINDS[kind].__init__)}
    for name, value in arguments.items():
        if value is None and type(None) not in get_args(hints.get(name)):
            raise TypeError(f"{name} is null")  # which jsonargparse lets pass
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(KINDS[kind], fail_untyped=False)
    return parser.parse_object(arguments).as_dict()


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def check_checkpoint(path: str | Path) -> None:
    """Refuse a file that Lightning could not go on from: torn, foreign, or more than numbers and tables."""
    checkpoint = load_safely(path, map_location="meta", mmap=True)
    needed = {"pytorch-lightning_version", "epoch", "global_step", "loops", "state_dict", "hyper_parameters"}
    missing = sorted(needed - set(checkpoint)) if isinstance(checkpoint, dict) else sorted(needed)
    if missing:
        raise InputError(f"{path} is not a checkpoint of a training: it holds no {missing[0]}")


def build_stage(kind: str, arguments: dict[str, Any], state: dict[str, torch.Tensor], source: str) -> DiffusionStage:
    """A frozen stage from its class name, its constructor's arguments and its weights."""
    arguments = {name: value for name, value in arguments.items() if not name.startswith("_")}
    try:
        stage = KINDS[kind](**typed(kind, arguments))
        stage.load_state_dict(state)
    except InputError:
        raise
    except Exception as error:  # whatever arguments of other types or sizes make torch and Python raise
        raise InputError(f"{source} does not fit {kind}: {type(error).__name__}: {first_line(error)}") from error
    nn.Module.requires_grad_(stage, False)
    return stage.eval()


def newest_checkpoint(folders: Iterable[Path], at_most: int | None = None) -> Path | None:
    """The whole checkpoint of most steps in `folders`, None where there is none; a torn one is passed over.

    at_most: steps it may have. Of equal steps, the one written last. A file is whole when torch can open it and it
    holds the state of a training; nothing is unpickled.
    """
    found = []
    for file in sorted(file for folder in folders for file in Path(folder).glob("*.ckpt")):
        try:
            state = load_safely(file, map_location="meta", mmap=True)
            step, _ = int(state["global_step"]), (state["state_dict"], state["optimizer_states"])
        except Exception as error:  # whatever a torn or foreign file makes torch raise
            rank_zero_warn(f"{file} is not a whole checkpoint and is passed over: {type(error).__name__}")
            continue
        if at_most is None or step <= at_most:
            found.append((step, file.stat().st_mtime_ns, file))
    return max(found)[2] if found else None
