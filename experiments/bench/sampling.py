"""Sampling benchmark: the overhead of the sampling loop over its network calls, and diffusers' pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from network import Contestant, Size, diffusers, fill_zero_layers, stopwatch

from cdm_lightning.cascade import CascadeModule
from cdm_lightning.foundation.randomness import KeyedStreams
from cdm_lightning.stages import BaseStage, SuperResolutionStage

BUNDLE = Path(__file__).parents[2] / "data/fashion-cascade"


def run(
    quick: bool = False, rounds: int | None = None, save: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Measure the stages of the shipped cascade, and a larger network that is compared with diffusers' pipeline.

    On a GPU then as CUDA graphs too, which takes minutes to compile. save: called with what is found so far.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rounds, batch, steps = rounds or (1 if quick else 7), 4 if quick else 64, 4 if quick else 20
    cascade = CascadeModule(BUNDLE).to(device)
    cascade.set_levels([0] * (len(cascade.stages) - 1), False)
    cascade.set_sampler(None, [steps] * len(cascade.stages))
    size = Size(16, 32, 1, 2) if quick else Size(batch=64 if device.type == "cuda" else 16)
    large = stage_of(size, steps=3 if quick else 5).to(device)
    loops = {stage.name: loop(stage, batch, device, rounds) for stage in cascade.stages}
    loops[f"{size.channels} channels at {size.resolution}"] = loop(large, size.batch, device, rounds)
    sizes = (2, 4) if quick else (16, 64, 256)
    batches = {stage.name: by_batch(stage, sizes, device, rounds) for stage in cascade.stages}
    peers = beside_diffusers(large, size, device, rounds)
    found = {"batch": batch, "rounds": rounds, "loops": loops, "batches": batches, "pipeline": peers}
    if device.type == "cuda" and not quick:
        for stage in cascade.stages:
            save(found)
            stage.unet.compile(mode="reduce-overhead")
            loops[f"{stage.name}, CUDA graphs"] = loop(stage, batch, device, rounds)
            print(f"{stage.name}, CUDA graphs: {loops[f'{stage.name}, CUDA graphs']}", flush=True)
    return found


def stage_of(size: Size, steps: int) -> BaseStage:
    """A base stage of this size that samples with ddpm."""
    stage = BaseStage(
        resolution=size.resolution, num_classes=10, channels=size.channels, num_res_blocks=size.blocks,
        variance="fixed_small", timesteps=1000, schedule="linear", sampling_steps=steps,
    )  # fmt: skip
    fill_zero_layers(stage.unet)
    return stage.eval().requires_grad_(False)


def sampler(stage: BaseStage | SuperResolutionStage, batch: int, device: torch.device) -> Callable[[], torch.Tensor]:
    """A function that draws one batch from the stage."""
    label = torch.arange(batch, device=device) % (stage.num_classes or 1)
    if isinstance(stage, SuperResolutionStage):
        small = torch.zeros(batch, stage.image_channels, stage.low_resolution, stage.low_resolution, device=device)
        return lambda: stage.sample(label, small, 0, 0, KeyedStreams(range(batch), device, "bench"))
    return lambda: stage.sample(label, 0, KeyedStreams(range(batch), device, "bench"))


def loop(stage: Any, batch: int, device: torch.device, rounds: int) -> dict[str, float]:
    """Milliseconds per step of the sampler, and of its network calls alone with the same inputs."""
    draw, calls = sampler(stage, batch, device), []
    hook = stage.unet.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    draw()
    hook.remove()
    pairs = []
    for number in range(rounds + 1):
        with stopwatch(device) as whole:
            draw()
        with torch.no_grad(), stopwatch(device) as bare:
            for args, kwargs in calls:
                stage.unet(*args, **kwargs)
        pairs += [(whole[0], bare[0])] if number else []
    per_step = [1e3 * median(part) / len(calls) for part in zip(*pairs, strict=True)]
    return {"sampler_ms": per_step[0], "network_ms": per_step[1], "overhead": median(w / b for w, b in pairs) - 1}


def by_batch(stage: Any, sizes: tuple[int, ...], device: torch.device, rounds: int) -> dict[int, float]:
    """Images per second of one network call, by batch size."""
    calls = {}
    for size in sizes:
        shape = (size, stage.image_channels, stage.resolution, stage.resolution)
        large = torch.randn(shape, device=device) if isinstance(stage, SuperResolutionStage) else None
        level = torch.zeros(size, device=device)
        predict = stage.predictor(torch.zeros(size, dtype=torch.int64, device=device), large, level)
        x, t = torch.randn(shape, device=device), torch.full((size,), 500.0, device=device)
        calls[size] = lambda predict=predict, x=x, t=t: predict(x, t)
    found: dict[int, list[float]] = {size: [] for size in sizes}
    for number in range(rounds + 1):
        for size, call in calls.items():
            with torch.no_grad(), stopwatch(device) as seconds:
                call()
            found[size] += [size / seconds[0]] if number else []
    return {size: median(rates) for size, rates in found.items()}


def beside_diffusers(stage: BaseStage, size: Size, device: torch.device, rounds: int) -> dict[str, float]:
    """Images per second of our sampler and of DDPMPipeline, with equal networks and numbers of steps."""
    steps = stage.diffusion.sampling_steps or 1
    peer: Contestant = diffusers(size, device)
    assert isinstance(peer.network, UNet2DModel)
    unconditional = UNet2DModel.from_config({**peer.network.config, "num_class_embeds": None, "out_channels": 3})
    fill_zero_layers(unconditional)
    pipeline = DDPMPipeline(unconditional.to(device), DDPMScheduler(timestep_spacing="linspace"))
    pipeline.set_progress_bar_config(disable=True)
    draw, generator, pairs = sampler(stage, size.batch, device), torch.Generator(device).manual_seed(0), []
    for number in range(rounds + 1):
        with stopwatch(device) as mine:
            draw()
        with stopwatch(device) as theirs:
            pipeline(size.batch, generator, steps, output_type="np")
        pairs += [(mine[0], theirs[0])] if number else []
    mine_s, theirs_s = (median(part) for part in zip(*pairs, strict=True))
    return {
        "batch": size.batch, "steps": steps, "ours": size.batch / mine_s, "diffusers": size.batch / theirs_s,
        "ours_faster": median(theirs / mine for mine, theirs in pairs),
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """The results as Markdown tables."""
    peers = found["pipeline"]
    lines = [
        f"sampling in batches of {found['batch']} (the last of {peers['batch']}), {found['rounds']} rounds",
        "",
        "| stage | sampler, ms per step | network alone, ms | overhead |",
        "|---|---|---|---|",
    ]
    for name, own in found["loops"].items():
        lines.append(f"| {name} | {own['sampler_ms']:.2f} | {own['network_ms']:.2f} | {own['overhead']:.1%} |")
    sizes = list(next(iter(found["batches"].values())))
    lines += ["", f"| images per second of a network call, with a batch of | {' | '.join(map(str, sizes))} |"]
    lines.append("|---" * (len(sizes) + 1) + "|")
    for name, rates in found["batches"].items():
        lines.append(f"| {name} | {' | '.join(f'{rate:,.0f}' for rate in rates.values())} |")
    return "\n".join(lines) + (
        f"\n\n{peers['steps']} steps of the last: ours {peers['ours']:.2f} images/s, diffusers' DDPMPipeline "
        f"{peers['diffusers']:.2f}: ours is {peers['ours_faster']:.2f} times faster"
    )
