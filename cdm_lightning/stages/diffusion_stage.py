"""The base class of all stages: a LightningModule of one diffusion process and one U-Net, trained on its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch

from cdm_lightning.diffusion import Diffusion, Predict, Prediction, Sampler, Schedule, Variance
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import to_uint8
from cdm_lightning.foundation.randomness import KeyedStreams, Streams, key
from cdm_lightning.network import CompileMode, UNet
from cdm_lightning.stages.augmentation import Augmentation, NoAugmentation
from cdm_lightning.stages.training_log import Meter, TrainingLog, quarters

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # image (B, C, H, W) in [-1, 1], label (B,), index (B,)
FromData = Literal["data"]
IMAGENET = {"image_channels": 3, "num_classes": 1000}  # what "data" stands for where no data is known


class DiffusionStage(L.LightningModule):
    """One diffusion model at one resolution: trains E ||eps - eps_theta(x_t, t, ...)||^2, and samples.

    Every random number of a training example is seeded by (seed, index), where index is the position of the example in
    the run's sequence of images. It depends neither on the rank nor on the batch size.

    Args:
        resolution: Width and height of the images.
        image_channels: 3 for colour, 1 for grey. By default `cdm fit` takes that of its shards; elsewhere 3.
        num_classes: Size of the class embedding; null for a stage that ignores the class. By default `cdm fit` takes
            the number of classes of its shards; elsewhere 1000.
        channels: Base width of the U-Net.
        channel_mult: Width of each resolution level, as a multiple of `channels`, such as 2 or 0.5; each after the
            first halves the size.
        num_res_blocks: Residual blocks per resolution level.
        attention_resolutions: Sizes of feature maps that get self-attention (the middle always has it).
        num_heads: Attention heads of every attention layer.
        num_head_channels: Channels of one head, in place of num_heads: wider layers then have more heads.
        dropout: Dropout probability inside the residual blocks.
        norm_groups: Groups of the group norms; must divide every width.
        timesteps: Number of training time steps, T.
        schedule: Noise schedule, cosine or linear.
        variance: learned (hybrid loss), fixed_small or fixed_large (simple loss).
        prediction: What the network predicts: epsilon (the noise), sample (x_0) or v_prediction.
        continuous: Train on real t in (0, T], so that the sampling schedule can be chosen after training.
        sampler: ddpm (the paper's ancestral sampler), ddim or dpm++.
        sampling_steps: Network calls per image in sampling; null for T.
        sampling_schedule: Another noise schedule for sampling, with `continuous` only; null for the training schedule.
        lr: Adam's learning rate.
        warmup_steps: Optimizer steps over which the learning rate rises linearly from 0.
        decay_fraction: Fraction of the run, at its end, over which the learning rate falls linearly to 0.
        checkpointing: Recompute activations in the backward pass: less memory, but a step takes a third longer.
        compile: torch.compile mode for training: default, or reduce-overhead (CUDA graphs). Compiling takes minutes at
            the start of a run. null does not compile.
        init_from: Begin with the weights of another stage instead of random ones: a checkpoint, a run folder, a bundle
            or the .safetensors of one of its stages. A resumed training has its own weights and needs no init_from.
        init_skip: Beginnings of names of weights, or names of arguments, that need not fit in `init_from`.
        seed: Seeds every random draw.
    """

    is_super_resolution = False
    missing_source: str | None = None  # init_from, if it is gone: a resumed training does not need it
    augmentation: Augmentation = NoAugmentation()
    own_arguments: Mapping[str, Any] = {}  # of this kind of stage, beside those that every stage takes
    trained: dict[str, Any] = {}  # noqa: RUF012, replaced, never mutated: how the weights were trained

    def __init__(
        self,
        resolution: int,
        image_channels: int | FromData = "data",
        num_classes: int | FromData | None = "data",
        channels: int = 256,
        channel_mult: list[int | float] = [1, 2, 3, 4],  # noqa: B006, read only
        num_res_blocks: int = 3,
        attention_resolutions: list[int] = [8, 16],  # noqa: B006, read only
        num_heads: int = 4,
        num_head_channels: int | None = None,
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
        init_from: str | None = None,
        init_skip: list[str] = [],  # noqa: B006, read only
        seed: int = 0,
    ) -> None:
        super().__init__()
        image_channels = IMAGENET["image_channels"] if image_channels == "data" else image_channels
        num_classes = IMAGENET["num_classes"] if num_classes == "data" else num_classes
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.save_hyperparameters({**arguments, **self.own_arguments})
        counts = {"image_channels": image_channels, "channels": channels, "num_res_blocks": num_res_blocks}
        for name, count in {**counts, "num_heads": num_heads, "norm_groups": norm_groups}.items():
            if count < 1:
                raise InputError(f"{name} {count} is less than 1")
        if not channel_mult:
            raise InputError("channel_mult [] is no list of one or more multiples of channels")
        if not 0 <= dropout < 1:
            raise InputError(f"dropout {dropout} lies outside 0 <= probability < 1")
        if not 0 <= lr < math.inf:
            raise InputError(f"lr {lr} is no learning rate: it is a number from 0 on, such as 0.0001")
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
            num_head_channels=num_head_channels,
            dropout=dropout,
            num_classes=num_classes,
            level_embedding=self.is_super_resolution and self.augmentation.takes_level,
            norm_groups=norm_groups,
            checkpointing=checkpointing,
        )
        if init_from is not None and not self.unet.conv_in.weight.is_meta:  # `cdm plan` builds stages without weights
            from cdm_lightning.stages.warm_start import warm_start  # later: it imports this module

            if Path(init_from).exists():
                warm_start(self, init_from, init_skip)
            else:
                self.missing_source = init_from

    @property
    def name(self) -> str:
        """base<resolution> or sr<resolution>."""
        return f"{'sr' if self.is_super_resolution else 'base'}{self.resolution}"

    def losses(self, batch: Batch, purpose: str, by_quarters: bool = False) -> dict[str, torch.Tensor]:
        """The loss and its terms for each image, (B,) each; t and s are drawn independently (CDM, Algorithm 1).

        purpose: keeps the random draws of training and validation apart. by_quarters: also return the loss by quarters
        of t, and of s where the stage has one; an entry is NaN where the image is in another quarter.
        """
        image, label, index = batch
        self.check_batch(image)
        streams = KeyedStreams(index, image.device, self.seed, purpose)
        t = self.diffusion.time_from_uniform(streams.rand())
        predict, shares = self.training_predictor(image, label, streams)  # draws s and z_s ~ q(z_s|z_0)
        eps = streams.randn(image.shape[1:])
        losses = self.diffusion.loss(predict, image, t, eps)
        if by_quarters:
            for name, share in {"t": t / self.diffusion.timesteps, **shares}.items():
                losses |= quarters(f"loss_{name}", losses["loss"].detach(), share)
        return losses

    def training_predictor(
        self, image: torch.Tensor, label: torch.Tensor, streams: Streams
    ) -> tuple[Predict, dict[str, torch.Tensor]]:
        """The network with its conditioning bound, and {"s": s as a share of its range, (0, 1], (B,)} or {}."""
        return self.predictor(label), {}

    def predictor(
        self, label: torch.Tensor, low_res: torch.Tensor | None = None, level: torch.Tensor | None = None
    ) -> Predict:
        """The network as a function of (x, t). The embeddings of label and level do not depend on t: computed once."""
        conditioning = self.unet.condition(label, level)
        return lambda x, t: self.unet(x, t, low_res=low_res, conditioning=conditioning)

    def check_batch(self, image: torch.Tensor) -> None:
        """Refuse images whose shape is not (B, C, R, R) of this stage."""
        expected = (self.image_channels, self.resolution, self.resolution)
        if tuple(image.shape[1:]) != expected:
            raise InputError(
                f"images of shape {tuple(image.shape[1:])} do not fit stage {self.name}, which takes {expected}"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """The mean loss of a batch; adds the losses of its images to the training log."""
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
        """uint8 (B, C, R, R): samples of the batch's classes, super-resolved from the real low-resolution images."""
        return to_uint8(self.sample_like(batch, KeyedStreams(batch[2], self.device, self.seed, "predict")))

    def sample_like(self, batch: Batch, streams: Streams) -> torch.Tensor:
        """Samples with the conditioning of a batch: its labels, and its low-resolution images in super-resolution."""
        raise TypeError(f"{type(self).__name__} does not say how it samples")

    def configure_callbacks(self) -> list[Any]:
        return [TrainingLog()]

    def check_source(self, checkpoint: object) -> None:
        """Refuse to begin with the weights of a file that is not there. checkpoint: whether the training resumes."""
        if self.missing_source is not None and not checkpoint:
            raise InputError(
                f"init_from {self.missing_source} does not exist: a checkpoint, a run folder or a bundle is expected"
            )

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.compile_mode is not None:
            self.unet.compile(mode=self.compile_mode)

    def configure_optimizers(self) -> Any:
        return configure_adam(self, self.lr, self.warmup_steps, self.decay_fraction)

    def on_train_start(self) -> None:
        """Put the configured learning rate in force; a resumed run has just restored that of its checkpoint."""
        self.check_source(self.trainer.global_step)
        for config in self.trainer.lr_scheduler_configs:
            set_rate(config.scheduler, self.lr)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the rate of this step; at its end, the schedule has moved on to the next one."""
        self.meter.latest["lr"] = optimizer.param_groups[0]["lr"]

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        clip_gradients(self.unet.parameters(), gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["stage"] = kind_of(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another stage, network or training target before anything is loaded."""
        check_same_stage(kind_of(self), self.name, dict(self.hparams), checkpoint)
        if self._trainer is not None:  # resumed training: Adam must suit the precision of this run
            for state in checkpoint.get("optimizer_states", []):
                for group in state["param_groups"]:
                    group["fused"] = uses_fused_adam(self)

    def noise(self, streams: Streams) -> torch.Tensor:
        """x_T, standard normal, float32 (B, C, R, R)."""
        return streams.randn((self.image_channels, self.resolution, self.resolution))


def kind_of(stage: DiffusionStage) -> str:
    """The name of a stage's class in checkpoints and bundles: of our own classes the name, of others the whole path."""
    kind = type(stage)
    return kind.__name__ if kind.__module__.startswith("cdm_lightning.") else f"{kind.__module__}.{kind.__qualname__}"


def configure_adam(stage: Any, lr: float, warmup_steps: int, decay_fraction: float) -> dict[str, Any]:
    """Adam for a stage's network. The rate rises over warmup_steps and falls over the last decay_fraction of the run.

    Fused Adam reads and writes every number once. It is not used with a gradient scaler (16-mixed): it would then
    unscale the gradients itself, after they were clipped.
    """
    optimizer = torch.optim.Adam(stage.unet.parameters(), lr=lr, fused=uses_fused_adam(stage))
    total = stage.trainer.estimated_stepping_batches
    decay = max(1.0, decay_fraction * total)

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / (warmup_steps + 1))
        return rise * min(1.0, (total - step) / decay) if decay_fraction else rise

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def set_rate(scheduler: Any, lr: float) -> None:
    """Let a LambdaLR go on from the step that it has reached with `lr` as its full rate. The same lr changes no bit."""
    scheduler.base_lrs = [lr for _ in scheduler.base_lrs]
    scheduler._last_lr = [lr * factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["initial_lr"], group["lr"] = lr, rate


def uses_fused_adam(stage: Any) -> bool:
    """Whether this training uses fused Adam: in every precision but 16-mixed, which scales gradients."""
    return not str(stage.trainer.precision).startswith("16")


def clip_gradients(parameters: Iterable[torch.nn.Parameter], limit: float | None, algorithm: str | None) -> None:
    """Scale gradients to a total norm of at most `limit`, or clamp each of them (algorithm "value"); None, 0: neither.

    Lightning's own clipping refuses a fused optimizer under bf16-mixed, although nothing is scaled there.
    """
    if not limit:
        return
    if algorithm == "value":
        torch.nn.utils.clip_grad_value_(parameters, limit)
    else:
        torch.nn.utils.clip_grad_norm_(parameters, limit)


# Arguments that may change when a run is resumed: they alter neither the network nor the training target.
RESUMABLE_CHANGES = {
    *("sampler", "sampling_steps", "sampling_schedule", "lr", "warmup_steps", "decay_fraction", "seed", "dropout"),
    *("max_level", "min_level", "blur_sigma", "blur_probability", "checkpointing", "compile", "init_from", "init_skip"),
}


def check_same_stage(kind: str, name: str, arguments: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    """Refuse a checkpoint of another kind of stage than `kind`, or of one built with other arguments."""
    stored = {"kind": checkpoint.get("stage"), **checkpoint.get("hyper_parameters", {})}
    for argument, value in {"kind": kind, **arguments}.items():
        if argument not in RESUMABLE_CHANGES and stored.get(argument) != value:
            raise InputError(
                f"the checkpoint does not fit {kind} {name}: "
                f"its {argument} is {stored.get(argument)!r}, and the configuration says {value!r}"
            )
