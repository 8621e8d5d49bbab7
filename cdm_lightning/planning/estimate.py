"""What a training takes: the micro-batch that fits, its memory, FLOPs and time, and the command that starts it."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cdm_lightning.foundation.bars import Bar
from cdm_lightning.planning.devices import DataSheet, at_hand, device_name, measured_rates, memory_of
from cdm_lightning.planning.flops import forward_flops, training_flops
from cdm_lightning.planning.memory import AUTOCAST, Memory, StepOnPaper
from cdm_lightning.planning.recipe import Recipe, configurations
from cdm_lightning.planning.step_time import measured_step

MARGIN = 0.1  # of a device's memory left to what is not counted: the driver's context, fragmentation, validation
FLOOR = 4  # images of a micro-batch: below, a plan recomputes activations rather than accumulate that often
PATIENCE = 10.0  # seconds that a step may take to be worth timing; with one image, three times that


def made(
    recipe: Recipe, sheet: DataSheet | None, devices: int, share: int, micro_batch: int | None, utilisation: float
) -> dict[str, Any]:
    """The plan's figures: bytes, FLOPs, seconds."""
    here = at_hand()
    capacity = sheet.memory if sheet else memory_of(here)
    on_meta = recipe.stage("meta")
    paper = StepOnPaper(on_meta, recipe.precision, recipe.average)
    search = Search(paper, share, devices, (1 - MARGIN) * capacity)
    checkpointing = recipe.checkpointing
    batch = micro_batch or search.largest(checkpointing)
    small = micro_batch is None and batch < min(FLOOR, share)
    if not checkpointing and (small or not search.fits(batch, False)):
        checkpointing = True
        batch = micro_batch or search.largest(True)
    memory, other = search.memory(batch, checkpointing), search.memory(batch, not checkpointing)
    search.bar.close()
    unet = on_meta.unet
    figures: dict[str, Any] = {
        "device": sheet.name if sheet else device_name(here),
        "source": sheet.source if sheet else "the device at hand",
        "devices": devices,
        "precision": recipe.precision,
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "forward_flops": forward_flops(unet),
        "training_flops": training_flops(unet, checkpointing),
        "batch": recipe.batch,
        "max_steps": recipe.max_steps,
        "micro_batch": batch,
        "accumulate": share // batch,
        "checkpointing": checkpointing,
        "recipe_checkpoints": recipe.checkpointing,
        "fits": search.fits(batch, checkpointing),
        "capacity": capacity,
        "memory": {**asdict(memory), "total": memory.total},
        "memory_plain": (other if checkpointing else memory).total,
        "memory_checkpointing": (memory if checkpointing else other).total,
    }
    figures |= of_sheet(sheet, figures, utilisation) if sheet else of_here(here, recipe, figures, utilisation)
    rate = figures["images_a_second_a_device"] * devices
    days = recipe.batch * recipe.max_steps / rate / 86400
    return {**figures, "images_a_second": rate, "days": days, "device_days": days * devices}


class Search:
    """Memory by micro-batch, among the divisors of a device's share of the batch."""

    def __init__(self, paper: StepOnPaper, share: int, devices: int, limit: float) -> None:
        self.paper, self.share, self.devices, self.limit = paper, share, devices, limit
        self.known: dict[tuple[int, bool], Memory] = {}
        self.bar = Bar(desc="steps without data", unit=" steps", leave=False)

    def memory(self, batch: int, checkpointing: bool) -> Memory:
        if (batch, checkpointing) not in self.known:
            self.bar.update()
            self.known[batch, checkpointing] = self.paper.memory(batch, batch < self.share, self.devices, checkpointing)
        return self.known[batch, checkpointing]

    def fits(self, batch: int, checkpointing: bool) -> bool:
        return self.memory(batch, checkpointing).total <= self.limit

    def largest(self, checkpointing: bool) -> int:
        """The largest micro-batch that fits; 1 where not even one image does.

        Where it may lie is told from 1 and 4 images, on a line; whether it fits, by a step of that size.
        """
        sizes = [size for size in range(1, self.share + 1) if self.share % size == 0]
        one, few = self.memory(1, checkpointing), self.memory(min(4, self.share), checkpointing)
        slope = (few.total - one.total) / max(1, min(4, self.share) - 1)
        line = [one.total + slope * (size - 1) for size in sizes]  # too much if at all: small inputs keep more an image
        place = max(0, sum(total <= self.limit for total in line) - 1)
        if self.fits(sizes[place], checkpointing):
            likely = sum(total <= 1.5 * self.limit for total in line)
            while place + 1 < likely and self.fits(sizes[place + 1], checkpointing):
                place += 1
        else:
            while place and not self.fits(sizes[place], checkpointing):
                place -= 1
        return sizes[place]


