"""EMA: the exponential moving average of a stage's weights."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import WeightAveraging

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.training.finite_steps import FiniteSteps


class EMA(WeightAveraging):
    """Averaged weights: ema <- d ema + (1 - d) w after every optimizer step, d = min(decay, (1 + n) / (10 + n)).

    n counts the updates. A small d at the start lets the average forget the initial weights, so that short runs have
    good averages too. Validation, sample grids and the checkpoint's state_dict use the averaged weights.

    Args:
        decay: The largest d, 0 <= decay < 1.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"decay {decay} of the averaged weights lies outside 0 <= decay < 1")
        self.decay, self.skipped = decay, 0
        super().__init__(use_buffers=False, multi_avg_fn=self.average)

    def decay_after(self, updates: int) -> float:
        """d of the next update, after `updates` earlier ones."""
        return min(self.decay, (1 + updates) / (10 + updates))

    def average(self, averaged: Any, current: Any, updates: torch.Tensor | int) -> None:
        torch._foreach_lerp_(averaged, current, 1 - self.decay_after(int(updates)))

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to update: after every optimizer step that FiniteSteps did not skip. step_idx: its index, from 0."""
        return step_idx is not None and step_idx + 1 != self.skipped

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Average after the step unless FiniteSteps skipped it, and log the decay in force."""
        finite = next((callback for callback in trainer.callbacks if isinstance(callback, FiniteSteps)), None)  # type: ignore[attr-defined]  # untyped there
        self.skipped = finite.last if finite else 0
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # untyped there
        if every and trainer.global_step % every == 0:  # not at every step: this waits for the device
            assert self._average_model is not None
            updates = int(self._average_model.n_averaged)
            pl_module.meter.latest["ema_decay"] = self.decay_after(max(0, updates - 1))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the raw weights in the module, for last.ckpt; Lightning would overwrite them with the averages."""
