"""What a training does about numbers that are not finite: skip the step, go back once, stop with what happened."""

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
from cdm_lightning.stages.loading import load_safely, newest_checkpoint

PINNED = "before_skipped_steps.ckpt"


class FiniteSteps(Callback):
    """Skips every optimizer step whose loss or gradient is not finite, on all processes alike, and counts it.

    A skipped step leaves the weights, Adam's moments and its step counts, and the averaged weights as they were; the
    place in the data, `global_step` and the learning rate's schedule go on. The running count is logged as
    `train/skipped_steps`, the gradient's norm before clipping as `train/grad_norm`, and all of it is saved.

    More than `max_skipped` in a row: weights, averaged weights and Adam's state go back to the newest whole checkpoint
    from before the first of them. Steps and data do not go back: every draw of an image is keyed by its place, so the
    same images from the same state would only repeat the fault. That happens once in a run, which a checkpoint written
    at once remembers; the next time, or where there is no such checkpoint, the run stops with a TrainingFault.

    No process asks another. A non-finite loss is made to have a non-finite gradient, which stays so through
    accumulation and DDP's sum over processes, after which all hold the same gradients and so the same norm. Reading
    that norm waits for the device once per optimizer step, as the averaged weights do anyway. The gradient scaler of
    16-mixed skips such steps by itself and lowers its scale; they are counted like the others.

    Args:
        max_skipped: Steps in a row that may be skipped. Whole gradients on every process are needed: DDP, not sharding.
    """

    def __init__(self, max_skipped: int = 10) -> None:
        if max_skipped < 0:
            raise InputError(f"max_skipped {max_skipped} must be at least 0")
        self.max_skipped = max_skipped
        self.skipped = self.in_a_row = 0
        self.last = 0  # global_step after the last step that was skipped
        self.owed = False  # a checkpoint that remembers the return
        self.rolled_back_at = 0  # global_step of the one return to a checkpoint

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        """Let a non-finite loss have a non-finite gradient: x^2 overflows where its derivative 2 x does not."""
        poison = 1 + 0 * loss.detach()  # exactly 1, or NaN
        loss.register_hook(lambda gradient: gradient * poison)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(p.grad for p in parameters)
        pl_module.meter.add({"grad_norm": norm[None]})
        if norm.isfinite():
            if self.in_a_row and trainer.is_global_zero:
                self.unpin(trainer)
            self.in_a_row = 0
        else:
            for parameter in parameters:
                parameter.grad = None  # zeros would still move Adam
            if not self.in_a_row and trainer.is_global_zero:
                self.pin(trainer)
            self.skipped, self.in_a_row, self.last = self.skipped + 1, self.in_a_row + 1, trainer.global_step + 1
        pl_module.meter.latest["skipped_steps"] = self.skipped

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        if self.in_a_row <= self.max_skipped:
            return
        happened = (
            f"the loss or its gradient was not finite in {self.in_a_row} optimizer steps in a row, the last of them "
            f"step {trainer.global_step}, and max_skipped is {self.max_skipped}"
        )
        if self.rolled_back_at:
            raise TrainingFault(f"{happened}: the run went back to a checkpoint at step {self.rolled_back_at} already")
        before = self.last - self.in_a_row  # a checkpoint written since then holds the same weights
        path = trainer.strategy.broadcast(
            newest_checkpoint(folders(trainer), before) if trainer.is_global_zero else None
        )
        if path is None:
            raise TrainingFault(f"{happened}: there is no checkpoint from before them to go back to")
        go_back(trainer, pl_module, load_safely(path))
        rank_zero_warn(f"{happened}: weights, averages and Adam's state go back to {path}, steps and data go on")
        self.rolled_back_at, self.in_a_row, self.owed = trainer.global_step, 0, True

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """After a return, a checkpoint that remembers it; not before the validation that may be due (resume.py)."""
        if self.owed:
            self.owed = False
            trainer.save_checkpoint(folders(trainer)[0] / "last.ckpt")
            if trainer.is_global_zero:
                self.unpin(trainer)

    def pin(self, trainer: L.Trainer) -> None:
        """Give the newest checkpoint a second name, since ModelCheckpoint deletes it when it writes the next."""
        for folder in folders(trainer):
            files = [file for file in folder.glob("*.ckpt") if file.name != PINNED]
            if files:
                newest, partial = max(files, key=lambda f: f.stat().st_mtime), folder / f"{PINNED}.partial"
                partial.unlink(missing_ok=True)
                try:
                    os.link(newest, partial)
                except OSError:  # a file system without links
                    with suppress(OSError):
                        shutil.copy2(newest, partial)
                        partial.replace(folder / PINNED)
                    partial.unlink(missing_ok=True)
                else:
                    partial.replace(folder / PINNED)

    def unpin(self, trainer: L.Trainer) -> None:
        for folder in folders(trainer):
            (folder / PINNED).unlink(missing_ok=True)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse to write weights that are not finite over ones that are."""
        parts = [checkpoint.get(name) for name in ("state_dict", "current_model_state", "optimizer_states")]
        if not all(value.isfinite().all() for value in tensors(parts)):
            raise TrainingFault(
                f"weights, averages or Adam's state are not finite after step {trainer.global_step}: "
                "no checkpoint is written, and the one before is as it was"
            )

    def state_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("skipped", "in_a_row", "last", "rolled_back_at")}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)


def go_back(trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Weights, averaged weights and optimizer state as in a checkpoint, in place; rates, steps and data as they are."""
    pl_module.load_state_dict(checkpoint["state_dict"])
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # untyped there
        if isinstance(callback, WeightAveraging):  # its checkpoints hold the averages there, and the weights elsewhere
            callback.on_load_checkpoint(trainer, pl_module, checkpoint)
    for optimizer, saved in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
        rates = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": saved["state"], "param_groups": rates})


def folders(trainer: L.Trainer) -> list[Path]:
    """Where this run's checkpoints are."""
    savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return [Path(saver.dirpath) for saver in savers if saver.dirpath]


def tensors(nested: Any) -> list[torch.Tensor]:
    """Every floating-point tensor in nested dictionaries and lists."""
    if isinstance(nested, torch.Tensor):
        return [nested] if nested.is_floating_point() else []
    inner = nested.values() if isinstance(nested, dict) else nested if isinstance(nested, list) else ()
    return [tensor for part in inner for tensor in tensors(part)]
