"""Conditioning augmentation: Gaussian noise or blur on the low-resolution input of a super-resolution stage.

Every kind has a strength per image: the level s of the Gaussian noise, the sigma of the blur. Strength 0 is the
identity. Training draws a random strength for each image. Sampling sets s, and does not blur.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from cdm_lightning.diffusion import Diffusion, Schedule
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.randomness import Streams


class Augmentation(Protocol):
    """Corrupts clean low-resolution images (B, C, h, w) in [-1, 1] with one strength per image, (B,).

    `draw` returns random strengths for training, float32 (B,), one from each stream.
    """

    takes_level: bool  # whether the network is conditioned on the strength

    def draw(self, streams: Streams) -> torch.Tensor: ...

    def __call__(self, low_res: torch.Tensor, strength: torch.Tensor, streams: Streams) -> torch.Tensor: ...


class NoAugmentation:
    """The identity: the low-resolution image is not changed."""

    takes_level = False

    def draw(self, streams: Streams) -> torch.Tensor:
        return torch.zeros(len(streams), device=streams.device)

    def __call__(self, low_res: torch.Tensor, strength: torch.Tensor, streams: Streams) -> torch.Tensor:
        return low_res


class GaussianAugmentation:
    """z_s ~ q(z_s|z_0) = N(sqrt(abar_s) z_0, (1 - abar_s) I), with the noise schedule of the low-resolution model.

    Training draws s for each image, uniformly from min_level ... max_level (None: T), independently of t. The network
    gets s as a second time embedding, so that s can be chosen after training (CDM's amortised Gaussian augmentation).
    With min_level = max_level, a stage is trained at one s alone.
    timesteps, schedule: T and the noise schedule of the low-resolution model.
    """

    takes_level = True

    def __init__(self, timesteps: int, schedule: Schedule, max_level: int | None = None, min_level: int = 0) -> None:
        self.min_level, self.max_level = min_level, timesteps if max_level is None else max_level
        if not 0 <= self.max_level <= timesteps:
            raise InputError(f"max_level {max_level} lies outside 0 ... low_res_timesteps = {timesteps}")
        if not 0 <= min_level <= self.max_level or min_level == timesteps:
            raise InputError(
                f"min_level {min_level} lies outside 0 ... max_level = {self.max_level}, below T = {timesteps}"
            )
        self.diffusion = Diffusion(timesteps, schedule)

    def draw(self, streams: Streams) -> torch.Tensor:
        """s ~ U{min_level, ..., max_level}, float32 (B,)."""
        return self.min_level + (streams.rand() * (self.max_level + 1 - self.min_level)).floor().float()

    def __call__(self, low_res: torch.Tensor, strength: torch.Tensor, streams: Streams) -> torch.Tensor:
        return self.diffusion.diffuse(low_res, strength, streams.randn(low_res.shape[1:]))


class BlurAugmentation:
    """A 3x3 Gaussian blur, sigma ~ U(sigma[0], sigma[1]), applied with `probability` (CDM's high-resolution stages).

    Both sigma and the decision to blur are drawn for each image. The network is not conditioned on them.
    """

    takes_level = False

    def __init__(self, sigma: Sequence[float], probability: float) -> None:
        if len(sigma) != 2 or not 0 < sigma[0] <= sigma[1]:
            raise InputError(f"blur_sigma {list(sigma)} is not a range: two numbers, 0 < lowest <= highest")
        if not 0 <= probability <= 1:
            raise InputError(f"blur_probability {probability} lies outside 0 ... 1")
        self.sigma, self.probability = tuple(sigma), probability

    def draw(self, streams: Streams) -> torch.Tensor:
        """Sigma in pixels, or 0 for no blur, float32 (B,)."""
        lowest, highest = self.sigma
        blurred = streams.rand() < self.probability
        return (blurred * (lowest + (highest - lowest) * streams.rand())).float()

    def __call__(self, low_res: torch.Tensor, strength: torch.Tensor, streams: Streams) -> torch.Tensor:
        side = torch.exp(-0.5 / strength.square()).view(-1, 1, 1, 1)  # exp(-inf) = 0: sigma 0 changes no bit
        centre = 1 / (1 + 2 * side)
        side = side * centre
        padded = F.pad(low_res, (1, 1, 0, 0), mode="reflect")
        rows = centre * low_res + side * (padded[..., :-2] + padded[..., 2:])
        padded = F.pad(rows, (0, 0, 1, 1), mode="reflect")
        return centre * rows + side * (padded[..., :-2, :] + padded[..., 2:, :])
