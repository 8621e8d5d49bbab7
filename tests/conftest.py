"""Small stages and cascades that many tests share."""

from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from cdm_lightning.data.shards import read_manifest, read_shard, write_manifest, write_shard
from cdm_lightning.stages import BaseStage, SuperResolutionStage

torch.set_num_threads(1)  # the networks here are too small to share, and threads that wait for a busy core crawl

FASHION = Path(__file__).parents[1] / "data" / "fashion"
SMALL = dict(
    image_channels=1, num_classes=10, channels=8, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[4],
    num_heads=2, norm_groups=4, sampling_steps=4,
)  # fmt: skip


def awaken(stage, seed=0):
    """Give the zero-initialised layers weights too, so that every input reaches the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return stage.eval().requires_grad_(False)


@pytest.fixture
def stages():
    """The paper's kinds of stage in its clocks: 4000-cosine, 4000-cosine with Gaussian s, 2000-linear with blur."""
    torch.manual_seed(0)
    return [
        awaken(BaseStage(resolution=8, **SMALL)),
        awaken(
            SuperResolutionStage(
                resolution=16, low_resolution=8, low_res_timesteps=4000, low_res_schedule="cosine", **SMALL
            )
        ),
        awaken(
            SuperResolutionStage(
                resolution=32,
                low_resolution=16,
                augmentation="blur",
                timesteps=2000,
                schedule="linear",
                variance="fixed_small",
                continuous=True,
                **SMALL,
            )
        ),
    ]


def tiny(augmentations=("gaussian",), **options):
    """A base stage of 8x8 and a super-resolution stage per augmentation, random in all their weights; T is 20."""
    torch.manual_seed(0)
    sizes = dict(channels=4, channel_mult=[1], num_heads=1, attention_resolutions=[], norm_groups=2, timesteps=20)
    about = {**SMALL, **sizes, "sampling_steps": 2, **options}
    made = [BaseStage(resolution=8, **about)]
    for number, kind in enumerate(augmentations):
        low = 8 * 2**number
        clock = {"low_res_timesteps": 20, "low_res_schedule": "cosine"} if kind == "gaussian" else {}
        made.append(SuperResolutionStage(low_resolution=low, augmentation=kind, resolution=2 * low, **clock, **about))
    for parameter in (p for stage in made for p in stage.parameters()):
        torch.nn.init.normal_(parameter, std=0.2)  # the last layers start at zero
    return made


@pytest.fixture(scope="session")
def few_real(tmp_path_factory):
    """Root of the first 60 training images of Fashion in two shards, of the first 200 validation images in three."""
    root = tmp_path_factory.mktemp("few_real")
    for split, ends in (("train", [0, 40, 60]), ("val", [0, 120, 180, 200])):
        source = FASHION / split / "32"
        samples = [(s["__key__"], s["png"], int(s["cls"])) for s in islice(read_shard(source / "000.tar.gz"), ends[-1])]
        folder = root / split / "32"
        shards = [write_shard(folder / f"{a}.tar", samples[a:b]) for a, b in pairwise(ends)]
        counts = np.bincount([label for _, _, label in samples], minlength=10).tolist()
        write_manifest(folder, replace(read_manifest(source), shards=shards, counts=counts))
    return root


class Call(NamedTuple):
    """What a network was told at one call; label and level by way of `UNet.condition`."""

    x: torch.Tensor
    t: torch.Tensor
    label: torch.Tensor | None
    low_res: torch.Tensor | None
    level: torch.Tensor | None


def record(stage) -> list[Call]:
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
