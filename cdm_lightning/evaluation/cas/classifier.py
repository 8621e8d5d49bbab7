"""The classifier of the classification accuracy score: residual networks, random crops, and training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from cdm_lightning.data import ShardDataModule
from cdm_lightning.evaluation.cas.protocol import Architecture, Crop, LearningRate, Plan
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import write_atomically
from cdm_lightning.foundation.randomness import KeyedStreams
from cdm_lightning.stages.checkpoints import newest_checkpoint
from cdm_lightning.training import Checkpoint
from cdm_lightning.training.progress import Progress

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # image (B, C, H, W) in [-1, 1], label (B,), index (B,)

BLOCKS = {"resnet8": [1, 1, 1], "resnet14": [2, 2, 2], "resnet20": [3, 3, 3], "resnet50": [3, 4, 6, 3]}
PADDING, BLACK = 4, -1.0
AREA, ASPECT, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10  # of random resized crops, as in the training of Inception
# Arguments that must not change when a training is resumed.
FIXED_ARGUMENTS = ("resolution", "image_channels", "num_classes", "architecture")


def convolution(channels: int, out: int, size: int, stride: int = 1) -> list[nn.Module]:
    """A size x size convolution without bias, and batch normalisation."""
    return [nn.Conv2d(channels, out, size, stride, size // 2, bias=False), nn.BatchNorm2d(out)]


class ResidualBlock(nn.Module):
    """max(0, shortcut(x) + branch(x)): (B, channels, H, W) to (B, out, H / stride, W / stride).

    Basic: two 3x3 convolutions of `width`, out = width. Bottleneck: 1x1, 3x3 and 1x1 to out = 4 width, with the stride
    in the 3x3 convolution ("v1.5"). The shortcut is x, or a 1x1 convolution where shapes differ. The last scale of the
    branch starts at 0, so that the block starts as its shortcut (Goyal et al. 2017).
    """

    def __init__(self, channels: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        out = 4 * width if bottleneck else width
        if bottleneck:
            layers = [*convolution(channels, width, 1), nn.ReLU(), *convolution(width, width, 3, stride)]
            layers += [nn.ReLU(), *convolution(width, out, 1)]
        else:
            layers = [*convolution(channels, width, 3, stride), nn.ReLU(), *convolution(width, out, 3)]
        nn.init.zeros_(layers[-1].weight)  # type: ignore[arg-type]  # a BatchNorm2d's
        self.branch = nn.Sequential(*layers)
        changes = stride > 1 or channels != out
        self.shortcut = nn.Sequential(*convolution(channels, out, 1, stride)) if changes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.shortcut(x) + self.branch(x))


class ResNet(nn.Module):
    """Logits, float32 (B, num_classes), of images (B, C, H, W) (He et al. 2016).

    resnet50: 7x7 stem of stride 2, 3x3 max-pool of stride 2, bottlenecks of widths 64, 128, 256, 512.
    resnet8, 14, 20: for images of 32x32, 6n + 2 layers: 3x3 stem, n basic blocks of each width 16, 32, 64.
    """

    def __init__(self, image_channels: int, num_classes: int, architecture: Architecture) -> None:
        super().__init__()
        large = architecture == "resnet50"
        width = 64 if large else 16
        layers = [*convolution(image_channels, width, 7 if large else 3, 2 if large else 1), nn.ReLU()]
        layers += [nn.MaxPool2d(3, 2, 1)] if large else []
        channels = width
        for level, number in enumerate(BLOCKS[architecture]):
            for position in range(number):
                stride = 2 if level and not position else 1
                layers.append(ResidualBlock(channels, width << level, stride, large))
                channels = (4 if large else 1) * (width << level)
        self.features = nn.Sequential(*layers)
        self.last = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # much faster on a CPU

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = self.features(image.contiguous(memory_format=torch.channels_last)).mean((2, 3))
        with torch.autocast(image.device.type, enabled=False):  # 16-bit logits can be equal, which would change top-k
            return self.last(features.to(self.last.weight.dtype))


def pad_and_crop(image: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Each image shifted by -4 ... 4 pixels in y and x, padded with black. u: (B, 2), uniform in [0, 1)."""
    count, _, height, width = image.shape
    down, across = (u * (2 * PADDING + 1)).long().unbind(1)
    rows = down[:, None] + torch.arange(height, device=image.device)  # (B, H) of the padded image
    columns = across[:, None] + torch.arange(width, device=image.device)
    padded = F.pad(image, [PADDING] * 4, value=BLACK)
    which = torch.arange(count, device=image.device)[:, None, None]
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_box(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre and half size, (B, 2) as x, y in [-1, 1], of a box in the unit square for each row of u.

    u: (B, 2 TRIES + 2), uniform in [0, 1). The area is uniform in AREA, the aspect ratio log-uniform in ASPECT, and the
    position uniform. Takes the first of TRIES boxes that fits, or else the whole square.
    """
    tries = u[:, : 2 * TRIES].view(-1, TRIES, 2)
    area = AREA[0] + (AREA[1] - AREA[0]) * tries[..., 0]
    aspect = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** tries[..., 1]
    size = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], -1)  # width and height of each try
    fits = (size <= 1).all(-1)
    first = fits.int().argmax(1)
    size = torch.where(fits.any(1)[:, None], size[torch.arange(len(u), device=u.device), first], 1.0)
    return (1 - size) * (2 * u[:, 2 * TRIES :] - 1), size


def resized_crop(image: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """A random box of each image, enlarged bilinearly to the size of the image. u: see `random_box`."""
    centre, half = random_box(u)
    theta = torch.cat([torch.diag_embed(half), centre[..., None]], -1).to(image.dtype)  # (B, 2, 3)
    grid = F.affine_grid(theta, list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)


class Classifier(L.LightningModule):
    """p(c|x): a residual network, trained from scratch with cross entropy and SGD with Nesterov momentum.

    Its accuracy on real images after training on generated ones is the classification accuracy score (Ravuri and
    Vinyals 2019). Logs test/cas_top1 and test/cas_top5, and stores the accuracy of each class in `per_class`,
    (num_classes,). Crops and flips are keyed by (seed, index), and are the same on every device.

    Args:
        resolution: Width and height of the images.
        image_channels: 3 for colour, 1 for grey.
        num_classes: Number of classes; with fewer than 5, top-5 counts all predictions as right.
        architecture: resnet8, resnet14 or resnet20 for images of about 32x32, resnet50 for ImageNet.
        lr: Learning rate after the warm-up.
        momentum: Nesterov momentum of SGD.
        weight_decay: Weight decay of all parameters.
        label_smoothing: Share of the target that is spread evenly over the classes.
        warmup_steps: Optimizer steps over which the learning rate rises linearly.
        schedule: cosine (to 0 at the end), or steps (divide by 10 at 1/3, 2/3 and 8/9 of the run).
        crop: pad (shift by up to 4 pixels), resized (random area and aspect ratio) or none.
        flip: Mirror half of the training images.
        seed: Seeds crops and flips.
    """

    def __init__(
        self,
        resolution: int = 32,
        image_channels: int = 3,
        num_classes: int = 10,
        architecture: Architecture = "resnet14",
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        label_smoothing: float = 0.0,
        warmup_steps: int = 0,
        schedule: LearningRate = "cosine",
        crop: Crop = "pad",
        flip: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise InputError(f"num_classes {num_classes}: a classifier tells 2 classes or more apart")
        if lr <= 0 or not 0 < momentum < 1 or not 0 <= label_smoothing < 1:
            raise InputError(
                f"lr {lr}, momentum {momentum}, label_smoothing {label_smoothing}: "
                "lr > 0, 0 < momentum < 1 and 0 <= label_smoothing < 1 are needed"
            )
        self.save_hyperparameters()
        self.resolution, self.image_channels, self.num_classes = resolution, image_channels, num_classes
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.label_smoothing, self.warmup_steps, self.schedule = label_smoothing, warmup_steps, schedule
        self.crop, self.flip, self.seed = crop, flip, seed
        self.network = ResNet(image_channels, num_classes, architecture)
        accuracies = MetricCollection(
            {f"top{k}": MulticlassAccuracy(num_classes, top_k=min(k, num_classes), average="micro") for k in (1, 5)}
        )
        self.val_accuracies, self.test_accuracies = accuracies.clone("val/"), accuracies.clone("test/cas_")
        self.class_accuracy = MulticlassAccuracy(num_classes, average=None)
        self.per_class = torch.zeros(num_classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits, float32 (B, num_classes), of images (B, C, H, W) in [-1, 1]."""
        return self.network(image)

    def augment(self, image: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) cropped and mirrored, each image by draws of its own place in the run."""
        u = KeyedStreams(index, image.device, self.seed, "crop").rand((2 * TRIES + 3,))
        if self.crop == "pad":
            image = pad_and_crop(image, u[:, :2])
        elif self.crop == "resized":
            image = resized_crop(image, u[:, :-1])
        mirror = (u[:, -1] < 0.5)[:, None, None, None]
        return torch.where(mirror, image.flip(3), image) if self.flip else image

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        image, label, index = batch
        logits = self(self.augment(image, index))
        loss = F.cross_entropy(logits, label, label_smoothing=self.label_smoothing)
        right = (logits.argmax(1) == label).float().mean()
        self.log_dict({"train/loss": loss, "train/top1": right}, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self(batch[0])
        self.val_accuracies.update(logits, batch[1])
        self.log_dict(dict(self.val_accuracies.items()), prog_bar=True)
        self.log("val/loss", F.cross_entropy(logits, batch[1]), sync_dist=True, batch_size=len(logits))

    def on_test_epoch_start(self) -> None:
        if not all(torch.isfinite(value).all() for value in self.network.state_dict().values()):
            raise InputError(f"the classifier's weights are not finite: its training at lr {self.lr} has diverged")
        self.class_accuracy.reset()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self(batch[0])
        self.test_accuracies.update(logits, batch[1])
        self.class_accuracy.update(logits, batch[1])
        self.log_dict(dict(self.test_accuracies.items()))

    def on_test_epoch_end(self) -> None:
        self.per_class = self.class_accuracy.compute().cpu()  # over all processes

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            self.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=True
        )
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.lr_factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_factor(self, step: int, total: int) -> float:
        """The learning rate of optimizer step `step` of `total`, as a share of lr."""
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.schedule == "steps":
            return rise * 0.1 ** sum(whole * step >= part * total for part, whole in ((1, 3), (2, 3), (8, 9)))
        gone = max(0, step - self.warmup_steps) / max(1, total - self.warmup_steps)
        return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, gone)))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another network before anything is loaded."""
        stored = checkpoint.get("hyper_parameters", {})
        for name in FIXED_ARGUMENTS:
            if stored.get(name) != self.hparams[name]:
                raise InputError(
                    f"the checkpoint does not fit this classifier: its {name} is {stored.get(name)!r}, "
                    f"and the configuration says {self.hparams[name]!r}"
                )


def build_classifier(plan: Plan, seed: int) -> Classifier:
    """An untrained classifier; the seed determines its weights."""
    L.seed_everything(seed, verbose=False)
    model = {name: value for name, value in plan.recipe().items() if name not in ("steps", "batch_size", "precision")}
    return Classifier(plan.resolution, plan.channels, len(plan.classes), seed=seed, **model)


def train(plan: Plan, data: ShardDataModule, seed: int, run: Path, accelerator: str, title: str) -> bool:
    """Train and test one classifier, and write run/result.json. Returns whether this is the first process."""
    classifier = build_classifier(plan, seed)
    saver = Checkpoint(run / "checkpoints", every_n_train_steps=max(1, plan.steps // 20))
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=plan.devices,
        strategy="ddp" if plan.devices > 1 else "auto",
        precision=plan.precision,
        max_steps=plan.steps,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        logger=CSVLogger(run, name="logs"),
        callbacks=[saver, Progress()],
        use_distributed_sampler=False,  # the data module splits the images over processes
        enable_model_summary=False,
        default_root_dir=run,
    )
    if trainer.is_global_zero:
        print(f"training on {title}")
    trainer.fit(classifier, datamodule=data, ckpt_path=newest_checkpoint([run / "checkpoints"]), weights_only=True)
    # Load from the file: batch norm statistics differ between processes, and those of the first one count.
    last = newest_checkpoint([run / "checkpoints"])
    [figures] = trainer.test(classifier, datamodule=data, ckpt_path=last, weights_only=True, verbose=False)
    if trainer.is_global_zero:
        result = {
            "top1": round(figures["test/cas_top1"], 7),  # of a float32
            "top5": round(figures["test/cas_top5"], 7),
            "per_class": [round(value, 7) for value in classifier.per_class.tolist()],
            "steps": trainer.global_step,
            "seed": seed,
        }
        write_atomically(run / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    return trainer.is_global_zero
