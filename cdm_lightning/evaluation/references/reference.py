"""`cdm reference`: measure real images once, and write their moments and features as a reference card."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from jsonargparse.typing import PositiveInt

from cdm_lightning import __version__
from cdm_lightning.data.shards import Manifest, find_folder, read_manifest, shards_digest
from cdm_lightning.evaluation.detectors import Detector, check_channels, load_detector
from cdm_lightning.evaluation.metrics.distance import Moments
from cdm_lightning.evaluation.references.cards import ReferenceCard, bias_note, write_card
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import check_output_folder
from cdm_lightning.foundation.process_group import Accelerator, first_process
from cdm_lightning.foundation.progress_bar import ProgressBar


def reference(
    shards: Path,
    out: Path,
    resolution: PositiveInt,
    split: str = "train",
    detector: str = "inception",
    keep: int = 10_000,
    count: int | None = None,
    devices: PositiveInt = 1,
    accelerator: Accelerator = "auto",
    batch_size: int = 50,
    trust_detector: bool = False,
) -> None:
    """Measure real images once: moments and features for FID, KID, precision and recall, in one file.

    If it is stopped, the same command continues, from <out>.partial-features. The numbers do not depend on the number
    of processes.

    Args:
        shards: Root of the images, with <split>/<resolution>/ in it.
        out: The .safetensors file to write.
        resolution: Resolution of the images; larger ones are reduced to it.
        split: Which split to measure.
        detector: inception, fashion-cnn-64, or the path of a detector's file.
        keep: Number of images whose features are stored: the first in stored order, which is random.
        count: Number of images to measure, from the first; null for all.
        devices: Number of processes.
        accelerator: cpu, gpu or auto.
        batch_size: Images per detector call, in each process.
        trust_detector: Allow a TorchScript that is not the canonical Inception; it is run as a program.
    """
    card = make_card(
        shards, out, resolution, split, detector, keep, count, devices, accelerator, batch_size, trust_detector
    )
    if card is not None:
        print_card(card)


def make_card(
    shards: Path,
    out: Path,
    resolution: int,
    split: str,
    detector: str,
    keep: int = 10_000,
    count: int | None = None,
    devices: int = 1,
    accelerator: str = "auto",
    batch_size: int = 50,
    trust_detector: bool = False,
) -> ReferenceCard | None:
    """What `cdm reference` does, but for its words; the card is returned in the first process alone."""
    out = Path(out)
    if out.suffix != ".safetensors":
        raise InputError(f"{out} does not end in .safetensors, as a reference card does")
    check_output_folder(out.parent)
    if out.exists():
        raise InputError(f"{out} exists already: remove it or give another name")
    if keep < 0:
        raise InputError(f"keep is {keep}: it must be at least 0")
    folder = find_folder(shards, split, resolution)
    stored = read_manifest(folder)
    n = stored.count if count is None else count
    if not 2 <= n <= stored.count:
        raise InputError(f"count is {n}: moments take 2 images or more, and {folder} holds {stored.count}")
    from cdm_lightning.evaluation.metrics.features import extract_features

    network = load_detector(detector, trust_detector)
    check_channels(network, stored.channels)
    work = out.with_name(out.name + ".partial-features")
    manifest = extract_features(shards, split, resolution, network, work, devices, accelerator, batch_size, n)
    if not first_process():  # Lightning sets it when processes start
        return None
    card = summarize(out, manifest, n, resolution, network, keep, work)
    write_card(card)
    shutil.rmtree(work)
    return card


def print_card(card: ReferenceCard) -> None:
    """Print what a card holds, with notes for readers of figures against it."""
    names, size = card.classes or [], card.resolution
    present = [name for name, c in zip(names, card.counts or [], strict=True) if c]
    kept = 0 if card.features is None else len(card.features)
    print(
        f"{card.path}: {card.count:,} images {size}x{size} of {len(present)} of {len(names)} classes, "
        f"{len(card.moments.total)} features of {card.detector} each, {kept:,} kept"
    )
    for note in (f"all of them are of one class, {present[0]}" if len(present) == 1 else "", bias_note(card.count)):
        print(f"note: {note}") if note else None


def summarize(
    out: Path, manifest: Manifest, n: int, resolution: int, detector: Detector, keep: int, work: Path
) -> ReferenceCard:
    """The card of the first n images, from their features in the folder `work`, read one shard at a time."""
    from cdm_lightning.evaluation.metrics.features import read_features

    kept: list[torch.Tensor] = []
    counts = torch.zeros(len(manifest.classes), dtype=torch.int64)

    def feature_batches() -> Iterator[torch.Tensor]:
        """The features by shard; counts their labels and keeps the first ones on the way."""
        wanted = min(keep, n)
        for features, label in ProgressBar(
            read_features(work, manifest), "moments", len(manifest.shards), unit="shard"
        ):
            counts.add_(label.bincount(minlength=len(counts)))
            kept.append(features[:wanted].clone())
            yield features
            wanted = max(0, wanted - len(features))

    moments = Moments.from_features(feature_batches())
    packages = ("torch", "lightning", "numpy", "pillow")
    made = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "stored_resolution": manifest.resolution,
        "versions": {"cdm_lightning": __version__, **{name: version(name) for name in packages}},
    }
    return ReferenceCard(
        source=manifest.source or None, split=manifest.split, resolution=resolution, channels=manifest.channels,
        crop=manifest.crop, filter=manifest.filter, count=n, classes=manifest.classes, counts=counts.tolist(),
        detector=detector.name, detector_sha256=detector.sha256, shards_sha256=shards_digest(manifest.shards),
        made=made, path=out, moments=moments, features=torch.cat(kept) if keep else None,
        places=torch.arange(min(keep, n)) if keep else None,
    )  # fmt: skip
