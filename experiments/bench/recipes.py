"""Recipe benchmark: images per second, FLOP/s and memory of the recipes on this device, and planned memory."""

from __future__ import annotations

import gc
from typing import Any

import torch

from cdm_lightning.network import CompileMode
from cdm_lightning.planning.devices import current_device, measure_rates
from cdm_lightning.planning.flops import training_flops
from cdm_lightning.planning.memory import AUTOCAST, SimulatedStep
from cdm_lightning.planning.recipe import configurations, read_recipe
from cdm_lightning.planning.step_time import measure_step


def run(quick: bool = False, compile: bool = False) -> dict[str, Any]:
    """Measure the paper's stages on a GPU, with micro-batches that grow until memory runs out; on a CPU the demo's."""
    device = current_device()
    large = device.type == "cuda" and not quick
    experiment, names = ("imagenet", ("base32", "sr64", "sr256")) if large else ("fashion", ("base8", "sr16", "sr32"))
    modes: list[CompileMode | None] = [None, "default"] if compile else [None]
    precision = "bf16-mixed" if device.type == "cuda" else "32-true"
    rates = measure_rates(device, AUTOCAST.get(precision, torch.float32), 0.1 if quick else 1.0)
    found: dict[str, Any] = {"matmul": rates.matmul, "convolution": rates.convolution, "precision": precision}
    for name in names[: 1 if quick else None]:
        sizes = [2**power for power in range(10)] if large else [8] if quick else [64]
        found[name] = {
            str(mode): measure_batch_sizes(name, experiment, precision, sizes, mode, device) for mode in modes
        }
    return found


def measure_batch_sizes(
    name: str, experiment: str, precision: str, sizes: list[int], mode: CompileMode | None, device: torch.device
) -> list[dict[str, float]]:
    """One row per micro-batch size that fits into memory."""
    recipe, rows = read_recipe(configurations(name, experiment)), []
    simulated = SimulatedStep(recipe.stage("meta"), precision, recipe.average)
    for batch in sizes:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            stage = recipe.stage("cpu")
            if mode is not None:
                stage.unet.compile(mode=mode)
            step_time = measure_step(stage, batch, precision, device, recipe.average, seconds=2.0)
        except torch.OutOfMemoryError:
            break
        rate = step_time.images_a_second(batch, 1)
        rows.append(
            {
                "batch": batch, "images_a_second": rate, "flops": rate * training_flops(stage.unet),
                "memory": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
                "memory_on_paper": simulated.memory(batch).total,
            }
        )  # fmt: skip
    return rows


def table(found: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = [
        f"training steps of the recipes, {found['precision']}; measured here: matmul {found['matmul'] / 1e9:,.0f} "
        f"GFLOP/s, 3x3 convolution {found['convolution'] / 1e9:,.0f}",
        "",
        "| stage | compiled | micro-batch | images/s | GFLOP/s | share of matmul | peak memory, GB | planned, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, modes in found.items():
        for mode, rows in modes.items() if isinstance(modes, dict) else ():
            for row in rows:
                memory = f"{row['memory'] / 1e9:.1f}" if row["memory"] else "–"
                lines.append(
                    f"| {name} | {mode} | {row['batch']} | {row['images_a_second']:,.1f} | {row['flops'] / 1e9:,.0f} | "
                    f"{row['flops'] / found['matmul']:.0%} | {memory} | {row['memory_on_paper'] / 1e9:.2f} |"
                )
    return "\n".join(lines)
