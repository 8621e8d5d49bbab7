"""Before CUDA starts: what makes cuBLAS give the same bits in every run."""

import os

import pytest
import torch
from small_models import SMALL, randomise_weights

from cdm_lightning.stages import BaseStage, SuperResolutionStage

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def figures(record_property):
    """Record measured numbers, which `pytest -m gpu` prints in a line as the test ends."""

    def record(**values):
        for name, value in values.items():
            record_property(name, f"{value:.3g}" if isinstance(value, float) else str(value))

    return record


@pytest.fixture(params=["base", "sr"])
def stage(request):
    """A base and a super-resolution stage with attention, random in all their weights; larger on a GPU."""
    sizes = {**SMALL, "channels": 16, "norm_groups": 8, "attention_resolutions": [8]}
    if torch.cuda.is_available():
        sizes |= {"channels": 64, "norm_groups": 32, "channel_mult": [1, 2, 2], "image_channels": 3}
    torch.manual_seed(0)
    resolution = 32 if torch.cuda.is_available() else 16
    if request.param == "base":
        return randomise_weights(BaseStage(resolution=resolution, **sizes))
    clock = {"low_res_timesteps": 4000, "low_res_schedule": "cosine"}
    return randomise_weights(
        SuperResolutionStage(resolution=resolution, low_resolution=resolution // 2, **clock, **sizes)
    )
