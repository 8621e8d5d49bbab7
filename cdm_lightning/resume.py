"""Stop at any moment and go on: checkpoints between two steps, on a signal too, and the newest one that is whole."""

from __future__ import annotations

import signal
import threading
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from cdm_lightning.shards import write_atomically

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint between two steps: all of the last one is done, none of the next is begun.

    Lightning saves in the middle of a batch's end, before the validation that is due and before its figures are logged;
    a run killed there and taken up again would miss both. Here the file is written when the next batch starts. The
    newest state is always in last.ckpt, that of the very last step too, whether or not the steps between checkpoints
    divide it. SIGTERM and SIGUSR1 (which SLURM sends ahead of time) end the run after the step in hand: all processes
    save last.ckpt and leave with exit code 128 + signal, be it that one of them alone was told.

    Args:
        dirpath: Folder of the checkpoints; null for <default_root_dir>/checkpoints.
        every_n_train_steps: Optimizer steps between two checkpoints.
        kwargs: What ModelCheckpoint takes.
    """

    def __init__(self, dirpath: Path | None = None, every_n_train_steps: int | None = None, **kwargs: Any) -> None:
        options = {"save_last": True, "enable_version_counter": False, **kwargs}  # one last.ckpt, always the newest
        super().__init__(dirpath, every_n_train_steps=every_n_train_steps, **options)
        self.received: int | None = None
        self.steps = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.steps, self.received = trainer.global_step, None
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:  # Lightning's own handlers act in the middle of a step; it restores them at the end
                signal.signal(number, self.receive)

    def receive(self, number: int, frame: Any) -> None:
        self.received = number

    def on_train_batch_end(self, *args: Any) -> None:
        """Nothing: the step is not over yet."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.steps:
            return  # amid accumulated batches, whose gradients no checkpoint holds, or nothing done yet
        self.steps = trainer.global_step
        super().on_train_batch_end(trainer, pl_module, None, batch, batch_idx)
        if trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            self.save_last_step(trainer)
            name = signal.Signals(self.received).name if self.received else "a signal to another process"
            rank_zero_info(f"{name}: saved {self.dirpath}/last.ckpt at step {self.steps}; the same command goes on")
            raise SystemExit(128 + (self.received or signal.SIGTERM))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_batch_end(trainer, pl_module, None, None, 0)
        self.save_last_step(trainer)

    def save_last_step(self, trainer: L.Trainer) -> None:
        if self.save_last and self.dirpath:
            trainer.save_checkpoint(Path(self.dirpath) / "last.ckpt")

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Bring the logs on disk up to the checkpoint, and count the batch that is only about to start as not there."""
        for logger in trainer.loggers:
            logger.save()
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            if counts["completed"] == counts["processed"]:
                counts["ready"] = counts["started"] = counts["completed"]


def newest_checkpoint(folders: Iterable[Path]) -> Path | None:
    """The complete checkpoint of most steps in `folders`, None where there is none; a torn one is passed over.

    Of equal steps, the one written last. A file is complete when torch reads it; nothing is unpickled.
    """
    files = sorted({file for folder in folders for file in Path(folder).glob("*.ckpt")}, key=lambda f: f.name)
    found = []
    for file in files:
        try:
            state = torch.load(file, map_location="meta", mmap=True, weights_only=True)
            found.append((int(state["global_step"]), file.stat().st_mtime_ns, file))
        except Exception as error:  # whatever a torn file makes torch raise
            rank_zero_warn(f"{file} is not a whole checkpoint and is passed over: {type(error).__name__}")
    return max(found)[2] if found else None


def run_id(run: Path) -> str:
    """The W&B id of a run's folder, made when it is first asked for: a run that is taken up again stays one run there."""
    file = Path(run) / "wandb-run-id.txt"
    if not file.is_file():
        write_atomically(file, uuid.uuid4().hex[:8].encode())
    return file.read_text().strip()
