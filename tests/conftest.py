"""Small stages and cascades that many tests share."""

import pytest
import torch

from cdm_lightning.stages import BaseStage, SuperResolutionStage

torch.set_num_threads(1)  # the networks here are too small to share, and threads that wait for a busy core crawl

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
