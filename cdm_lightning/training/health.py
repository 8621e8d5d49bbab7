"""Whether samples of a super-resolution stage keep to the low-resolution image they were made from."""

from __future__ import annotations

import torch

from cdm_lightning.foundation.images import downscale


def channel_drift(samples: torch.Tensor, low_res: torch.Tensor) -> torch.Tensor:
    """|mean over pixels of a sample - mean over pixels of its input|, float64 (B, C), in units of [-1, 1].

    samples: uint8 (B, C, R, R). low_res: uint8 (B, C, r, r). A drift of 2 leads from black to white. For the true image
    only rounding is left: less than half a grey level per halving, 0.004, and far less where many pixels average it.
    """
    means = (image.double().mean((2, 3)) / 127.5 for image in (samples, low_res))
    return (next(means) - next(means)).abs()


def low_pass_agreement(samples: torch.Tensor, low_res: torch.Tensor) -> float:
    """PSNR in dB between samples brought down to the low resolution and their input, as the stage's training does it.

    10 log10(255^2 / MSE) over all images, pixels and channels, uint8 as in `channel_drift`. The MSE is taken to be at
    least 1/12, the variance of rounding to a grey level: the true image gets 58.9 dB, and nothing gets more.
    """
    difference = downscale(samples, low_res.shape[-1]).double() - low_res.double()
    return float(10 * torch.log10(255**2 / difference.square().mean().clamp(min=1 / 12)))


def adherence(samples: torch.Tensor, low_res: torch.Tensor) -> dict[str, float]:
    """Both figures as a validation logs them; the drift also channel by channel where there are several."""
    drift = channel_drift(samples, low_res).mean(0)
    each = {f"val/channel_drift_{number}": float(value) for number, value in enumerate(drift)} if len(drift) > 1 else {}
    return {
        "val/channel_drift": float(drift.mean()),
        **each,
        "val/low_pass_agreement": low_pass_agreement(samples, low_res),
    }
