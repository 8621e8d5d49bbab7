"""The samplers of the reverse process: diffusers' schedulers, and an ancestral step of our own.

Our ancestral step is given its noise, which can so be drawn for many steps at once; diffusers' draws it step by step.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from cdm_lightning.foundation.errors import InputError


def scheduler_of(sampler: str, settings: dict[str, Any], prediction: str, clip: bool) -> Any:
    """diffusers' scheduler for a sampler: ddpm, ddim or dpm++. settings: of the noise schedule. clip: x_0 to [-1, 1].

    Each has the spacing of its grid at which it is right: diffusers' DDIM steps by T / n whatever its grid is, and
    "leading", its default, starts far below T.
    """
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    settings = {**settings, "prediction_type": prediction}
    if sampler == "ddpm":
        return DDPMScheduler(**settings, timestep_spacing="linspace")  # for its grid alone
    if sampler == "ddim":
        return DDIMScheduler(**settings, clip_sample=clip, timestep_spacing="trailing")
    return DPMSolverMultistepScheduler(
        **settings,
        timestep_spacing="linspace",
        thresholding=clip,  # with sample_max_value 1 the dynamic threshold is the plain clamp to [-1, 1]
        sample_max_value=1.0,
        lambda_min_clipped=-5.1,  # a log-SNR below this says nothing; the cosine schedule ends far below it
    )


def check_ddim(timesteps: int, steps: int, stop_at: int) -> None:
    """Refuse numbers of steps that do not divide T, and an s between two of DDIM's steps of T / n."""
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
    before: float,
    prediction: str = "epsilon",
    variance: str = "learned",
    clip: bool = True,
) -> torch.Tensor:
    """x_r = mean(x_0, x_t) + sigma z for any r < t, the posterior q(x_r|x_t, x_0) at the predicted x_0 (DDPM, eq. 7).

    output: of the network at x = x_t, (B, C, H, W), or (B, 2C, H, W) where the variance is learned. abar, before: those
    of t and r; at r = 0, where `before` is 1, the mean. It is the step of diffusers' DDPMScheduler, which draws its
    noise by itself, in fewer operations.
    """
    guess, v = output.chunk(2, dim=1) if variance == "learned" else (output, None)
    signal, noise = math.sqrt(abar), math.sqrt(1 - abar)
    if prediction == "epsilon":
        guess = torch.sub(x, guess, alpha=noise) / signal
    elif prediction == "v_prediction":
        guess = torch.sub(x * signal, guess, alpha=noise)
    image = guess.clamp(-1, 1) if clip else guess
    beta = 1 - abar / before
    of_image, of_x = math.sqrt(before) * beta / (1 - abar), math.sqrt(1 - beta) * (1 - before) / (1 - abar)
    mean = torch.add(image * of_image, x, alpha=of_x)
    if before == 1:
        return mean
    posterior = beta * (1 - before) / (1 - abar)
    if v is None:
        return mean.add_(z, alpha=math.sqrt(beta if variance == "fixed_large" else posterior))
    # log Sigma = f log beta + (1 - f) log posterior with f = (v + 1) / 2 (Improved DDPM, eq. 15).
    low, high = math.log(posterior), math.log(beta)
    return mean.addcmul_(z, (v * (0.25 * (high - low))).add_(0.25 * (high + low)).exp_())
