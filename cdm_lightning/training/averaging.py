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
        self.updates = 0  # n; also in the averages' buffer n_averaged, which is on the device and would have to be read
        super().__init__(use_buffers=False)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.updates = 0  # the averages of this run are new

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if self._average_model is not None:
            self.updates = int(self._average_model.n_averaged)

    def decay_after(self, updates: int) -> float:
        """d of the next update, after `updates` earlier ones."""
        return min(self.decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def update(self, pl_module: L.LightningModule) -> None:
        """Average once: the first time the weights as they are. Unlike torch's own update, this reads no tensor."""
        averages: Any = self._average_model
        new = 1 - self.decay_after(self.updates) if self.updates else 1.0
        torch._foreach_lerp_([*averages.module.parameters()], [*pl_module.parameters()], new)
        averages.n_averaged += 1
        self.updates += 1

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Average after every optimizer step that FiniteSteps did not skip, and log the decay in force."""
        finite = next((callback for callback in trainer.callbacks if isinstance(callback, FiniteSteps)), None)  # type: ignore[attr-defined]  # untyped there
        self.skipped = finite.last if finite else 0
        if trainer.global_step > self._latest_update_step and trainer.global_step != self.skipped:
            self.update(pl_module)
            self._latest_update_step = trainer.global_step
        pl_module.meter.latest["ema_decay"] = self.decay_after(max(0, self.updates - 1))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the raw weights in the module, for last.ckpt; Lightning would overwrite them with the averages."""
