"""Checkpoints as files: written whole or not at all, and a trainer that stops all processes where one cannot write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.stages.loading import load_safely


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
