"""Recipe benchmark: images per second, FLOP/s and memory of the recipes on this device, and planned memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from cdm_lightning.planning.devices import (
    ASSUMED_SHARE,
    DATA_SHEETS,
    current_device,
    device_name,
    measure_rates,
    measured_share,
)
from cdm_lightning.planning.flops import training_flops
from cdm_lightning.planning.memory import AUTOCAST, SimulatedStep
from cdm_lightning.planning.recipe import Recipe, configurations, read_recipe
from cdm_lightning.planning.step_time import measure_step

BATCHES = {"base32": [16, 64, 256], "sr64": [8, 32, 128], "sr256": [2, 8, 16]}  # micro-batches on a GPU


def run(
    quick: bool = False, compile: bool = False, save: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Measure the paper's stages on a GPU, with micro-batches that grow until memory runs out; on a CPU the demo's.

    compile: then measure each stage compiled, at its largest micro-batch. save: called with what is found so far after
    each row. What the plan says is added at the end, since a large network takes long on paper.
    """
    device = current_device()
    large = device.type == "cuda" and not quick
    experiment, names = ("imagenet", tuple(BATCHES)) if large else ("fashion", ("base8", "sr16", "sr32"))
    precision = "bf16-mixed" if device.type == "cuda" else "32-true"
    rates = measure_rates(device, AUTOCAST.get(precision, torch.float32), 0.1 if quick else 1.0)
    found: dict[str, Any] = {"matmul": rates.matmul, "convolution": rates.convolution, "copy": copy_rate(device)}
    found["precision"] = precision
    sheet = next((sheet for name, sheet in DATA_SHEETS.items() if name in device_name(device)), None)
    found["data_sheet"] = sheet and sheet.rate(precision)
    recipes = {name: read_recipe(configurations(name, experiment)) for name in names[: 1 if quick else None]}
    for mode in ("None", "default") if compile else ("None",):
        for name, recipe in recipes.items():
            sizes = BATCHES[name] if large else [8] if quick else [64]
            rows = found.setdefault(name, {}).setdefault(mode, [])
            for batch in sizes if mode == "None" else [row["batch"] for row in found[name]["None"][-1:]]:
                try:
                    rows.append(measure(recipe, batch, precision, mode, device))
                except torch.OutOfMemoryError:
                    break
                print(f"{name}, {mode}: {rows[-1]}", flush=True)
                save(found)
    for name, recipe in recipes.items():
        simulated = SimulatedStep(recipe.stage("meta"), precision, recipe.average, device.type == "cuda")
        for row in (row for rows in found[name].values() for row in rows):
            row["memory_on_paper"] = simulated.memory(row["batch"]).total
            row["share"] = (sheet and measured_share(sheet.name, f"{experiment}/{name}")) or ASSUMED_SHARE
            save(found)
    return found


def measure(recipe: Recipe, batch: int, precision: str, mode: str, device: torch.device) -> dict[str, float]:
    """Images and FLOPs a second, and the peak memory, of one micro-batch."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    stage = recipe.stage(str(device))
    stage.compile_mode = None if mode == "None" else mode  # type: ignore[assignment]  # a mode of torch
    step_time = measure_step(stage, batch, precision, device, recipe.average, seconds=1.0)
    rate = step_time.images_a_second(batch, 1)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {"batch": batch, "images_a_second": rate, "flops": rate * training_flops(stage.unet), "memory": memory}


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy within the device's memory."""
    from torch.utils.benchmark import Timer

    size = 2**31 if device.type == "cuda" else 2**26
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    timer = Timer("target.copy_(source)", globals={"source": source, "target": target})
    return 2 * size / timer.blocked_autorange(min_run_time=0.2).median


def table(found: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = [
        f"training steps of the recipes, {found['precision']}; measured here: matmul {found['matmul'] / 1e9:,.0f} "
        f"GFLOP/s, 3x3 convolution {found['convolution'] / 1e9:,.0f}, copy {found['copy'] / 1e9:,.0f} GB/s",
        "",
        "| stage | compiled | micro-batch | images/s | planned | GFLOP/s | of matmul | of data sheet | GB | planned |",
        f"|{'---|' * 10}",
    ]
    for name, modes in found.items():
        for mode, rows in modes.items() if isinstance(modes, dict) else ():
            for row in rows:
                memory = f"{row['memory'] / 1e9:.1f}" if row["memory"] else "–"
                share = row["flops"] / found["data_sheet"] if found["data_sheet"] else None
                planned = f"{row['images_a_second'] * row['share'] / share:,.1f}" if share else "–"
                lines.append(
                    f"| {name} | {mode} | {row['batch']} | {row['images_a_second']:,.1f} | {planned} | "
                    f"{row['flops'] / 1e9:,.0f} | {row['flops'] / found['matmul']:.0%} | "
                    f"{f'{share:.1%}' if share else '–'} | {memory} | {row['memory_on_paper'] / 1e9:.2f} |"
                )
    return "\n".join(lines)
