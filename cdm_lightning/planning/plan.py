"""`cdm plan`: the memory, time and command of a stage's training, before it starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import check_output_folder, write_atomically
from cdm_lightning.foundation.terminal import folding_table, table_console
from cdm_lightning.planning.devices import ASSUMED_SHARE, current_device, data_sheet, duration, measured_share


def plan(
    stage: str | None = None,
    experiment: str = "imagenet",
    configs: list[Path] | None = None,
    arguments: str = "",
    device: str | None = None,
    devices: int = 1,
    micro_batch: int | None = None,
    precision: str | None = None,
    utilisation: float | None = None,
    out: Path | None = None,
) -> None:
    """Parameters, FLOPs, memory, time, micro-batch and accumulation of a training, and the command that starts it.

    The FLOPs come first, and for a named device the time: its speed is assumed to be a share of the data sheet's rate.
    Memory comes from simulated steps without data, and on the device at hand a step is timed. n devices are assumed to
    be n times as fast as one. With torch.compile the compiled step is timed, and the memory is that of the network
    without it.

    Args:
        stage: A configuration of the experiment, without .yaml, such as sr256. `cdm plan sr256` works too.
        experiment: A folder of `experiments`.
        configs: Configuration files for `cdm fit`, instead of a stage.
        arguments: Further options of `cdm fit`, in one string.
        device: H100, H200, B200 or A100, by data sheet; null for the device at hand.
        devices: Number of devices that share the batch.
        micro_batch: Images per device and forward pass; null for the most that fit.
        precision: 32-true, bf16-mixed or 16-mixed; null for the recipe's.
        utilisation: Share of the device's rate that a training reaches if it is not timed; null for the recipe's in
            experiments/gpu/shares.yaml, which were measured, or else 0.4, which is assumed.
        out: A JSON file to write the plan to.
    """
    if (stage is None) == (configs is None):
        raise InputError("give one of a stage and configs: what is to be planned")
    if devices < 1:
        raise InputError(f"devices {devices} is less than 1")
    if utilisation is not None and not 0 < utilisation <= 1:
        raise InputError(f"utilisation {utilisation} lies outside 0 < share <= 1")
    if out is not None:
        check_output_folder(Path(out).parent)
    from cdm_lightning.planning.estimate import estimate, outlook, training_command
    from cdm_lightning.planning.memory import AUTOCAST
    from cdm_lightning.planning.recipe import configurations, read_recipe

    precisions = ("32-true", *AUTOCAST)
    recipe = read_recipe(configurations(stage, experiment) if stage is not None else configs or [], arguments)
    changed = precision is not None and precision != recipe.precision
    recipe = replace(recipe, precision=precision or recipe.precision)
    if recipe.precision not in precisions:
        raise InputError(f"precision {recipe.precision!r} is none that a plan knows: {', '.join(precisions)}")
    if recipe.precision.startswith("16") and device is None and current_device().type == "cpu":
        raise InputError(f"precision {recipe.precision} needs a GPU: a CPU takes 32-true and bf16-mixed")
    share = images_per_device(recipe.batch, devices, micro_batch)
    sheet = None if device is None else data_sheet(device)
    measured = None
    if utilisation is None and sheet is not None and recipe.precision in AUTOCAST:
        measured = measured_share(sheet.name, f"{experiment}/{stage}")
    reached = utilisation or measured or ASSUMED_SHARE
    print(f"{stage or 'configs'}: {outlook(recipe, sheet, devices, reached)}", flush=True)
    figures = estimate(recipe, sheet, devices, share, micro_batch, reached, measured is not None)
    command = training_command(stage, experiment, configs, arguments, recipe, changed, figures)
    figures = {"stage": stage or ",".join(map(str, configs or [])), **figures, "command": command}
    if out is not None:
        write_atomically(out, (json.dumps(figures, indent=1) + "\n").encode())
    print_plan(figures)


def images_per_device(batch: int, devices: int, micro_batch: int | None) -> int:
    """Images of the batch for each device. Refuses a batch or micro-batch that does not divide evenly."""
    if batch % devices:
        raise InputError(f"batch_size {batch} cannot be shared by {devices} devices: it must be a multiple of them")
    share = batch // devices
    if micro_batch is not None and (micro_batch < 1 or share % micro_batch):
        raise InputError(f"micro_batch {micro_batch} does not divide the {share} images of batch_size on each device")
    return share


def print_plan(figures: dict[str, Any]) -> None:
    """Print a plan as a table. 1 GB is 10^9 bytes."""
    memory = {name: f"{size / 1e9:.3g}" for name, size in figures["memory"].items()}
    parts = ", ".join(f"{name} {size}" for name, size in memory.items() if name != "total")
    table = folding_table(str(figures["stage"]), "")
    each = f", {duration(figures['device_days'])} of one device"
    rows = {
        "device": f"{figures['devices']} x {figures['device']}, {figures['precision']}",
        "parameters": f"{figures['parameters'] / 1e6:,.2f} M",
        "GFLOP an image": "{:,.4g} forward, {:,.4g} in training".format(
            *(figures[name] / 1e9 for name in ("forward_flops", "training_flops"))
        ),
        "micro-batch": f"{figures['micro_batch']} images, accumulated {figures['accumulate']} times: "
        f"batch {figures['batch']} on {figures['devices']} device(s)",
        "memory": f"{memory['total']} of {figures['capacity'] / 1e9:.1f} GB"
        f"{'' if figures['fits'] else ': DOES NOT FIT'}",
        "made up of": parts,
        "checkpointing": f"{'' if figures['checkpointing'] else 'not '}needed: {figures['memory_plain'] / 1e9:.3g} GB "
        f"without, {figures['memory_checkpointing'] / 1e9:.3g} GB with it",
        "images a second": f"{figures['images_a_second']:,.4g} ({figures['speed']})",
        "whole training": f"{figures['max_steps']:,} steps in {duration(figures['days'])}"
        f"{each if figures['devices'] > 1 else ''}",
    }
    if "matmul_rate" in figures:
        rates = (f"{figures[name] / 1e9:,.0f}" for name in ("matmul_rate", "convolution_rate"))
        rows["GFLOP/s here"] = "matrix product {}, 3x3 convolution {}".format(*rates)
    for name, value in rows.items():
        table.add_row(name, value)
    console = table_console()
    console.print(table)
    console.print(figures["command"] or "no micro-batch fits: another device, or fewer images per pass")
