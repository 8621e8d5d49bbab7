"""What every stage of a cascade shares: a LightningModule of a diffusion and a U-Net, trained alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as L
import torch

from cdm_lightning.diffusion import Diffusion, Predict, Prediction, Sampler, Schedule, Variance
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import to_uint8
from cdm_lightning.foundation.randomness import generators, key, rand, randn
from cdm_lightning.network import CompileMode, UNet
from cdm_lightning.stages.augmentation import Augmentation, NoAugmentation
from cdm_lightning.stages.meter import Meter, TrainingLog, quarters

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
        checkpointing: Compute activations again in the backward pass: less memory, a step a third longer.
        compile: Compile the network for training, which takes minutes at its start: default, or reduce-overhead (CUDA
            graphs); null for not.
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
        checkpointing: bool = False,
        compile: CompileMode | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters({k: v for k, v in locals().items() if k not in ("self", "__class__")})
        self.resolution, self.image_channels, self.num_classes = resolution, image_channels, num_classes
        self.lr, self.warmup_steps, self.decay_fraction, self.seed = lr, warmup_steps, decay_fraction, seed
        self.compile_mode, self.meter = compile, Meter()
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
            checkpointing=checkpointing,
        )

    @property
    def name(self) -> str:
        return f"{'sr' if self.is_super_resolution else 'base'}{self.resolution}"

    def losses(self, batch: Batch, purpose: str, by_quarters: bool = False) -> dict[str, torch.Tensor]:
        """The loss and its parts per image, (B,) each; s and t of an image are drawn independently (CDM, Algorithm 1).

        by_quarters: also the loss by quarters of t, and of s where there is one, NaN for an image of another quarter.
        """
        image, label, index = batch
        self.check_batch(image)
        generator = generators(index.tolist(), image.device, self.seed, purpose)
        t = self.diffusion.time_from_uniform(rand(generator))
        predict, places = self.training_predictor(image, label, generator)  # draws s and z_s ~ q(z_s|z_0)
        eps = randn(image.shape[1:], generator)
        losses = self.diffusion.loss(predict, image, t, eps)
        for name, place in {"t": t / self.diffusion.timesteps, **places}.items() if by_quarters else ():
            losses |= quarters(f"loss_{name}", losses["loss"].detach(), place)
        return losses

    def training_predictor(
        self, image: torch.Tensor, label: torch.Tensor, generator: Sequence[torch.Generator]
    ) -> tuple[Predict, dict[str, torch.Tensor]]:
        """The network with its conditioning bound; if there is an s, its place in its range too, (0, 1] per image."""
        return self.predictor(label), {}

    def predictor(
        self, label: torch.Tensor, low_res: torch.Tensor | None = None, level: torch.Tensor | None = None
    ) -> Predict:
        """The network with its conditioning bound, of which everything that no t changes is computed here, once."""
        conditioning = self.unet.condition(label, level)
        return lambda x, t: self.unet(x, t, low_res=low_res, conditioning=conditioning)

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

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.compile_mode is not None:
            self.unet.compile(mode=self.compile_mode)

    def configure_optimizers(self) -> Any:
        return adam(self, self.lr, self.warmup_steps, self.decay_fraction)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        clip(self.unet.parameters(), gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["stage"] = type(self).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another stage, or of this one on another target, before anything is loaded."""
        check_fits(type(self).__name__, self.name, dict(self.hparams), checkpoint)
        if self._trainer is not None:  # a training that goes on, in its own precision
            for state in checkpoint.get("optimizer_states", []):
                for group in state["param_groups"]:
                    group["fused"] = fuses(self)

    def noise(self, generator: Sequence[torch.Generator]) -> torch.Tensor:
        return randn((self.image_channels, self.resolution, self.resolution), generator)


def adam(stage: Any, lr: float, warmup_steps: int, decay_fraction: float) -> dict[str, Any]:
    """Adam for a stage's network; its rate rises over warmup_steps and falls over the last decay_fraction of the run.

    The fused form reads and writes every number once. Beside a gradient scaler (16-mixed) it would take the unscaling
    upon itself, after the clipping.
    """
    optimizer = torch.optim.Adam(stage.unet.parameters(), lr=lr, fused=fuses(stage))
    total = stage.trainer.estimated_stepping_batches
    decay = max(1.0, decay_fraction * total)

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / (warmup_steps + 1))
        return rise * min(1.0, (total - step) / decay) if decay_fraction else rise

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fuses(stage: Any) -> bool:
    """Whether Adam is fused in this training."""
    return not str(stage.trainer.precision).startswith("16")


def clip(parameters: Iterable[torch.nn.Parameter], limit: float | None, algorithm: str | None) -> None:
    """Scale gradients to a total norm of `limit` at most, or clamp each of them (algorithm "value"); None and 0 do not.

    Lightning's own clipping refuses a fused optimizer under bf16-mixed, where nothing is scaled.
    """
    if not limit:
        return
    if algorithm == "value":
        torch.nn.utils.clip_grad_value_(parameters, limit)
    else:
        torch.nn.utils.clip_grad_norm_(parameters, limit)


# What may differ between a checkpoint and the configuration that goes on from it: it leaves network and target alone.
FREE = {
    *("sampler", "sampling_steps", "sampling_schedule", "lr", "warmup_steps", "decay_fraction", "seed", "dropout"),
    *("max_level", "blur_sigma", "blur_probability", "checkpointing", "compile"),
}


def check_fits(kind: str, name: str, arguments: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    """Refuse the checkpoint of another kind of stage than `kind`, or of one that was built with other arguments."""
    theirs = {"kind": checkpoint.get("stage"), **checkpoint.get("hyper_parameters", {})}
    for argument, value in {"kind": kind, **arguments}.items():
        if argument not in FREE and theirs.get(argument) != value:
            raise InputError(
                f"the checkpoint does not fit {kind} {name}: "
                f"its {argument} is {theirs.get(argument)!r}, and the configuration says {value!r}"
            )
