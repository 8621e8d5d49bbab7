"""Adam as a stage uses it: fused, its learning rate rising at the start and falling at the end, gradients clipped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def adam(stage: Any, lr: float, warmup_steps: int, decay_fraction: float) -> dict[str, Any]:
    """Adam for a stage's network; its rate rises over warmup_steps and falls over the last decay_fraction of the run.

    The fused form reads and writes every number once. Beside a gradient scaler (16-mixed) it would take the unscaling
    upon itself, after the clipping.
    """
    optimizer = torch.optim.Adam(stage.unet.parameters(), lr=lr, fused=fuses(stage))
    total = stage.trainer.estimated_stepping_batches
    decay = max(1.0, decay_fraction * total)

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / (warmup_steps + 1))
        return rise * min(1.0, (total - step) / decay) if decay_fraction else rise

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fuses(stage: Any) -> bool:
    """Whether Adam is fused in this training."""
    return not str(stage.trainer.precision).startswith("16")


def clip(parameters: Iterable[torch.nn.Parameter], limit: float | None, algorithm: str | None) -> None:
    """Scale gradients to a total norm of `limit` at most, or clamp each of them (algorithm "value"); None and 0 do not.

    Lightning's own clipping refuses a fused optimizer under bf16-mixed, where nothing is scaled.
    """
    if not limit:
        return
    if algorithm == "value":
        torch.nn.utils.clip_grad_value_(parameters, limit)
    else:
        torch.nn.utils.clip_grad_norm_(parameters, limit)
