"""Non-finite losses and gradients in training: skip the step, return to a checkpoint once, then stop with an error."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn

from cdm_lightning.foundation.errors import InputError, TrainingFault
from cdm_lightning.stages.checkpoints import load_safely, newest_checkpoint

PINNED = "before_skipped_steps.ckpt"  # the checkpoint from before the skipped steps, kept until they are over


class FiniteSteps(Callback):
    """Skips and counts every optimizer step whose loss or gradient is not finite, on all processes alike.

    A skipped step does not change the weights, the averaged weights or Adam's state. `global_step`, the learning rate
    schedule and the position in the data advance as usual. The count is logged as `train/skipped_steps`, and the
    gradient norm before clipping as `train/grad_norm`. The counters are saved in checkpoints.

    After more than `max_skipped` skipped steps in a row, the weights, the averaged weights and Adam's state return to
    the newest complete checkpoint from before them. The step and the position in the data do not return: the random
    draws of an example depend only on its position, so the same examples would cause the same fault again. A run
    returns once, and saves a checkpoint at once that says so. The second time, or without such a checkpoint, the run
    stops with a TrainingFault.

    The processes need no communication. A non-finite loss gets a non-finite gradient, and this survives accumulation
    and DDP's sum over processes. After that sum all processes have the same gradients, and therefore the same norm.
    Reading the norm waits for the device, the only time in an ordinary optimizer step. The gradient scaler of 16-mixed
    skips such steps itself and lowers its scale; they are counted too.

    Every process needs the complete gradients: this works with DDP, not with sharded strategies.

    Args:
        max_skipped: How many steps in a row may be skipped.
    """

    def __init__(self, max_skipped: int = 10) -> None:
        if max_skipped < 0:
            raise InputError(f"max_skipped {max_skipped} must be at least 0")
        self.max_skipped = max_skipped
        self.skipped = self.in_a_row = 0
        self.last = 0  # global_step after the last skipped step
        self.must_save = False  # the return to a checkpoint is not saved yet
        self.rolled_back_at = 0  # global_step of the return to a checkpoint; 0: none yet

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        """Give a non-finite loss a non-finite gradient: x^2 can overflow when its derivative 2 x does not."""
        factor = 1 + 0 * loss.detach()  # exactly 1, or NaN
        loss.register_hook(lambda gradient: gradient * factor)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(p.grad for p in parameters)
        pl_module.meter.add({"grad_norm": norm[None]})
        if norm.isfinite():
            if self.in_a_row and trainer.is_global_zero:
                self.release_checkpoint(trainer)
            self.in_a_row = 0
        else:
            for parameter in parameters:
                parameter.grad = None  # with zeros, Adam would still change the weights
            if not self.in_a_row and trainer.is_global_zero:
                self.keep_checkpoint(trainer)
            self.skipped, self.in_a_row, self.last = self.skipped + 1, self.in_a_row + 1, trainer.global_step + 1
        pl_module.meter.latest["skipped_steps"] = self.skipped

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        if self.in_a_row <= self.max_skipped:
            return
        fault = (
            f"the loss or its gradient was not finite in {self.in_a_row} optimizer steps in a row, the last of them "
            f"step {trainer.global_step}, and max_skipped is {self.max_skipped}"
        )
        if self.rolled_back_at:
            raise TrainingFault(f"{fault}: the run went back to a checkpoint at step {self.rolled_back_at} already")
        before = self.last - self.in_a_row  # skipped steps change nothing, so later checkpoints are no help
        path = trainer.strategy.broadcast(
            newest_checkpoint(checkpoint_folders(trainer), before) if trainer.is_global_zero else None
        )
        if path is None:
            raise TrainingFault(f"{fault}: there is no checkpoint from before them to go back to")
        restore_weights(trainer, pl_module, load_safely(path))
        rank_zero_warn(f"{fault}: weights, averages and Adam's state return to {path}; steps and data go on")
        self.rolled_back_at, self.in_a_row, self.must_save = trainer.global_step, 0, True

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Save the return in last.ckpt; here, because a validation of the last step may come before this batch."""
        if self.must_save:
            self.must_save = False
            trainer.save_checkpoint(checkpoint_folders(trainer)[0] / "last.ckpt")
            if trainer.is_global_zero:
                self.release_checkpoint(trainer)

    def keep_checkpoint(self, trainer: L.Trainer) -> None:
        """Give the newest checkpoint a second name, PINNED; ModelCheckpoint deletes the first one at its next save."""
        for folder in checkpoint_folders(trainer):
            files = [file for file in folder.glob("*.ckpt") if file.name != PINNED]
            if files:
                newest, partial = max(files, key=lambda f: f.stat().st_mtime), folder / f"{PINNED}.partial"
                partial.unlink(missing_ok=True)
                try:
                    os.link(newest, partial)
                except OSError:  # the file system has no hard links
                    with suppress(OSError):
                        shutil.copy2(newest, partial)
                        partial.replace(folder / PINNED)
                    partial.unlink(missing_ok=True)
                else:
                    partial.replace(folder / PINNED)

    def release_checkpoint(self, trainer: L.Trainer) -> None:
        """Delete the second name, which is no longer needed."""
        for folder in checkpoint_folders(trainer):
            (folder / PINNED).unlink(missing_ok=True)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse to save non-finite weights; the last good checkpoint would be overwritten."""
        parts = [checkpoint.get(name) for name in ("state_dict", "current_model_state", "optimizer_states")]
        if not all(value.isfinite().all() for value in tensors(parts)):
            raise TrainingFault(
                f"weights, averages or Adam's state are not finite after step {trainer.global_step}: "
                "no checkpoint is written, and the previous one stays as it was"
            )

    def state_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("skipped", "in_a_row", "last", "rolled_back_at")}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)


def restore_weights(trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Load weights, averaged weights and optimizer state from a checkpoint; learning rates, steps and data stay."""
    pl_module.load_state_dict(checkpoint["state_dict"])
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # untyped there
        if isinstance(callback, WeightAveraging):  # state_dict held the averages; this loads the raw weights
            callback.on_load_checkpoint(trainer, pl_module, checkpoint)
    for optimizer, saved in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
        rates = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": saved["state"], "param_groups": rates})


def checkpoint_folders(trainer: L.Trainer) -> list[Path]:
    """The folders in which this run saves checkpoints."""
    savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return [Path(saver.dirpath) for saver in savers if saver.dirpath]


def tensors(nested: Any) -> list[torch.Tensor]:
    """Every floating-point tensor in nested dictionaries and lists."""
    if isinstance(nested, torch.Tensor):
        return [nested] if nested.is_floating_point() else []
    inner = nested.values() if isinstance(nested, dict) else nested if isinstance(nested, list) else ()
    return [tensor for part in inner for tensor in tensors(part)]
