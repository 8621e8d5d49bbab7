"""The two kinds of stage: the base model and super-resolution models, each with its own conditioning."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F

from cdm_lightning.diffusion import Predict, Schedule
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import check_power_of_two, downscale, to_float, to_uint8
from cdm_lightning.foundation.randomness import Streams, TorchStreams
from cdm_lightning.stages.augmentation import Augmentation, BlurAugmentation, GaussianAugmentation, NoAugmentation
from cdm_lightning.stages.diffusion_stage import Batch, DiffusionStage


class BaseStage(DiffusionStage):
    """p(z_0|c): the class-conditional model at the lowest resolution."""

    def sample(self, label: torch.Tensor, stop_at: int = 0, streams: Streams | None = None) -> torch.Tensor:
        """z_s at s = stop_at, the image at s = 0: float32 (B, C, H, W). label: int64 (B,).

        streams: one per image, None for torch's default generator.
        """
        streams = TorchStreams(len(label), self.device) if streams is None else streams
        return self.diffusion.sample(self.predictor(label), self.noise(streams), stop_at, streams)

    def sample_like(self, batch: Batch, streams: Streams) -> torch.Tensor:
        return self.sample(batch[1], 0, streams)


class SuperResolutionStage(DiffusionStage):
    """p(x_0|z, c): from low_resolution to resolution, trained on real image pairs with conditioning augmentation.

    Args:
        low_resolution: Width and height of the low-resolution input.
        augmentation: gaussian (amortised level s), blur or none.
        low_res_timesteps: T of the stage before; s is one of its time steps (gaussian only).
        low_res_schedule: Noise schedule of the stage before (gaussian only).
        max_level: Largest s in training; null for all of low_res_timesteps.
        min_level: Smallest s in training. Equal to max_level, it trains the stage at one s alone.
        blur_sigma: Range of the blur's sigma in pixels.
        blur_probability: Share of the training images that are blurred.
        upsampling: Interpolation of the low-resolution image to `resolution`.
        kwargs: The arguments that every stage takes.
    """

    is_super_resolution = True

    def __init__(
        self,
        low_resolution: int,
        augmentation: Literal["gaussian", "blur", "none"] = "gaussian",
        low_res_timesteps: int | None = None,
        low_res_schedule: Schedule | None = None,
        max_level: int | None = None,
        min_level: int = 0,
        blur_sigma: list[float] = [0.4, 0.6],  # noqa: B006, read only
        blur_probability: float = 0.5,
        upsampling: Literal["bilinear", "bicubic"] = "bilinear",
        **kwargs: Any,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__", "kwargs")}
        check_power_of_two(kwargs["resolution"], low_resolution)
        if augmentation == "gaussian":
            if low_res_timesteps is None or low_res_schedule is None:
                raise InputError("augmentation gaussian needs low_res_timesteps and low_res_schedule: the clock of s")
            chosen: Augmentation = GaussianAugmentation(low_res_timesteps, low_res_schedule, max_level, min_level)
        else:
            chosen = BlurAugmentation(blur_sigma, blur_probability) if augmentation == "blur" else NoAugmentation()
        self.augmentation = chosen  # set before the network is built: it decides on the level embedding
        self.own_arguments = arguments  # a warm start compares them with the other stage's
        super().__init__(**kwargs)
        self.low_resolution, self.upsampling = low_resolution, upsampling

    def training_predictor(
        self, image: torch.Tensor, label: torch.Tensor, streams: Streams
    ) -> tuple[Predict, dict[str, torch.Tensor]]:
        """The network given z_s ~ q(z_s|z_0), and {"s": s as a share of its range, (0, 1], (B,)} or {}."""
        strength = self.augmentation.draw(streams)  # (B,)
        low_res = self.augment(self.low_res_of(image), strength, streams)  # (B, C, h, w)
        predict = self.conditioned_predictor(label, low_res, strength)
        if not isinstance(self.augmentation, GaussianAugmentation):
            return predict, {}
        lowest, highest = self.augmentation.min_level, self.augmentation.max_level
        return predict, {"s": (strength + 1 - lowest) / (highest + 1 - lowest)}

    def augment(self, low_res: torch.Tensor, strength: torch.Tensor | float, streams: Streams) -> torch.Tensor:
        """The augmented low-resolution images, still at low resolution. Training and sampling share this.

        strength: one per image, (B,), or one number for all.
        """
        strength = torch.as_tensor(strength, dtype=torch.float32, device=low_res.device).expand(len(low_res))
        return self.augmentation(low_res, strength, streams)

    def conditioned_predictor(self, label: torch.Tensor, low_res: torch.Tensor, strength: torch.Tensor) -> Predict:
        """The network conditioned on label, low_res and its strength.

        low_res: (B, C, h, w), already augmented; it is upsampled here.
        """
        size = (self.resolution, self.resolution)
        upsampled = F.interpolate(low_res, size, mode=self.upsampling, align_corners=False)  # (B, C, H, W)
        return self.predictor(label, upsampled, strength if self.augmentation.takes_level else None)

    def sample(
        self,
        label: torch.Tensor,
        low_res: torch.Tensor,
        level: int,
        stop_at: int = 0,
        streams: Streams | None = None,
    ) -> torch.Tensor:
        """x_s at s = stop_at, the image at s = 0: float32 (B, C, H, W).

        low_res: (B, C, h, w), already augmented to `level`. streams: one per image, None for torch's default generator.
        """
        streams = TorchStreams(len(label), self.device) if streams is None else streams
        strength = torch.full((len(label),), float(level), device=low_res.device)
        predict = self.conditioned_predictor(label, low_res, strength)
        return self.diffusion.sample(predict, self.noise(streams), stop_at, streams)

    def sample_like(self, batch: Batch, streams: Streams) -> torch.Tensor:
        return self.sample_at_least_level(batch[1], self.low_res_of(batch[0]), streams)

    def sample_at_least_level(self, label: torch.Tensor, low_res: torch.Tensor, streams: Streams) -> torch.Tensor:
        """As `sample`, from clean low_res, at `least_level`."""
        if self.least_level:  # at 0, it would draw noise for nothing
            low_res = self.augment(low_res, self.least_level, streams)
        return self.sample(label, low_res, self.least_level, 0, streams)

    @property
    def least_level(self) -> int:
        """The smallest s that this stage can take in sampling."""
        return self.augmentation.min_level if isinstance(self.augmentation, GaussianAugmentation) else 0

    def low_res_of(self, image: torch.Tensor) -> torch.Tensor:
        """The real low-resolution images (B, C, h, w), rounded to 8 bits like the stored samples of a stage."""
        return to_float(downscale(to_uint8(image), self.low_resolution))
