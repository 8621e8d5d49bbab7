"""Scaling benchmark: how time grows with resolution, batch size, stages and images, compared with the FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from network import Size, fill_zero_layers, inputs, ours, saved_bytes, stopwatch
from sampling import stage_of

from cdm_lightning.cascade import CascadeModule
from cdm_lightning.network import UNet
from cdm_lightning.planning.flops import forward_flops
from cdm_lightning.stages import SuperResolutionStage

Curve = list[dict[str, float]]  # points with x, work in FLOPs, and seconds


def run(quick: bool = False) -> dict[str, Curve]:
    """Four curves: a training step over resolution and batch size, and sampling over stages and images."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rounds, large = (1, 1) if quick else (5, 16 if device.type == "cuda" else 1)
    sides = (16, 32) if quick else (16, 32, 64, 128)
    batches = (1, 2) if quick else tuple(n * large for n in (1, 2, 4, 8, 16, 32))
    return {
        "resolution": [training(Size(side, 32, 1, 2 * large), side, rounds, device) for side in sides],
        "batch": [training(Size(16, 32, 1, batch), batch, rounds, device) for batch in batches],
        "stages": [cascades(count, 8 * large, rounds, device) for count in (1, 2, 3)],
        "images": [images(count, 16, rounds, device) for count in ((16, 32) if quick else (16, 64, 256, 1024))],
    }


def training(size: Size, x: int, rounds: int, device: torch.device) -> dict[str, float]:
    """One point: a training step of a network of this size. x: its place on the axis."""
    contestant = ours(size, device)
    fill_zero_layers(contestant.network)
    assert isinstance(contestant.network, UNet)
    data = inputs(size, device)

    def step() -> None:
        contestant.call(*data).square().mean().backward()
        contestant.update()

    work = 3 * size.batch * forward_flops(contestant.network)
    return {"x": x, "work": work, "seconds": timed(step, rounds, device), "kept": saved_bytes(contestant, data, None)}


def cascades(count: int, batch: int, rounds: int, device: torch.device) -> dict[str, float]:
    """One point: sampling with the first `count` stages of 8, 16 and 32 pixels, 4 steps each."""
    small = dict(num_classes=10, channels=32, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[8])
    fixed = dict(variance="fixed_small", timesteps=1000, schedule="linear", sampling_steps=4)
    stages: list[Any] = [stage_of(Size(8, 32, 1), 4)]
    for side in (16, 32)[: count - 1]:
        stage = SuperResolutionStage(resolution=side, low_resolution=side // 2, augmentation="none", **small, **fixed)
        fill_zero_layers(stage.unet)
        stages.append(stage.eval().requires_grad_(False))
    cascade = CascadeModule.from_stages(stages).to(device)
    index = torch.arange(batch, device=device)
    work = sum(4 * batch * forward_flops(stage.unet) for stage in stages)
    return {"x": count, "work": work, "seconds": timed(lambda: cascade.sample(index % 10, index), rounds, device)}


def images(count: int, block: int, rounds: int, device: torch.device) -> dict[str, float]:
    """One point: sampling `count` images from one stage, in blocks."""
    cascade = CascadeModule.from_stages([stage_of(Size(8, 32, 1), 4)]).to(device)

    def draw() -> None:
        for first in range(0, count, block):
            index = torch.arange(first, first + block, device=device)
            cascade.sample(index % 10, index)

    return {
        "x": count,
        "work": 4 * count * forward_flops(cascade.stages[0].unet),
        "seconds": timed(draw, rounds, device),
    }


def timed(work: Callable[[], Any], rounds: int, device: torch.device) -> float:
    """Median seconds of a call, after one call to warm up."""
    work()
    seconds = []
    for _ in range(rounds):
        with stopwatch(device) as clock:
            work()
        seconds.append(clock[0])
    return median(seconds)


def table(found: dict[str, Curve]) -> str:
    """A Markdown table: how much work and time grow along each curve."""
    lines = ["| what grows | from → to | work grows | time grows |", "|---|---|---|---|"]
    for name, curve in found.items():
        first, last = curve[0], curve[-1]
        lines.append(
            f"| {name} | {first['x']} → {last['x']} | {last['work'] / first['work']:.1f} times | "
            f"{last['seconds'] / first['seconds']:.1f} times |"
        )
    return "\n".join(lines)


def draw(found: dict[str, Curve], path: Path) -> None:
    """Plot seconds over work on logarithmic axes. The dashed line is time proportional to work."""
    figure = Figure(figsize=(3 * len(found), 3.2), layout="constrained")
    for axes, (name, curve) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        work, seconds = ([point[key] for point in curve] for key in ("work", "seconds"))
        axes.loglog([w / 1e9 for w in work], seconds, "o-", markersize=3)
        proportional = [seconds[-1] * w / work[-1] for w in work]
        axes.loglog([w / 1e9 for w in work], proportional, "--", color="grey", linewidth=1)
        axes.set_title(f"{name}: {' '.join(str(point['x']) for point in curve)}", fontsize=8)
        axes.set_xlabel("GFLOP", fontsize=8)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
    figure.supylabel("seconds", fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")
