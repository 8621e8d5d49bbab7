"""`cdm plan`: what training a stage takes on a device, before anybody trains it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import write_atomically
from cdm_lightning.foundation.terminal import whole_console, whole_table
from cdm_lightning.planning.devices import current_device, data_sheet


def plan(
    stage: str | None = None,
    experiment: str = "imagenet",
    configs: list[Path] | None = None,
    arguments: str = "",
    device: str | None = None,
    devices: int = 1,
    micro_batch: int | None = None,
    precision: str | None = None,
    utilisation: float = 0.4,
    out: Path | None = None,
) -> None:
    """Parameters, FLOPs, memory, time, micro-batch and accumulation of a training, and the command that starts it.

    Memory is added up over a step without data. On the device at hand the step is timed; for a named one its speed is
    an assumption: a share of the data sheet's rate. Several devices are taken to be as fast as their sum. A recipe that
    compiles is timed so; its memory is that of the plain network.

    Args:
        stage: A file of the experiment, without .yaml: sr256. May come first, without its name.
        experiment: A folder of `experiments`.
        configs: Configurations instead of a stage's, as `cdm fit` takes them.
        arguments: Options of `cdm fit` that come after the configurations, in one string.
        device: H100, H200 or A100, by data sheet; null for the device at hand.
        devices: How many such devices share the batch.
        micro_batch: Images per device and pass; null for the most that fit.
        precision: 32-true, bf16-mixed or 16-mixed; null for the recipe's.
        utilisation: Share of the device's rate that a training is assumed to reach where it is not timed.
        out: A JSON file for the plan.
    """
    if (stage is None) == (configs is None):
        raise InputError("give one of a stage and configs: what is to be planned")
    if devices < 1:
        raise InputError(f"devices {devices} is less than 1")
    if not 0 < utilisation <= 1:
        raise InputError(f"utilisation {utilisation} lies outside 0 < share <= 1")
    from cdm_lightning.planning.estimate import made, start
    from cdm_lightning.planning.memory import AUTOCAST
    from cdm_lightning.planning.recipe import configurations, read_recipe

    precisions = ("32-true", *AUTOCAST)
    recipe = read_recipe(configurations(stage, experiment) if stage is not None else configs or [], arguments)
    changed = precision is not None and precision != recipe.precision
    recipe = replace(recipe, precision=precision or recipe.precision)
    if recipe.precision not in precisions:
        raise InputError(f"precision {recipe.precision!r} is none that a plan knows: {', '.join(precisions)}")
    if recipe.precision.startswith("16") and device is None and current_device().type == "cpu":
        raise InputError(f"precision {recipe.precision} needs a GPU: on a CPU, 32-true and bf16-mixed are there")
    share = shared(recipe.batch, devices, micro_batch)
    sheet = None if device is None else data_sheet(device)
    found = made(recipe, sheet, devices, share, micro_batch, utilisation)
    command = start(stage, experiment, configs, arguments, recipe, changed, found)
    found = {"stage": stage or ",".join(map(str, configs or [])), **found, "command": command}
    if out is not None:
        write_atomically(out, (json.dumps(found, indent=1) + "\n").encode())
    show(found)


def shared(batch: int, devices: int, micro_batch: int | None) -> int:
    """Images of the batch that fall on each device."""
    if batch % devices:
        raise InputError(f"batch_size {batch} cannot be shared by {devices} devices: it must be a multiple of them")
    share = batch // devices
    if micro_batch is not None and (micro_batch < 1 or share % micro_batch):
        raise InputError(f"micro_batch {micro_batch} does not divide the {share} images of batch_size on each device")
    return share


def show(found: dict[str, Any]) -> None:
    """Print a plan as a table. 1 GB is 10^9 bytes."""
    memory = {name: f"{size / 1e9:.3g}" for name, size in found["memory"].items()}
    parts = ", ".join(f"{name} {size}" for name, size in memory.items() if name != "total")
    table = whole_table(str(found["stage"]), "")
    rows = {
        "device": f"{found['devices']} x {found['device']}, {found['precision']}",
        "parameters": f"{found['parameters'] / 1e6:,.2f} M",
        "GFLOP an image": "{:,.4g} forward, {:,.4g} in training".format(
            *(found[name] / 1e9 for name in ("forward_flops", "training_flops"))
        ),
        "micro-batch": f"{found['micro_batch']} images, accumulated {found['accumulate']} times: "
        f"batch {found['batch']} on {found['devices']} device(s)",
        "memory": f"{memory['total']} of {found['capacity'] / 1e9:.1f} GB{'' if found['fits'] else ': DOES NOT FIT'}",
        "made up of": parts,
        "checkpointing": f"{'' if found['checkpointing'] else 'not '}needed: {found['memory_plain'] / 1e9:.3g} GB "
        f"without, {found['memory_checkpointing'] / 1e9:.3g} GB with it",
        "images a second": f"{found['images_a_second']:,.4g} ({found['speed']})",
        "whole training": f"{found['max_steps']:,} steps in {found['days']:,.4g} days: "
        f"{found['device_days']:,.4g} device-days",
    }
    if "matmul_rate" in found:
        rates = (f"{found[name] / 1e9:,.0f}" for name in ("matmul_rate", "convolution_rate"))
        rows["GFLOP/s here"] = "matrix product {}, 3x3 convolution {}".format(*rates)
    for name, value in rows.items():
        table.add_row(name, escape(value))
    console = whole_console()
    console.print(table)
    console.print(escape(found["command"] or "no micro-batch fits: another device, or fewer images per pass"))
