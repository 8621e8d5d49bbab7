"""Checkpoints as files: written whole or not at all, read without unpickling, and the trained stages in them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args, get_type_hints

import lightning.pytorch as L
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.stages.kinds import BaseStage, DiffusionStage, SuperResolutionStage

KINDS: dict[str, type[DiffusionStage]] = {kind.__name__: kind for kind in (BaseStage, SuperResolutionStage)}


class CannotWrite(InputError):
    """The process that writes checkpoints could not."""


class Trainer(L.Trainer):
    """Lightning's trainer, where a checkpoint that the first process cannot write stops all of them alike.

    Lightning would leave the others waiting for a process that is gone.
    """

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        failed = None
        try:
            super().save_checkpoint(*args, **kwargs)
        except CannotWrite as error:
            failed = str(error)
            self.strategy.barrier("Trainer.save_checkpoint")  # where the others are
        if (failed := self.strategy.broadcast(failed)) is not None:
            raise CannotWrite(failed)


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoint files, each holding all of a checkpoint or what it held before, whatever befalls the disk.

    A checkpoint is written to <name>.partial beside its final name, which is the same file system and needs no second
    copy in memory, reaches the disk, and is renamed. A write that fails is one sentence, and leaves nothing behind.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            raise CannotWrite(f"{path} could not be written: {reason(error)}") from error

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: Any = True) -> dict[str, Any]:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist: a checkpoint is expected")
        return load_safely(path, map_location=map_location)


def reason(error: BaseException) -> str:
    """What the operating system said, which torch's writer of archives wraps in an error of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]


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
