"""The plan of a classification accuracy score: recipe, shards and counts, checked before any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from cdm_lightning.data.shards import Manifest, find_folder, read_manifest, refuse_address, shards_digest
from cdm_lightning.foundation.class_names import NO_CLASSES, check_same_classes
from cdm_lightning.foundation.errors import InputError

Architecture = Literal["resnet8", "resnet14", "resnet20", "resnet50"]
LearningRate = Literal["cosine", "steps"]
Crop = Literal["pad", "resized", "none"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The training recipe of all classifiers, those on generated and those on real images.

    Args:
        architecture: resnet8, resnet14 or resnet20 for images of about 32x32, resnet50 for ImageNet.
        steps: Optimizer steps per training.
        batch_size: Images per optimizer step, over all devices.
        lr: SGD's learning rate after the warm-up.
        momentum: Nesterov momentum of SGD.
        weight_decay: Weight decay of all parameters.
        label_smoothing: Share of the target that is spread evenly over the classes.
        warmup_steps: Optimizer steps over which the learning rate rises linearly.
        schedule: cosine (to 0), or steps (divide by 10 at 1/3, 2/3 and 8/9 of the training).
        crop: pad (shift by up to 4 pixels), resized (random area and aspect ratio) or none.
        flip: Mirror half of the training images.
        precision: 32-true or bf16-mixed.
    """

    architecture: Architecture = "resnet14"
    steps: int = 1000
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    warmup_steps: int = 0
    schedule: LearningRate = "cosine"
    crop: Crop = "pad"
    flip: bool = True
    precision: Literal["32-true", "bf16-mixed"] = "32-true"


@dataclass(frozen=True, kw_only=True)
class Plan(Recipe):
    """The recipe and the images of a score. A folder of results is continued only with the plan it was begun with."""

    samples: str  # SHA-256 of the shards of generated images
    training: str  # SHA-256 of the real shards that the control trains on
    validation: str  # SHA-256 of the real shards to test on
    resolution: int
    channels: int
    devices: int  # part of the plan because batch norm works per device
    counts: list[int]  # training images per class
    classes: list[str]

    def recipe(self) -> dict[str, Any]:
        """The fields of the recipe, without those of the images."""
        return {field.name: getattr(self, field.name) for field in fields(Recipe)}


def read_manifests(samples: Path, shards: Path) -> tuple[Manifest, Manifest, Manifest]:
    """Manifests of the generated, the real training and the real validation images. Refuses a mismatch."""
    for given in (samples, shards):
        refuse_address(Path(given))
    folder = Path(samples) / "train"
    stored = [int(f.name) for f in folder.iterdir() if f.name.isdecimal()] if folder.is_dir() else []
    if not stored:
        raise InputError(f"{folder} holds no shards: samples must be a folder that `cdm sample` has finished")
    resolution = max(stored)
    generated = read_manifest(folder / str(resolution))
    if generated.classes == NO_CLASSES:
        raise InputError(f"{samples} is of a cascade without classes, and a classification accuracy needs classes")
    real, validation = (read_manifest(find_folder(shards, split, resolution)) for split in ("train", "val"))
    for split, other in (("train", real), ("val", validation)):
        if other.channels != generated.channels:
            raise InputError(f"{samples} has {generated.channels} channels, and {shards}/{split} {other.channels}")
        if len(other.classes) != len(generated.classes):
            raise InputError(
                f"{samples} has {len(generated.classes)} classes, and {shards}/{split} {len(other.classes)}"
            )
        check_same_classes(generated.class_names, other.class_names, samples, f"{shards}/{split}")
    check_same_classes(real.class_names, validation.class_names, f"{shards}/train", f"{shards}/val")
    if len(real.classes) < 2:
        raise InputError(f"{shards} has {len(real.classes)} class: a classification accuracy takes 2 or more")
    for where, manifest in ((samples, generated), (f"{shards}/val", validation)):
        if 0 in manifest.counts:
            c = manifest.counts.index(0)
            raise InputError(f"{where} has no images of class {c} ({real.classes[c]}): every class must be there")
    return generated, real, validation


def make_plan(
    generated: Manifest, real: Manifest, validation: Manifest, count: int | None, recipe: Recipe, devices: int
) -> Plan:
    """The plan for these images and settings. Refuses a count or a recipe that cannot be trained."""
    n = generated.count if count is None else count
    if not len(generated.classes) <= n <= generated.count:
        raise InputError(f"count {n} must lie between one image a class and the {generated.count} generated images")
    if recipe.steps < 1 or recipe.batch_size < 2:
        raise InputError(f"steps {recipe.steps} must be at least 1, and batch_size {recipe.batch_size} at least 2")
    if devices < 1 or recipe.batch_size % devices:
        raise InputError(f"batch_size {recipe.batch_size} cannot be shared by {devices} devices")
    counts = proportional_counts(n, generated.counts)
    for name, needed, available in zip(real.classes, counts, real.counts, strict=True):
        if needed > available:
            raise InputError(
                f"the control takes as many real images as generated ones, {needed} of class {name}, "
                f"and there are {available}: ask for a smaller count"
            )
    return Plan(
        **asdict(recipe),
        samples=shards_digest(generated.shards),
        training=shards_digest(real.shards),
        validation=shards_digest(validation.shards),
        resolution=generated.resolution,
        channels=generated.channels,
        devices=devices,
        counts=counts,
        classes=real.classes,
    )


def proportional_counts(n: int, counts: Sequence[int]) -> list[int]:
    """Split n in proportion to counts into integers, by largest remainders; ties go to the lower class."""
    total = sum(counts)
    parts = [n * count // total for count in counts]
    order = sorted(range(len(counts)), key=lambda c: -(n * counts[c] % total))  # sorted is stable
    for c in order[: n - sum(parts)]:
        parts[c] += 1
    return parts