def of_sheet(sheet: DataSheet, figures: dict[str, Any], utilisation: float) -> dict[str, Any]:
    """Speed of a device that is not there: an assumption."""
    rate = sheet.rate(figures["precision"])
    return {
        "speed": f"assumed: {utilisation:.0%} of {rate / 1e12:.1f} TFLOP/s ({sheet.source}), nothing was measured",
        "images_a_second_a_device": utilisation * rate / figures["training_flops"],
    }


def of_here(here: torch.device, recipe: Recipe, figures: dict[str, Any], utilisation: float) -> dict[str, Any]:
    """Speed of the device at hand: timed, unless a step of one image takes too long or does not fit."""
    rates = measured_rates(here, AUTOCAST.get(recipe.precision, torch.float32))
    measured = {"matmul_rate": rates.matmul, "convolution_rate": rates.convolution}
    flops, batch = figures["training_flops"], figures["micro_batch"]
    guess = flops / (utilisation * rates.convolution)  # seconds an image
    sizes = [n for n in range(1, batch + 1) if batch % n == 0 and n * guess <= (PATIENCE if n > 1 else 3 * PATIENCE)]
    if not figures["fits"] or not sizes:
        why = f"a step of one image would take {guess:.0f} s" if figures["fits"] else "it does not fit"
        said = f"assumed: {utilisation:.0%} of the convolution's rate; not timed, for {why}"
        return {**measured, "speed": said, "images_a_second_a_device": 1 / guess}
    stage = recipe.stage("cpu")
    took = measured_step(stage, sizes[-1], recipe.precision, here, recipe.average, figures["checkpointing"])
    compiled = "" if stage.compiled_as is None else f" compiled as {stage.compiled_as}"
    speed = took.images_a_second(batch, figures["accumulate"])
    reached = f"{speed * flops / rates.convolution:.0%} of the convolution's rate"
    return {
        **measured,
        "speed": f"timed{compiled} at {took.batch} images, {reached}; without reading images",
        "images_a_second_a_device": speed,
    }


def start(
    stage: str | None,
    experiment: str,
    configs: list[Path] | None,
    arguments: str,
    recipe: Recipe,
    changed: bool,
    found: dict[str, Any],
) -> str | None:
    """The command that trains as planned; None where the plan does not fit."""
    if not found["fits"]:
        return None
    options = [*([arguments] if arguments else []), f"--trainer.devices {found['devices']}"]
    options.append(f"--trainer.accumulate_grad_batches {found['accumulate']}")
    if changed:
        options.append(f"--trainer.precision {recipe.precision}")
    if found["checkpointing"] and not recipe.checkpointing:
        options.append("--model.checkpointing true")
    line = " ".join(options)
    if stage is not None and any(sign in line for sign in "\"'$`\\"):  # which make and the shell would read, too
        configs = configurations(stage, experiment)
    if configs is not None:
        return " ".join(["cdm fit", *(f"--config {shlex.quote(str(path))}" for path in configs or []), line])
    of = "" if experiment == "imagenet" else f"EXPERIMENT={experiment} "
    return f'make train-stage {of}STAGE={stage} ARGS="{line}"'
