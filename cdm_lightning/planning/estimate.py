"""The estimate of a training: the micro-batch that fits, memory, FLOPs and time, and the command that starts it."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cdm_lightning.foundation.progress_bar import ProgressBar
from cdm_lightning.planning.devices import (
    DataSheet,
    available_memory,
    current_device,
    device_name,
    duration,
    measure_rates,
)
from cdm_lightning.planning.flops import forward_flops, training_flops
from cdm_lightning.planning.memory import AUTOCAST, Memory, SimulatedStep
from cdm_lightning.planning.recipe import Recipe, configurations
from cdm_lightning.planning.step_time import measure_step

MARGIN = 0.1  # share of the memory reserved for what is not counted: CUDA context, fragmentation, validation
MIN_MICRO_BATCH = 4  # with fewer images than this, the plan recomputes activations instead
MAX_STEP_SECONDS = 10.0  # longest step that is timed; three times this for a step of one image


def outlook(recipe: Recipe, sheet: DataSheet | None, devices: int, utilisation: float) -> str:
    """What is known at once, without memory: parameters, FLOPs, and the time by a device's data sheet."""
    unet = recipe.stage("meta").unet
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    counted = f"{parameters / 1e6:,.2f} M parameters, {forward_flops(unet) / 1e9:,.4g} GFLOP an image"
    if sheet is None:
        return counted
    rate = devices * utilisation * sheet.rate(recipe.precision)
    plain, recomputed = (
        duration(recipe.batch * recipe.max_steps * training_flops(unet, checkpointing) / rate / 86400)
        for checkpointing in (False, True)
    )
    return (
        f"{counted}; {recipe.max_steps:,} steps of {recipe.batch:,} images in {plain} on {devices} x {sheet.name} at "
        f"{utilisation:.0%} of its data sheet, or {recomputed} with checkpointing, if memory asks for it"
    )


def estimate(
    recipe: Recipe,
    sheet: DataSheet | None,
    devices: int,
    share: int,
    micro_batch: int | None,
    utilisation: float,
    measured: bool = False,
) -> dict[str, Any]:
    """All figures of a plan: bytes, FLOPs, seconds.

    sheet: a device by data sheet, or None for this machine's. share: images of a batch per device. utilisation: share
    of the rate that is reached where no step is timed; measured: whether such a device reached it.
    """
    here = current_device()
    capacity = sheet.memory if sheet else available_memory(here)
    meta_stage = recipe.stage("meta")
    bar = ProgressBar(
        desc="memory, by steps without data", unit=" steps", leave=False, line_format="{desc}: {n_fmt} done"
    )
    gpu = sheet is not None or here.type == "cuda"
    simulated = SimulatedStep(meta_stage, recipe.precision, recipe.average, gpu, bar.update)
    search = MicroBatchSearch(simulated, share, devices, (1 - MARGIN) * capacity)
    checkpointing = recipe.checkpointing
    batch = micro_batch or search.largest(checkpointing)
    small = micro_batch is None and batch < min(MIN_MICRO_BATCH, share)
    if not checkpointing and (small or not search.fits(batch, False)):
        checkpointing = True
        batch = micro_batch or search.largest(True)
    memory, other = search.memory(batch, checkpointing), search.memory(batch, not checkpointing)
    bar.close()
    unet = meta_stage.unet
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
    figures |= (
        speed_on_paper(sheet, figures, utilisation, measured)
        if sheet
        else measured_speed(here, recipe, figures, utilisation)
    )
    rate = figures["images_a_second_a_device"] * devices
    days = recipe.batch * recipe.max_steps / rate / 86400
    return {**figures, "images_a_second": rate, "days": days, "device_days": days * devices}


