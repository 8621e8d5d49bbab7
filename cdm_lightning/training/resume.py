"""Stop at any moment and go on: checkpoints between two steps, on a signal too, and one W&B run for all starts."""

from __future__ import annotations

import signal
import threading
import uuid
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import write_atomically

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

    def __init__(self, dirpath: Path | None = None, *, every_n_train_steps: int, **kwargs: Any) -> None:
        if every_n_train_steps < 1:
            raise InputError(f"every_n_train_steps {every_n_train_steps} of the checkpoints is less than 1")
        super().__init__(
            dirpath,
            every_n_train_steps=every_n_train_steps,
            save_last=True,
            enable_version_counter=False,  # one last.ckpt, always the newest
            **kwargs,
        )
        self.received = 0  # the signal this process was sent
        self.steps = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.steps, self.received = trainer.global_step, 0
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:  # Lightning's own handlers act in the middle of a step; it restores them at the end
                signal.signal(number, self.receive)

    def receive(self, number: int, frame: Any) -> None:
        self.received = number

    def on_train_batch_end(self, *args: Any) -> None:
        """Nothing: the step is not over yet."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.steps:
            return  # amid accumulated batches, whose gradients no checkpoint holds, or nothing done yet
        self.steps = trainer.global_step
        super().on_train_batch_end(trainer, pl_module, None, None, 0)
        told = torch.tensor(self.received, device=trainer.strategy.root_device)
        if number := int(trainer.strategy.reduce(told, reduce_op="max")):
            self.save_last_step(trainer)
            path, name = Path(self.dirpath or "") / "last.ckpt", signal.Signals(number).name
            rank_zero_info(f"{name}: saved {path} at step {self.steps}; the same command goes on")
            raise SystemExit(128 + number)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save_last_step(trainer)  # first: a finished run that is started again does nothing
        super().on_train_batch_end(trainer, pl_module, None, None, 0)

    def save_last_step(self, trainer: L.Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # untyped there
            trainer.save_checkpoint(Path(self.dirpath or "") / "last.ckpt")

    def on_load_checkpoint(self, trainer: Any, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Where other numbers of batches are accumulated than before, count the steps so far in batches of now.

        Lightning accumulates up to multiples of that number, so that the first step would be a part of one.
        """
        data = checkpoint.get("ShardDataModule", {})
        before, now = data.get("accumulated"), trainer.accumulate_grad_batches
        if before in (None, now) or trainer.datamodule is None:
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            batches, open_ = counts["processed"] // before * now, counts["processed"] - counts["completed"]
            counts |= {"ready": batches, "started": batches, "processed": batches, "completed": batches - open_}
        trainer.datamodule.batches_before = progress["total"]["processed"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Bring the logs on disk up to the checkpoint, and count as Lightning's own does, which saves a moment earlier.

        Its loops go on rightly from the end of a batch alone: from between two batches they would count, and log, a
        step twice where a validation was due.
        """
        for logger in trainer.loggers:
            logger.save()
        loops = checkpoint["loops"]["fit_loop"]
        progress = loops["epoch_loop.batch_progress"]
        if trainer.validating or progress["total"]["completed"] < progress["total"]["processed"]:
            return  # written by another callback, at the end of a validation or of a batch
        if progress["total"]["ready"] > progress["total"]["processed"]:
            progress["is_last_batch"] = False  # that was said of the batch to come
        begun = int(progress["current"]["processed"] > 0)  # 0 where a new pass is about to begin
        for counts in (progress["total"], progress["current"]):
            counts["ready"] = counts["started"] = counts["processed"]
            counts["completed"] = counts["processed"] - begun
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= begun or due(trainer, progress["total"]["processed"])


def due(trainer: Any, batches: int) -> bool:
    """Whether a validation was due as a pass ended: Lightning, going on at the next pass, counts one step more then."""
    epochs = trainer.check_val_every_n_epoch
    if epochs is not None:
        return (trainer.current_epoch + 1) % epochs == 0
    return batches > 0 and batches % trainer.val_check_batch == 0


def run_id(run: Path) -> str:
    """The W&B id of a run's folder, made when it is first asked for: taken up again, a run stays one run there."""
    file = Path(run) / "wandb-run-id.txt"
    if not file.is_file():
        write_atomically(file, uuid.uuid4().hex[:8].encode())
    return file.read_text().strip()
