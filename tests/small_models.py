"""Stages small enough for a test, with weights that let every input reach the output, and what their networks see."""

from typing import NamedTuple

import torch

from cdm_lightning.foundation.images import quantize
from cdm_lightning.stages import BaseStage, SuperResolutionStage

SMALL = dict(
    image_channels=1, num_classes=10, channels=8, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[4],
    num_heads=2, norm_groups=4, sampling_steps=4,
)  # fmt: skip
SMALLEST = {
    **SMALL, "channels": 4, "channel_mult": [1], "num_heads": 1, "attention_resolutions": [], "norm_groups": 2,
    "timesteps": 20, "sampling_steps": 2,
}  # fmt: skip


def randomise_weights(stage, seed=0):
    """Give the zero-initialised layers weights too, so that every input reaches the output; the stage is frozen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return stage.eval().requires_grad_(False)


def smallest_stages(augmentations=("gaussian",), min_level=0, max_level=None, **options):
    """A base stage of 8x8 and a super-resolution stage per augmentation, random in all their weights; T is 20."""
    torch.manual_seed(0)
    about = {**SMALLEST, **options}
    clock = {"low_res_timesteps": 20, "low_res_schedule": "cosine", "min_level": min_level, "max_level": max_level}
    made = [BaseStage(resolution=8, **about)]
    for number, kind in enumerate(augmentations):
        low = 8 * 2**number
        noised = clock if kind == "gaussian" else {}
        made.append(SuperResolutionStage(low_resolution=low, augmentation=kind, resolution=2 * low, **noised, **about))
    for parameter in (p for stage in made for p in stage.parameters()):
        torch.nn.init.normal_(parameter, std=0.2)  # the last layers start at zero
    return made


def batch_of(stage, count=4, first=0):
    """Images of noise of the stage's resolution, their classes and their indices."""
    g = torch.Generator().manual_seed(first)
    image = quantize(torch.rand(count, 1, stage.resolution, stage.resolution, generator=g) * 2 - 1)
    return image, torch.arange(count) % 10, torch.arange(first, first + count)


class Call(NamedTuple):
    """What a network was told at one call; label and level by way of `UNet.condition`."""

    x: torch.Tensor
    t: torch.Tensor
    label: torch.Tensor | None
    low_res: torch.Tensor | None
    level: torch.Tensor | None


def record_calls(stage) -> list[Call]:
    """Keep every input of a stage's network from here on."""
    calls: list[Call] = []
    told: list = []  # (conditioning, label, level)
    condition = stage.unet.condition

    def conditioned(label, level):
        told.append((condition(label, level), label, level))
        return told[-1][0]

    def called(_, args, kwargs):
        label, level = next((rest for made, *rest in told if made is kwargs["conditioning"]), (None, None))
        calls.append(Call(*args, label, kwargs["low_res"], level))

    stage.unet.condition = conditioned
    stage.unet.register_forward_pre_hook(called, with_kwargs=True)
    return calls