class MicroBatchSearch:
    """Finds the largest micro-batch that fits, among the divisors of a device's share of the batch.

    limit: bytes of memory.
    """

    def __init__(self, simulated: SimulatedStep, share: int, devices: int, limit: float) -> None:
        self.simulated, self.share, self.devices, self.limit = simulated, share, devices, limit

    def memory(self, batch: int, checkpointing: bool) -> Memory:
        """The memory of a step with micro-batches of `batch` images."""
        return self.simulated.memory(batch, batch < self.share, self.devices, checkpointing)

    def fits(self, batch: int, checkpointing: bool) -> bool:
        """Whether a micro-batch of `batch` images fits."""
        return self.memory(batch, checkpointing).total <= self.limit

    def largest(self, checkpointing: bool) -> int:
        """The largest micro-batch that fits; 1 if not even one image fits.

        The whole share is tried last: without accumulation its step is another one, and has to be simulated anew.
        """
        sizes = [size for size in range(1, self.share) if self.share % size == 0]
        fitting = next((size for size in reversed(sizes) if self.fits(size, checkpointing)), 1)
        whole = not sizes or fitting == sizes[-1]
        return self.share if whole and self.fits(self.share, checkpointing) else fitting


def speed_on_paper(sheet: DataSheet, figures: dict[str, Any], utilisation: float, measured: bool) -> dict[str, Any]:
    """The speed of a device that is not at hand: `utilisation`, measured or assumed, of its data sheet's rate."""
    rate = sheet.rate(figures["precision"])
    told, basis = "assumed", "nothing was measured"
    if measured:
        told, basis = "expected", "as with the micro-batch in experiments/gpu/shares.yaml; smaller ones reach less"
    return {
        "speed": f"{told}: {utilisation:.0%} of {rate / 1e12:.1f} TFLOP/s ({sheet.source}), {basis}",
        "images_a_second_a_device": utilisation * rate / figures["training_flops"],
    }


def measured_speed(here: torch.device, recipe: Recipe, figures: dict[str, Any], utilisation: float) -> dict[str, Any]:
    """The speed of the device at hand: timed, unless a step of one image takes too long or does not fit."""
    rates = measure_rates(here, AUTOCAST.get(recipe.precision, torch.float32))
    measured = {"matmul_rate": rates.matmul, "convolution_rate": rates.convolution}
    flops, batch = figures["training_flops"], figures["micro_batch"]
    guess = flops / (utilisation * rates.convolution)  # seconds per image
    sizes = [
        n
        for n in range(1, batch + 1)
        if batch % n == 0 and n * guess <= (MAX_STEP_SECONDS if n > 1 else 3 * MAX_STEP_SECONDS)
    ]
    if not figures["fits"] or not sizes:
        why = f"a step of one image would take {guess:.0f} s" if figures["fits"] else "it does not fit"
        speed = f"assumed: {utilisation:.0%} of the convolution's rate; not timed, for {why}"
        return {**measured, "speed": speed, "images_a_second_a_device": 1 / guess}
    stage = recipe.stage("cpu")
    step = measure_step(stage, sizes[-1], recipe.precision, here, recipe.average, figures["checkpointing"])
    compiled = "" if stage.compile_mode is None else f" compiled as {stage.compile_mode}"
    rate = step.images_a_second(batch, figures["accumulate"])
    reached = f"{rate * flops / rates.convolution:.0%} of the convolution's rate"
    return {
        **measured,
        "speed": f"timed{compiled} at {step.batch} images, {reached}; without reading images",
        "images_a_second_a_device": rate,
    }


def training_command(
    stage: str | None,
    experiment: str,
    configs: list[Path] | None,
    arguments: str,
    recipe: Recipe,
    changed: bool,
    figures: dict[str, Any],
) -> str | None:
    """The command that starts the planned training; None if the plan does not fit.

    arguments: further options of `cdm fit`. changed: whether the plan's precision differs from the recipe's.
    """
    if not figures["fits"]:
        return None
    options = [*([arguments] if arguments else []), f"--trainer.devices {figures['devices']}"]
    options.append(f"--trainer.accumulate_grad_batches {figures['accumulate']}")
    if changed:
        options.append(f"--trainer.precision {recipe.precision}")
    if figures["checkpointing"] and not recipe.checkpointing:
        options.append("--model.checkpointing true")
    line = " ".join(options)
    if stage is not None and any(sign in line for sign in "\"'$`\\"):  # make and its shell would interpret these
        configs = configurations(stage, experiment)
    if configs is not None:
        return " ".join(["cdm fit", *(f"--config {shlex.quote(str(path))}" for path in configs or []), line])
    variable = "" if experiment == "imagenet" else f"EXPERIMENT={experiment} "
    return f'make train-stage {variable}STAGE={stage} ARGS="{line}"'
