"""The samplers of the reverse process: diffusers' DDIM and DPM-Solver++, and a DDPM ancestral step written here.

This ancestral step takes its noise as an argument, from the images' own streams. The step of diffusers draws its own.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from cdm_lightning.foundation.errors import InputError


def make_scheduler(sampler: str, settings: dict[str, Any], prediction: str, clip: bool) -> Any:
    """diffusers' scheduler for a sampler: ddpm, ddim or dpm++. settings: the noise schedule. clip: x_0 to [-1, 1].

    DDIM takes the spacing "trailing": its step size in diffusers is always T / n, and the default spacing, "leading",
    starts far below T.
    """
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    if sampler not in ("ddpm", "ddim", "dpm++"):
        raise InputError(f"sampler {sampler!r} is none of ddpm, ddim and dpm++")
    settings = {**settings, "prediction_type": prediction}
    if sampler == "ddpm":
        return DDPMScheduler(**settings, timestep_spacing="linspace")  # used for its time grid only
    if sampler == "ddim":
        return DDIMScheduler(**settings, clip_sample=clip, timestep_spacing="trailing")
    scheduler = DPMSolverMultistepScheduler(
        **settings,
        timestep_spacing="linspace",
        thresholding=clip,  # with sample_max_value 1 dynamic thresholding is a clamp to [-1, 1]
        sample_max_value=1.0,
        lambda_min_clipped=-5.1,  # the cosine schedule ends far below this log-SNR, where x_t is pure noise
    )
    # The same clamp without a sort of every image's pixels, which took 1 to 6 % of the shipped cascade's time.
    scheduler._threshold_sample = partial(torch.clamp, min=-1, max=1)  # type: ignore[attr-defined]  # untyped there
    return scheduler


def check_ddim_grid(timesteps: int, steps: int, stop_at: int) -> None:
    """Refuse a number of steps n that does not divide T, and an s that is not a multiple of DDIM's step T / n."""
    if timesteps % steps:
        raise InputError(f"sampling_steps {steps} does not divide T = {timesteps}, as the DDIM sampler needs")
    stride = timesteps // steps
    if stop_at % stride:
        below = stop_at // stride * stride
        raise InputError(
            f"stop_at {stop_at} is not on DDIM's grid of {steps} steps (multiples of {stride}): "
            f"the nearest are {below} and {below + stride}"
        )


def ancestral_step(
    output: torch.Tensor,
    x: torch.Tensor,
    z: torch.Tensor,
    abar: float,
    abar_next: float,
    prediction: str = "epsilon",
    variance: str = "learned",
    clip: bool = True,
) -> torch.Tensor:
    """x_r = mean(x_0, x_t) + sigma z for any r < t: a draw of q(x_r|x_t, x_0) at the predicted x_0 (DDPM, eq. 7).

    output: the network's output at x = x_t, (B, C, H, W), or (B, 2C, H, W) for a learned variance. z: standard normal,
    (B, C, H, W). abar, abar_next: abar_t and abar_r. At r = 0 (abar_next = 1) this returns the mean, without noise.
    Equals the step of diffusers' DDPMScheduler, in fewer operations.
    """
    guess, v = output.chunk(2, dim=1) if variance == "learned" else (output, None)
    signal, noise = math.sqrt(abar), math.sqrt(1 - abar)
    if prediction == "epsilon":
        guess = torch.sub(x, guess, alpha=noise) / signal
    elif prediction == "v_prediction":
        guess = torch.sub(x * signal, guess, alpha=noise)
    image = guess.clamp(-1, 1) if clip else guess
    beta = 1 - abar / abar_next
    coef_image, coef_x = math.sqrt(abar_next) * beta / (1 - abar), math.sqrt(1 - beta) * (1 - abar_next) / (1 - abar)
    mean = torch.add(image * coef_image, x, alpha=coef_x)
    if abar_next == 1:
        return mean
    posterior = beta * (1 - abar_next) / (1 - abar)
    if v is None:
        return mean.add_(z, alpha=math.sqrt(beta if variance == "fixed_large" else posterior))
    # log Sigma = f log beta + (1 - f) log posterior with f = (v + 1) / 2 (Improved DDPM, eq. 15).
    low, high = math.log(posterior), math.log(beta)
    return mean.addcmul_(z, (v * (0.25 * (high - low))).add_(0.25 * (high + low)).exp_())
