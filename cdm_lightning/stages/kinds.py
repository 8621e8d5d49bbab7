"""The stages of a cascade: a base model and super-resolution models, each with its own conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F

from cdm_lightning.diffusion import Predict, Schedule
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import check_power_of_two, downscale, to_float, to_uint8
from cdm_lightning.stages.augmentation import Augmentation, BlurAugmentation, GaussianAugmentation, NoAugmentation
from cdm_lightning.stages.diffusion_stage import Batch, DiffusionStage


class BaseStage(DiffusionStage):
    """p(z_0|c): the class-conditional model at the lowest resolution."""

    def sample(self, label: torch.Tensor, stop_at: int = 0, generator: Sequence[torch.Generator] = ()) -> torch.Tensor:
        """z_s for s = stop_at, float32 (B, C, H, W). label: int64 (B,). generator: one per image."""
        return self.diffusion.sample(self.predictor(label), self.noise(generator), stop_at, generator)

    def sample_like(self, batch: Batch, generator: Sequence[torch.Generator]) -> torch.Tensor:
        return self.sample(batch[1], 0, generator)


class SuperResolutionStage(DiffusionStage):
    """p(x_0|z, c): from low_resolution to resolution, trained on pairs of true images with conditioning augmentation.

    Args:
        low_resolution: Width and height of the images it starts from.
        augmentation: gaussian (amortised level s), blur or none.
        low_res_timesteps: T of the stage before, on whose clock s runs (gaussian only).
        low_res_schedule: Noise schedule of the stage before (gaussian only).
        max_level: Largest s in training; null for all of low_res_timesteps.
        blur_sigma: Range of the blur's sigma in pixels.
        blur_probability: Share of the training images that are blurred.
        upsampling: How the low-resolution image reaches the network's resolution.
        kwargs: What every stage takes.
    """

    is_super_resolution = True

    def __init__(
        self,
        low_resolution: int,
        augmentation: Literal["gaussian", "blur", "none"] = "gaussian",
        low_res_timesteps: int | None = None,
        low_res_schedule: Schedule | None = None,
        max_level: int | None = None,
        blur_sigma: list[float] = [0.4, 0.6],  # noqa: B006, read only
        blur_probability: float = 0.5,
        upsampling: Literal["bilinear", "bicubic"] = "bilinear",
        **kwargs: Any,
    ) -> None:
        own = {k: v for k, v in locals().items() if k not in ("self", "__class__", "kwargs")}
        check_power_of_two(kwargs["resolution"], low_resolution)
        if augmentation == "gaussian":
            if low_res_timesteps is None or low_res_schedule is None:
                raise InputError("augmentation gaussian needs low_res_timesteps and low_res_schedule: the clock of s")
            corrupt: Augmentation = GaussianAugmentation(low_res_timesteps, low_res_schedule, max_level)
        else:
            corrupt = BlurAugmentation(blur_sigma, blur_probability) if augmentation == "blur" else NoAugmentation()
        self.augmentation = corrupt  # before the network is built, which asks it whether there is a level to embed
        super().__init__(**kwargs)
        self.save_hyperparameters(own)
        self.low_resolution, self.upsampling = low_resolution, upsampling

    def training_predictor(
        self, image: torch.Tensor, label: torch.Tensor, generator: Sequence[torch.Generator]
    ) -> tuple[Predict, dict[str, torch.Tensor]]:
        strength, kind = self.augmentation.draw(generator), self.augmentation
        predict = self.conditioned_predictor(label, self.augment(self.low_res_of(image), strength, generator), strength)
        return predict, {"s": (strength + 1) / (kind.max_level + 1)} if isinstance(kind, GaussianAugmentation) else {}

    def augment(
        self, low_res: torch.Tensor, strength: torch.Tensor | float, generator: Sequence[torch.Generator]
    ) -> torch.Tensor:
        """The augmented low-resolution image, at its own resolution: in training and sampling alike.

        strength: of each image, (B,), or one for all.
        """
        strength = torch.as_tensor(strength, dtype=torch.float32, device=low_res.device).expand(len(low_res))
        return self.augmentation(low_res, strength, generator)

    def conditioned_predictor(self, label: torch.Tensor, low_res: torch.Tensor, strength: torch.Tensor) -> Predict:
        """The network given label, low_res, which is augmented already and is brought to size here, and its level."""
        size = (self.resolution, self.resolution)
        large = F.interpolate(low_res, size, mode=self.upsampling, align_corners=False)
        return self.predictor(label, large, strength if self.augmentation.takes_level else None)

    def sample(
        self,
        label: torch.Tensor,
        low_res: torch.Tensor,
        level: int,
        stop_at: int = 0,
        generator: Sequence[torch.Generator] = (),
    ) -> torch.Tensor:
        """x_s for s = stop_at, float32 (B, C, H, W), given low_res of level `level` at low_resolution."""
        strength = torch.full((len(label),), float(level), device=low_res.device)
        predict = self.conditioned_predictor(label, low_res, strength)
        return self.diffusion.sample(predict, self.noise(generator), stop_at, generator)

    def sample_like(self, batch: Batch, generator: Sequence[torch.Generator]) -> torch.Tensor:
        return self.sample(batch[1], self.low_res_of(batch[0]), 0, 0, generator)

    def low_res_of(self, image: torch.Tensor) -> torch.Tensor:
        """The true low-resolution image, as the stage before would store it."""
        return to_float(downscale(to_uint8(image), self.low_resolution))
