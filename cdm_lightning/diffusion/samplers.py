"""One step of DDPM's ancestral sampler, with noise that is told: so that it can be drawn for many steps at once."""

from __future__ import annotations

import math

import torch


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
