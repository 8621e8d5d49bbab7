"""Resuming an interrupted training: checkpoints between two steps, saving on a signal, and the W&B run id."""

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
    """Lightning's ModelCheckpoint, which saves between two optimizer steps, so that a resumed run misses nothing.

    Lightning saves at the end of a batch, before a validation of that step and before its metrics are logged. A run
    that is killed there and resumed would miss both. This callback saves when the next batch starts. last.ckpt is
    always the newest checkpoint, and at the end holds the final step of the run.

    SIGTERM and SIGUSR1 (SLURM sends it before the time limit) end the run after the current step, even if only one
    process receives the signal: last.ckpt is saved, and all processes exit with code 128 + signal number.

    Args:
        dirpath: Folder of the checkpoints; null for <default_root_dir>/checkpoints.
        every_n_train_steps: Optimizer steps between two checkpoints.
        kwargs: Further arguments of ModelCheckpoint.
    """

    def __init__(self, dirpath: Path | None = None, *, every_n_train_steps: int = 5000, **kwargs: Any) -> None:
        if every_n_train_steps < 1:
            raise InputError(f"every_n_train_steps {every_n_train_steps} of the checkpoints is less than 1")
        for name in ("save_weights_only", "every_n_epochs", "train_time_interval", "save_on_train_epoch_end"):
            if kwargs.get(name):
                raise InputError(
                    f"{name} {kwargs[name]} of the checkpoints is refused: they are whole, and come every so many steps"
                )
        super().__init__(
            dirpath,
            every_n_train_steps=every_n_train_steps,
            save_last=True,
            enable_version_counter=False,  # one last.ckpt, always the newest
            **kwargs,
        )
        self.signal_number = 0  # the signal that this process received; 0: none
        self.step = 0  # the optimizer step at the last batch start

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.step, self.signal_number = trainer.global_step, 0
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:  # Lightning's handlers act within a step; it restores them at the end
                signal.signal(number, self.note_signal)

    def note_signal(self, number: int, frame: Any) -> None:
        self.signal_number = number

    def on_train_batch_end(self, *args: Any) -> None:
        """Do not save here, as Lightning would: the validation and the logs of this step come later."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            return  # no step since the last batch: a checkpoint would lose the gradients accumulated so far
        self.step = trainer.global_step
        super().on_train_batch_end(trainer, pl_module, None, None, 0)
        received = torch.tensor(self.signal_number, device=trainer.strategy.root_device)
        if number := int(trainer.strategy.reduce(received, reduce_op="max")):
            self.save_last_step(trainer)
            path, name = Path(self.dirpath or "") / "last.ckpt", signal.Signals(number).name
            rank_zero_info(f"{name}: saved {path} at step {self.step}; the same command goes on")
            raise SystemExit(128 + number)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save_last_step(trainer)  # first, so that starting the finished run again does nothing
        super().on_train_batch_end(trainer, pl_module, None, None, 0)

    def save_last_step(self, trainer: L.Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # untyped there
            trainer.save_checkpoint(Path(self.dirpath or "") / "last.ckpt")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the files of the state over, in today's folder: it may have been moved, or be that of another run."""

        def here(path: str) -> str:
            file = Path(self.dirpath or "") / Path(path).name
            return str(file) if path and file.is_file() else ""

        files = {
            name: here(state_dict.get(name, ""))
            for name in ("best_model_path", "kth_best_model_path", "last_model_path")
        }
        kept = {here(path): score for path, score in state_dict.get("best_k_models", {}).items() if here(path)}
        super().load_state_dict({**state_dict, **files, "best_k_models": kept, "dirpath": self.dirpath})

    def _should_remove_checkpoint(self, trainer: L.Trainer, previous: str, current: str) -> bool:
        """Also remove the file that this start resumed from; Lightning would keep it, which the unbroken run has not.

        Files outside of the folder stay.
        """
        return previous != current and Path(previous).parent == Path(self.dirpath or "")

    def on_load_checkpoint(self, trainer: Any, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find this callback's state, and convert Lightning's batch counts, if the configuration has changed.

        The state's name holds every_n_train_steps. Lightning takes an optimizer step when the batch count is a multiple
        of accumulate_grad_batches. With the old count, the first step could consist of fewer batches than the others.
        """
        states = checkpoint.get("callbacks", {})
        mine = [key for key in states if key.startswith(f"{type(self).__qualname__}{{")]
        if self.state_key not in states and len(mine) == 1:
            states[self.state_key] = states[mine[0]]
        data = checkpoint.get("ShardDataModule", {})
        before, now = data.get("accumulated"), trainer.accumulate_grad_batches
        if before in (None, now) or trainer.datamodule is None:
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            batches, unfinished = counts["processed"] // before * now, counts["processed"] - counts["completed"]
            counts |= {"ready": batches, "started": batches, "processed": batches, "completed": batches - unfinished}
        trainer.datamodule.batches_before = progress["total"]["processed"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the logs to disk, and set the loop counters to the values at the end of the last batch.

        Lightning's loops resume correctly only from the end of a batch. From the start of the next one, they would
        count and log a step twice if a validation lies between the two.
        """
        for logger in trainer.loggers:
            logger.save()
        loops = checkpoint["loops"]["fit_loop"]
        progress = loops["epoch_loop.batch_progress"]
        if trainer.validating or progress["total"]["completed"] < progress["total"]["processed"]:
            return  # another callback saves, at the end of a validation or of a batch: the counters are right
        if progress["total"]["ready"] > progress["total"]["processed"]:
            progress["is_last_batch"] = False  # it describes the next batch
        in_epoch = int(progress["current"]["processed"] > 0)  # 0 if a new epoch is about to begin
        for counts in (progress["total"], progress["current"]):
            counts["ready"] = counts["started"] = counts["processed"]
            counts["completed"] = counts["processed"] - in_epoch
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= in_epoch or validation_ended_epoch(
            trainer, progress["total"]["processed"]
        )


def validation_ended_epoch(trainer: Any, batches: int) -> bool:
    """Whether the last epoch ended with a validation; Lightning then counts one step more when it resumes.

    batches: how many batches the run has processed.
    """
    epochs = trainer.check_val_every_n_epoch
    if epochs is not None:
        return (trainer.current_epoch + 1) % epochs == 0
    return batches > 0 and bool(trainer.val_check_batch) and batches % trainer.val_check_batch == 0  # None: by time


def run_id(run: Path) -> str:
    """The W&B run id kept in a run's folder, created on first use: a resumed training continues the same W&B run."""
    file = Path(run) / "wandb-run-id.txt"
    if not file.is_file():
        write_atomically(file, uuid.uuid4().hex[:8].encode())
    return file.read_text().strip()
