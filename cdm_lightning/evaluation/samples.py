"""Folders of stored samples: finding them, and checking them against each other and against a reference card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cdm_lightning.data.preparation.raw_images import image_suffixes
from cdm_lightning.data.shards import Manifest, read_manifest, refuse_address
from cdm_lightning.evaluation.detectors import Detector
from cdm_lightning.evaluation.references.cards import ReferenceCard, check_card
from cdm_lightning.foundation.class_names import NO_CLASSES, check_same_classes
from cdm_lightning.foundation.errors import InputError


def sample_folders(samples: Sequence[Path], resolution: int | None) -> tuple[list[Path], list[Manifest]]:
    """The shard folders and manifests of several sets of samples. Refuses sets that differ in more than their seed."""
    folders = [sample_folder(folder, resolution) for folder in samples]
    manifests = [read_manifest(folder) for folder in folders]
    check_samples(manifests, samples)
    return folders, manifests


def sample_folder(folder: Path, resolution: int | None) -> Path:
    """The shard folder of one resolution in a folder of `cdm sample`; None takes the largest resolution."""
    refuse_address(Path(folder))
    stored_resolutions = sorted(int(f.name) for f in (Path(folder) / "train").glob("*") if f.name.isdecimal())
    if not Path(folder).exists():
        raise InputError(f"{folder} does not exist: a folder that `cdm sample` wrote is expected")
    if not stored_resolutions and any(file.suffix.lower() in image_suffixes() for file in Path(folder).rglob("*")):
        command = "`cdm prepare folder --source FOLDER --out OUT --resolutions R`"
        raise InputError(
            f"{folder} holds pictures and no shards: {command} makes shards of them, and OUT is to be given"
        )
    if not stored_resolutions:
        raise InputError(f"{folder} holds no samples: `cdm sample` leaves them in {folder}/train")
    resolution = resolution or stored_resolutions[-1]
    stored = Path(folder) / "train" / str(resolution)
    if not stored.is_dir():
        raise InputError(f"{folder} holds no samples of {resolution}x{resolution}: stored are {stored_resolutions}")
    return stored


def check_samples(manifests: Sequence[Manifest], folders: Sequence[Path]) -> None:
    """Refuse sets of samples that are not repetitions: all settings but the seed must be equal."""
    if not manifests:
        raise InputError("samples [] names no folder")
    settings = [manifest.extra.get("samples") or {} for manifest in manifests]
    seeds = [s.get("seed") for s in settings]
    if len(settings) > 1 and len(set(seeds)) < len(seeds):
        raise InputError(f"the seeds {seeds} of {[str(f) for f in folders]} repeat: error bars take disjoint seeds")
    starts = [s["start"] for s in settings if s.get("start")]
    if len(set(starts)) < len(starts):
        raise InputError(f"{[str(f) for f in folders]} go on from the same stored images: they are no disjoint samples")
    for name in settings[0]:
        values = [s.get(name) for s in settings]
        if name not in ("seed", "start") and any(value != values[0] for value in values):
            raise InputError(f"the samples differ in {name}: {values}; repetitions differ in their seed alone")
    for folder, manifest in zip(folders, manifests, strict=True):
        check_same_classes(manifests[0].class_names, manifest.class_names, folders[0], folder)


def check_manifest(card: ReferenceCard, detector: Detector, manifest: Manifest) -> None:
    """Refuse a card of other images or another detector, and samples that lack some of its classes."""
    classes = manifest.class_names
    check_images(card, detector, manifest.resolution, manifest.channels, classes, manifest.crop, manifest.filter)
    check_counts(card, None if manifest.classes == NO_CLASSES else manifest.counts)


def check_images(
    card: ReferenceCard,
    detector: Detector,
    resolution: int,
    channels: int,
    classes: Sequence[str] | None,
    crop: str | None,
    filter: str | None,
) -> None:
    """Refuse a card of other images or another detector. None means unknown, for the generated images."""
    # Manifests write "none" for unknown too.
    crop, filter = (None if value == "none" else value for value in (crop, filter))
    check_card(card, detector, resolution, channels, classes, crop, filter)


def check_counts(card: ReferenceCard, counts: Sequence[int] | None) -> None:
    """Refuse samples that lack a class of the card's images. counts: samples per class.

    None stands for an unconditional cascade, whose samples can be compared with any card.
    """
    if card.counts is None or counts is None:
        return
    if len(card.counts) != len(counts):
        raise InputError(f"{card.path} is of {len(card.counts)} classes, which do not compare with {len(counts)}")
    missing = [c for c, (real, made) in enumerate(zip(card.counts, counts, strict=True)) if real and not made]
    if missing:
        held = sum(count > 0 for count in counts)
        raise InputError(
            f"the samples hold {held} of the {len(card.counts)} classes of {card.path}, without class {missing[0]}: "
            "a distance would compare them with classes that they do not have"
        )
