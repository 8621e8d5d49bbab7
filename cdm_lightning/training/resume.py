"""Resuming an interrupted training: checkpoints between two steps, saving on a signal, and the W&B run id."""

from __future__ import annotations

import signal
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from cdm_lightning.foundation import stopping
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import write_atomically
from cdm_lightning.foundation.process_group import watch_over

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which saves between two optimizer steps, so that a resumed run misses nothing.

    Lightning saves at the end of a batch, before a validation of that step and before its metrics are logged. A run
    that is killed there and resumed would miss both. This callback saves when the next batch starts. last.ckpt is
    always the newest checkpoint, and at the end holds the final step of the run.

    SIGTERM, Ctrl-C and SIGUSR1 (SLURM sends it before the time limit) end the run at the next batch, even if only one
    process receives the signal, and even if the batch does not come: last.ckpt is saved as it was after the last
    optimizer step, and all processes exit with code 128 + signal number. A second Ctrl-C ends the run without saving.

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
        self.step = 0  # the optimizer step at the last batch start
        self.after_step: dict[str, Any] = {}  # what the batches accumulated since then have changed, as it was before

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)
        watch_over(trainer.strategy.launcher)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        stopping.pending = 0
        self.note_step(trainer, pl_module)
        stopping.handle(stopping.note_signal, *SIGNALS)  # Lightning's act within a step; it restores them at the end

    def on_train_batch_end(self, *args: Any) -> None:
        """Do not save here, as Lightning would: the validation and the logs of this step come later."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self.step:  # else a checkpoint would lose the gradients accumulated so far
            self.note_step(trainer, pl_module)
            super().on_train_batch_end(trainer, pl_module, None, None, 0)
        if number := self.agreed_signal(trainer):
            self.undo_batches(trainer, pl_module)
            self.save_last_step(trainer)
            path, name = Path(self.dirpath or "") / "last.ckpt", stopping.signal_name(number)
            rank_zero_info(f"{name}: saved {path} at step {self.step}; the same command goes on")
            raise stopping.Stopped(number, sentence="")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save if a signal came while the run waited for a batch: in the turn of on_train_batch_start."""
        if isinstance(exception, stopping.StoppedWaiting):
            with suppress(stopping.Stopped):
                self.on_train_batch_start(trainer, pl_module, None, 0)  # where the other processes are
            exception.sentence = ""
        stopping.pending = 0
        super().on_exception(trainer, pl_module, exception)

    def agreed_signal(self, trainer: L.Trainer) -> int:
        """The signal that any process of the run has received; 0 if none. All processes must call this."""
        if trainer.world_size == 1:
            return stopping.pending
        received = torch.tensor(stopping.pending, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(received, reduce_op="max"))

    def note_step(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Keep what the batches of the next step will change before it is taken."""
        self.step = trainer.global_step
        loop = trainer.fit_loop.epoch_loop  # type: ignore[attr-defined]  # untyped there
        counts = (loop.batch_progress, loop.automatic_optimization.optim_progress)
        self.after_step = {"counts": [(each, each.state_dict()) for each in counts]}
        if hasattr(pl_module, "meter"):
            self.after_step["sums"] = dict(pl_module.meter.sums)  # its tensors are replaced, never changed
        if (left_out := getattr(trainer.datamodule, "unsummed", None)) is not None:  # type: ignore[attr-defined]  # untyped
            self.after_step["unsummed"] = left_out.clone()

    def undo_batches(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Forget the batches accumulated since the last optimizer step: their gradients are in no checkpoint."""
        for counts, before in self.after_step["counts"]:
            counts.load_state_dict(before)
        trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = False  # type: ignore[attr-defined]  # it describes the next batch
        if "sums" in self.after_step:
            pl_module.meter.sums = self.after_step["sums"]
        if "unsummed" in self.after_step:
            trainer.datamodule.unsummed.copy_(self.after_step["unsummed"])  # type: ignore[attr-defined]  # untyped there

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        stopping.pending = 0
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
