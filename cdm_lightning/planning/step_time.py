"""The measured time of a training step: forward, backward, and the update of the weights and their EMA."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cdm_lightning.foundation.progress_bar import ProgressBar
from cdm_lightning.planning.memory import AUTOCAST, checkpointing_set_to
from cdm_lightning.stages import DiffusionStage


@dataclass(frozen=True)
class StepTime:
    """Median seconds of the forward and backward pass of a micro-batch of `batch` images, and of an update."""

    batch: int
    forward_backward: float
    update: float

    def images_a_second(self, batch: int, accumulate: int) -> float:
        """Images per second of a device, at micro-batches of `batch` images and an update per `accumulate` of them."""
        return batch * accumulate / (accumulate * batch * self.forward_backward / self.batch + self.update)


def measure_step(
    stage: DiffusionStage,
    batch: int,
    precision: str,
    device: torch.device,
    average: bool = True,
    checkpointing: bool = False,
    seconds: float = 4.0,
) -> StepTime:
    """Time training steps on random images for about `seconds`, at least three, after two that are not counted.

    stage: with weights, on any device; this trains it. Reading images from disk is not included.
    """
    stage = stage.to(device).train()
    stage.setup("fit")  # compiles the network if the recipe says so
    averaged: list[torch.Tensor] = list(copy.deepcopy(stage.unet).parameters()) if average else []
    weights: list[torch.Tensor] = list(stage.unet.parameters())
    optimizer = torch.optim.Adam(weights, lr=stage.lr, fused=not precision.startswith("16"))
    size = (batch, stage.image_channels, stage.resolution, stage.resolution)
    image = torch.rand(size, device=device) * 2 - 1
    label = torch.arange(batch, device=device) % (stage.num_classes or 1)
    data, dtype = (image, label, torch.arange(batch, device=device)), AUTOCAST.get(precision)

    def forward_backward() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = stage.training_step(data, 0)
        loss.backward()

    def update() -> None:
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        if bool(norm.isfinite()):  # as FiniteSteps does; this waits for the device
            optimizer.step()
        optimizer.zero_grad()
        if averaged:
            with torch.no_grad():
                torch._foreach_lerp_(averaged, weights, 0.001)

    times: list[tuple[float, float]] = []
    with checkpointing_set_to(stage, checkpointing), ProgressBar(desc="training steps", unit=" steps") as bar:
        start = 0.0
        while len(times) < 5 or time.perf_counter() - start < seconds:
            if len(times) == 2:  # compilation is done by now
                start = time.perf_counter()
            times.append((seconds_of(forward_backward, device), seconds_of(update, device)))
            bar.update()
    counted = times[2:]
    return StepTime(batch, *(statistics.median(part) for part in zip(*counted, strict=True)))


def seconds_of(work: Callable[[], None], device: torch.device) -> float:
    """Seconds until the device has finished the work."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
