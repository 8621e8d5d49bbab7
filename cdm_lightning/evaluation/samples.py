"""Folders of stored samples to measure: found, checked against one another, and against a reference card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cdm_lightning.data.shards import Manifest, read_manifest
from cdm_lightning.evaluation.detectors import Detector
from cdm_lightning.evaluation.references.cards import ReferenceCard, check_card
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.sampling.manifest import NO_CLASSES


def sample_folders(samples: Sequence[Path], resolution: int | None) -> tuple[list[Path], list[Manifest]]:
    """The shards of several sets of samples, and their manifests; refuses what is no repetition of one setting."""
    folders = [sample_folder(folder, resolution) for folder in samples]
    manifests = [read_manifest(folder) for folder in folders]
    check_samples(manifests, samples)
    return folders, manifests


def sample_folder(folder: Path, resolution: int | None) -> Path:
    """The shards of samples of that resolution, None for the finest, in a folder of `cdm sample`."""
    have = sorted(int(f.name) for f in (Path(folder) / "train").glob("*") if f.name.isdecimal())
    if not have:
        raise InputError(f"{folder} holds no samples: `cdm sample` leaves them in {folder}/train")
    resolution = resolution or have[-1]
    stored = Path(folder) / "train" / str(resolution)
    if not stored.is_dir():
        raise InputError(f"{folder} holds no samples of {resolution}x{resolution}: stored are {have}")
    return stored


def check_samples(manifests: Sequence[Manifest], folders: Sequence[Path]) -> None:
    """Refuse sets of samples that are no repetitions of one another: all the same but for the seed."""
    if not manifests:
        raise InputError("samples [] names no folder")
    about = [manifest.extra.get("samples") or {} for manifest in manifests]
    seeds = [a.get("seed") for a in about]
    if len(about) > 1 and len(set(seeds)) < len(seeds):
        raise InputError(f"the seeds {seeds} of {[str(f) for f in folders]} repeat: error bars take disjoint seeds")
    starts = [a["start"] for a in about if a.get("start")]
    if len(set(starts)) < len(starts):
        raise InputError(f"{[str(f) for f in folders]} go on from the same stored images: they are no disjoint samples")
    for name in about[0]:
        values = [a.get(name) for a in about]
        if name not in ("seed", "start") and any(value != values[0] for value in values):
            raise InputError(f"the samples differ in {name}: {values}; repetitions differ in their seed alone")


def check_manifest(card: ReferenceCard, detector: Detector, manifest: Manifest) -> None:
    """Refuse a card made of other images or by another detector, and samples that lack some of its classes."""
    unnamed = manifest.classes == [str(c) for c in range(len(manifest.classes))]  # by a bundle that knows no names
    classes = None if unnamed else manifest.classes
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
    """Refuse a card made of other images or by another detector; what is None of the generated ones is unknown."""
    crop, filter = (None if value == "none" else value for value in (crop, filter))  # "none" is written for unknown too
    check_card(card, detector, resolution, channels, classes, crop, filter)


def check_counts(card: ReferenceCard, counts: Sequence[int] | None) -> None:
    """Refuse samples, of so many images per class, that lack some class of a card's images.

    None is a cascade without classes: its images are of all of them, and compare with a card of any.
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
            "a distance to images of all classes would not be theirs"
        )
