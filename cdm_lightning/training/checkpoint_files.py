"""Checkpoint files: atomic writes, loading without unpickling, and a clean stop of all processes if a write fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.plugins.io import TorchCheckpointIO

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.stages.checkpoints import load_safely, write_checkpoint


class CheckpointWriteError(InputError):
    """A checkpoint could not be written. The message names the file and the reason."""


class Trainer(L.Trainer):
    """Lightning's trainer; all processes stop if a checkpoint cannot be written.

    They raise CheckpointWriteError together. With Lightning's own trainer, the others would wait for the process that
    failed.
    """

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        message = None
        try:
            super().save_checkpoint(*args, **kwargs)
        except CheckpointWriteError as error:
            message = str(error)
            self.strategy.barrier("Trainer.save_checkpoint")  # the other processes wait at it
        if (message := self.strategy.broadcast(message)) is not None:
            raise CheckpointWriteError(message)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written atomically: a file holds a complete checkpoint, even after a power cut.

    If the write fails, the old checkpoint stays as it was.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        try:
            write_checkpoint(checkpoint, Path(path))
        except InputError as error:
            raise CheckpointWriteError(str(error)) from error

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: Any = True) -> dict[str, Any]:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist: a checkpoint is expected")
        return load_safely(path, map_location=map_location)
