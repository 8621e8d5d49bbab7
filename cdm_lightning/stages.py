"""The stages of a cascade: each a LightningModule of a diffusion, a U-Net and an augmentation, trained alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as L
import torch
import torch.nn.functional as F

from cdm_lightning import InputError
from cdm_lightning.augmentation import Augmentation, BlurAugmentation, GaussianAugmentation, NoAugmentation
from cdm_lightning.diffusion import Diffusion, Predict, Prediction, Sampler, Schedule, Variance
from cdm_lightning.images import check_power_of_two, downscale, to_float, to_uint8
from cdm_lightning.matching import check_fits
from cdm_lightning.meter import Meter, TrainingLog, quarters
from cdm_lightning.randomness import generators, key, rand, randn
from cdm_lightning.unet import UNet

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # image (B, C, H, W) in [-1, 1], label (B,), index (B,)


class DiffusionStage(L.LightningModule):
    """One diffusion model at one resolution: E ||eps - eps_theta(x_t, t, ...)||^2, and its sampler.

    Every random number of a training example is keyed by (seed, index), where index is the example's place in the whole
    run's sequence of images; neither the rank nor the batch size takes part.

    Args:
        resolution: Width and height of the images this stage makes.
        image_channels: 3 for colour, 1 for grey.
        num_classes: Size of the class embedding; null for a stage that ignores the class.
        channels: Base width of the U-Net.
        channel_mult: Width of each level, as a multiple of `channels`; each level after the first halves the size.
        num_res_blocks: Residual blocks per level.
        attention_resolutions: Sizes of feature maps that get self-attention (the middle always has it).
        num_heads: Attention heads.
        dropout: Probability inside the residual blocks.
        norm_groups: Groups of the group norms; must divide every width.
        timesteps: T of training.
        schedule: Noise schedule, cosine or linear.
        variance: learned (hybrid loss), fixed_small or fixed_large (simple loss).
        prediction: What the network predicts.
        continuous: Draw t between the grid's points too, so that the sampling schedule is free afterwards.
        sampler: ddpm (the paper's ancestral sampler), ddim or dpm++.
        sampling_steps: Network calls per image in sampling; null for all T.
        sampling_schedule: Another noise schedule for sampling, in continuous time; null for the one of training.
        lr: Adam's learning rate.
        warmup_steps: Optimizer steps over which the learning rate rises linearly from 0.
        decay_fraction: Last part of the run over which the learning rate falls linearly to 0.
        seed: Keys every random draw.
    """

    is_super_resolution = False
    augmentation: Augmentation = NoAugmentation()
    trained: dict[str, Any] = {}  # noqa: RUF012, replaced and never changed: how the weights came about

    def __init__(
        self,
        resolution: int,
        image_channels: int = 3,
        num_classes: int | None = 1000,
        channels: int = 256,
        channel_mult: list[int] = [1, 2, 3, 4],  # noqa: B006, read only
        num_res_blocks: int = 3,
        attention_resolutions: list[int] = [8, 16],  # noqa: B006, read only
        num_heads: int = 4,
        dropout: float = 0.0,
        norm_groups: int = 32,
        timesteps: int = 4000,
        schedule: Schedule = "cosine",
        variance: Variance = "learned",
        prediction: Prediction = "epsilon",
        continuous: bool = False,
        sampler: Sampler = "ddpm",
        sampling_steps: int | None = None,
        sampling_schedule: Schedule | None = None,
        lr: float = 1e-4,
        warmup_steps: int = 0,
        decay_fraction: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters({k: v for k, v in locals().items() if k not in ("self", "__class__")})
        self.resolution, self.image_channels, self.num_classes = resolution, image_channels, num_classes
        self.lr, self.warmup_steps, self.decay_fraction, self.seed = lr, warmup_steps, decay_fraction, seed
        self.meter = Meter()
        self.diffusion = Diffusion(
            timesteps, schedule, variance, prediction, continuous, sampler, sampling_steps, sampling_schedule
        )
        self.unet = UNet(
            resolution,
            in_channels=image_channels * (2 if self.is_super_resolution else 1),
            out_channels=image_channels * (2 if variance == "learned" else 1),
            channels=channels,
            channel_mult=channel_mult,
            num_res_blocks=num_res_blocks,
            attention_resolutions=attention_resolutions,
            num_heads=num_heads,
            dropout=dropout,
            num_classes=num_classes,
            level_embedding=self.is_super_resolution and self.augmentation.takes_level,
            norm_groups=norm_groups,
        )

    @property
    def name(self) -> str:
        return f"{'sr' if self.is_super_resolution else 'base'}{self.resolution}"

    def losses(self, batch: Batch, purpose: str, by_quarters: bool = False) -> dict[str, torch.Tensor]:
        """The loss and its parts per image, (B,) each; s and t of an image are drawn independently.

        by_quarters: also the loss by quarters of t, and of s where there is one, NaN for an image of another quarter.
        """
        image, label, index = batch
        self.check_batch(image)
        generator = generators(index.tolist(), image.device, self.seed, purpose)
        t = self.diffusion.time_from_uniform(rand(generator))
        predict, places = self.training_predictor(image, label, generator)
        losses = self.diffusion.loss(predict, image, t, randn(image.shape[1:], generator))
        for name, place in {"t": t / self.diffusion.timesteps, **places}.items() if by_quarters else ():
            losses |= quarters(f"loss_{name}", losses["loss"].detach(), place)
        return losses

    def training_predictor(
        self, image: torch.Tensor, label: torch.Tensor, generator: Sequence[torch.Generator]
    ) -> tuple[Predict, dict[str, torch.Tensor]]:
        """The network with its conditioning bound; if there is an s, its place in its range too, (0, 1] per image."""
        return lambda x, t: self.unet(x, t, label), {}

    def check_batch(self, image: torch.Tensor) -> None:
        expected = (self.image_channels, self.resolution, self.resolution)
        if tuple(image.shape[1:]) != expected:
            raise InputError(
                f"images of shape {tuple(image.shape[1:])} do not fit stage {self.name}, which takes {expected}"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        torch.manual_seed(key(self.seed, "dropout", self.global_rank, self.global_step, batch_idx))
        losses = self.losses(batch, "train", by_quarters=True)
        self.meter.add({**losses, "nonfinite_images": (~losses["loss"].isfinite()).double()})
        return losses["loss"].mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        losses = {f"val/{name}": value.mean() for name, value in self.losses(batch, "val").items()}
        self.log_dict(losses, prog_bar=True, on_epoch=True, sync_dist=True, batch_size=len(batch[0]))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        losses = {f"test/{name}": value.mean() for name, value in self.losses(batch, "val").items()}
        self.log_dict(losses, on_epoch=True, sync_dist=True, batch_size=len(batch[0]))

    def predict_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """uint8 (B, C, R, R): samples of the batch's classes, in super-resolution from the true low resolution."""
        return to_uint8(self.sample_like(batch, generators(batch[2].tolist(), self.device, self.seed, "predict")))

    def sample_like(self, batch: Batch, generator: Sequence[torch.Generator]) -> torch.Tensor:
        """Samples conditioned as the images of a batch are."""
        raise TypeError(f"{type(self).__name__} is no kind of stage")

    def configure_callbacks(self) -> list[Any]:
        return [TrainingLog()]

    def configure_optimizers(self) -> Any:
        """Adam, its learning rate rising over warmup_steps and falling over the last decay_fraction of the run."""
        optimizer = torch.optim.Adam(self.unet.parameters(), lr=self.lr)
        total = self.trainer.estimated_stepping_batches
        decay = max(1.0, self.decay_fraction * total)

        def factor(step: int) -> float:
            rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
            return rise * min(1.0, (total - step) / decay) if self.decay_fraction else rise

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["stage"] = type(self).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another stage, or of this one on another target, before anything is loaded."""
        check_fits(type(self).__name__, self.name, dict(self.hparams), checkpoint)

    def noise(self, generator: Sequence[torch.Generator]) -> torch.Tensor:
        return randn((self.image_channels, self.resolution, self.resolution), generator)


class BaseStage(DiffusionStage):
    """p(z_0|c): the class-conditional model at the lowest resolution."""

    def sample(self, label: torch.Tensor, stop_at: int = 0, generator: Sequence[torch.Generator] = ()) -> torch.Tensor:
        """z_s for s = stop_at, float32 (B, C, H, W). label: int64 (B,). generator: one per image."""
        return self.diffusion.sample(lambda x, t: self.unet(x, t, label), self.noise(generator), stop_at, generator)

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
        predict = self.predictor(label, self.augment(self.low_res_of(image), strength, generator), strength)
        return predict, {"s": (strength + 1) / (kind.max_level + 1)} if isinstance(kind, GaussianAugmentation) else {}

    def augment(
        self, low_res: torch.Tensor, strength: torch.Tensor, generator: Sequence[torch.Generator]
    ) -> torch.Tensor:
        """The augmented low-resolution image, at its own resolution: in training and sampling alike."""
        return self.augmentation(low_res, strength, generator)

    def predictor(self, label: torch.Tensor, low_res: torch.Tensor, strength: torch.Tensor) -> Predict:
        """The network with its conditioning bound; low_res is augmented already, and is brought to size here, once."""
        size = (self.resolution, self.resolution)
        conditioning = F.interpolate(low_res, size, mode=self.upsampling, align_corners=False)
        level = strength if self.augmentation.takes_level else None
        return lambda x, t: self.unet(x, t, label, conditioning, level)

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
        predict = self.predictor(label, low_res, strength)
        return self.diffusion.sample(predict, self.noise(generator), stop_at, generator)

    def sample_like(self, batch: Batch, generator: Sequence[torch.Generator]) -> torch.Tensor:
        return self.sample(batch[1], self.low_res_of(batch[0]), 0, 0, generator)

    def low_res_of(self, image: torch.Tensor) -> torch.Tensor:
        """The true low-resolution image, as the stage before would store it."""
        return to_float(downscale(to_uint8(image), self.low_resolution))
