"""The time of a real training step: forward, backward, and the update of weights and averages."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cdm_lightning.foundation.bars import Bar
from cdm_lightning.planning.memory import AUTOCAST, recomputing
from cdm_lightning.stages import DiffusionStage


@dataclass(frozen=True)
class StepTime:
    """Seconds of one micro-batch's forward and backward, and of an update; medians."""

    batch: int
    passes: float
    update: float

    def images_a_second(self, batch: int, accumulate: int) -> float:
        """Of one device, at another micro-batch: passes take as long per image, and `accumulate` of them one update."""
        return batch * accumulate / (accumulate * batch * self.passes / self.batch + self.update)


def measured_step(
    stage: DiffusionStage,
    batch: int,
    precision: str,
    device: torch.device,
    average: bool = True,
    checkpointing: bool = False,
    seconds: float = 4.0,
) -> StepTime:
    """Train on random images for about `seconds`, three steps at least, after two that are not counted.

    stage: with weights, on any device; it is trained. Reading images is no part of it.
    """
    stage = stage.to(device).train()
    stage.setup("fit")  # compiles, where the recipe says so
    averaged: list[torch.Tensor] = list(copy.deepcopy(stage.unet).parameters()) if average else []
    weights: list[torch.Tensor] = list(stage.unet.parameters())
    optimizer = torch.optim.Adam(weights, lr=stage.lr, fused=not precision.startswith("16"))
    size = (batch, stage.image_channels, stage.resolution, stage.resolution)
    image = torch.rand(size, device=device) * 2 - 1
    label = torch.arange(batch, device=device) % (stage.num_classes or 1)
    data, dtype = (image, label, torch.arange(batch, device=device)), AUTOCAST.get(precision)

    def passes() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = stage.training_step(data, 0)
        loss.backward()

    def update() -> None:
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        if bool(norm.isfinite()):  # FiniteSteps asks, and waits for the device, too
            optimizer.step()
        optimizer.zero_grad()
        if averaged:
            with torch.no_grad():
                torch._foreach_lerp_(averaged, weights, 0.001)

    times: list[tuple[float, float]] = []
    with recomputing(stage, checkpointing), Bar(desc="training steps", unit=" steps") as bar:
        start = 0.0
        while len(times) < 5 or time.perf_counter() - start < seconds:
            if len(times) == 2:  # with what compiles behind it
                start = time.perf_counter()
            times.append((clocked(passes, device), clocked(update, device)))
            bar.update()
    counted = times[2:]
    return StepTime(batch, *(statistics.median(part) for part in zip(*counted, strict=True)))


def clocked(work: Callable[[], None], device: torch.device) -> float:
    """Seconds until the device is done."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
