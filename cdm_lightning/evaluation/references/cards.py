"""Reference cards: the moments and features of real images in one file, with everything that a distance depends on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors

from cdm_lightning.evaluation.detectors import Detector, Inception, features_of
from cdm_lightning.evaluation.metrics.distance import Moments
from cdm_lightning.evaluation.references import adm
from cdm_lightning.foundation.class_names import check_same_classes
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import write_atomically
from cdm_lightning.foundation.progress_bar import ProgressBar

ENOUGH = 50_000  # images on each side in published distances


@dataclass(frozen=True)
class Facts:
    """The metadata of a card: its images and features, stored as JSON. None is unknown."""

    source: str | None
    split: str | None
    resolution: int | None
    channels: int | None
    crop: str | None
    filter: str | None
    count: int | None
    classes: list[str] | None
    counts: list[int] | None  # images per class
    detector: str
    detector_sha256: str
    shards_sha256: str | None  # shards_digest of the images
    made: dict[str, Any]  # when, from which stored resolution, with which versions


@dataclass(frozen=True, eq=False)
class ReferenceCard(Facts):
    """One measured set of images: its metadata, the moments of all features, and the features of the first images.

    moments: float64. If `count` is None (published statistics), moments.n is a placeholder, 2; mean and covariance are
    right.
    features: float32 (k, d). places: int64 (k,), the positions of these k images in stored order.
    canonical: whether the features are those of the canonical Inception, by the detector's hash.
    """

    path: Path
    moments: Moments
    features: torch.Tensor | None = field(repr=False)
    places: torch.Tensor | None = field(repr=False)

    def summary(self) -> dict[str, Any]:
        """The card's metadata as a dictionary for JSON, without moments and features."""
        return {field.name: getattr(self, field.name) for field in fields(Facts)}

    @property
    def canonical(self) -> bool:
        return self.detector_sha256 == Inception.sha256


def write_card(card: ReferenceCard) -> None:
    """Write a card: a safetensors file of total, outer, features and places, with the metadata as JSON."""
    facts = {name: getattr(card, name) for name in Facts.__dataclass_fields__}
    tensors = {"total": card.moments.total, "outer": card.moments.outer}
    if card.features is not None and card.places is not None:
        tensors |= {"features": card.features, "places": card.places}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(card.path, save_safetensors(contiguous, {"card": json.dumps(facts)}))


def read_card(path: str | Path, detector: Detector | None = None, count: int | None = None) -> ReferenceCard:
    """Read a card of `cdm reference`, or make one from an .npz in ADM's format. Raises InputError for any other file.

    An .npz with mu and sigma has no metadata, so that its card has None for all of it except the detector: ADM measured
    with the same canonical Inception, in TensorFlow. count: the number of images behind mu and sigma, if known.
    Images in an .npz (arr_0), alone or beside mu and sigma, have their features computed by `detector`; without one,
    the card of mu and sigma has no features. ADM's mu_s and sigma_s (spatial features) are not read.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist: it should be a reference card or ADM's .npz")
    if path.suffix == ".npz":
        return read_npz(path, detector, count)
    try:
        with safe_open(path, "pt") as stored:
            facts = Facts(**json.loads((stored.metadata() or {})["card"]))
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # no mapping
        moments = Moments(facts.count or 2, tensors["total"], tensors["outer"])
        features, places = tensors.get("features"), tensors.get("places")
        check_tensors(facts, moments, features, places)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is no reference card: {adm.reason(error)}") from error
    return ReferenceCard(**asdict(facts), path=path, moments=moments, features=features, places=places)


def check_facts(facts: Facts) -> None:
    """Raise ValueError for metadata of the wrong type; JSON itself does not check."""
    for name in ("detector", "detector_sha256", "source", "split", "crop", "filter", "shards_sha256"):
        value = getattr(facts, name)
        unknown = value is None and not name.startswith("detector")
        if not (unknown or (isinstance(value, str) and value.isprintable())):
            raise ValueError(f"{name} is {value!r}")
    for name in ("resolution", "channels"):
        value = getattr(facts, name)
        if not (value is None or (type(value) is int and value > 0)):
            raise ValueError(f"{name} is {value!r}")
    for name, kind in (("classes", str), ("counts", int)):
        value = getattr(facts, name)
        if not (value is None or (isinstance(value, list) and all(type(each) is kind for each in value))):
            raise ValueError(f"{name} is no list of {kind.__name__}")
    if not isinstance(facts.made, dict) or min(facts.counts or [0]) < 0:
        raise ValueError(f"made is {facts.made!r}, counts are {facts.counts!r}")


def check_tensors(facts: Facts, moments: Moments, features: torch.Tensor | None, places: torch.Tensor | None) -> None:
    """Raise ValueError for moments, features or places of wrong shape or type, or with values that are not finite."""
    check_facts(facts)
    if type(facts.count) not in (int, type(None)) or moments.n < 2:
        raise ValueError(f"count is {facts.count!r}, and 2 images or more are needed")
    if moments.total.ndim != 1 or moments.outer.shape != 2 * moments.total.shape:
        raise ValueError(f"moments of shapes {tuple(moments.total.shape)} and {tuple(moments.outer.shape)}")
    if {moments.total.dtype, moments.outer.dtype} != {torch.float64}:
        raise ValueError(f"moments of {moments.total.dtype}, not float64")
    if (features is None) != (places is None):
        raise ValueError("features and places come together")
    if features is not None and places is not None:
        expected = (len(places), len(moments.total))
        if features.shape != expected or features.dtype != torch.float32 or places.dtype != torch.int64:
            raise ValueError(
                f"features of {features.dtype} {tuple(features.shape)} where float32 {expected} is expected"
            )
    for tensor in (moments.total, moments.outer, *([] if features is None else [features])):
        if not tensor.isfinite().all():
            raise ValueError("numbers that are not finite")


def read_npz(path: Path, detector: Detector | None, count: int | None) -> ReferenceCard:
    """A card from ADM's reference statistics or from images in its sample format."""
    names = adm.names_in(path)
    images = adm.find_images(path) if "arr_0" in names else None
    features = None
    if detector is not None and images is not None:
        bar = ProgressBar(images, detector.name, -(-images.shape[0] // images.batch_size), unit="batch")
        device = next(detector.parameters(), torch.zeros(0)).device
        features = torch.cat([features_of(detector, image.to(device)).cpu() for image in bar])
    resolution, channels = images.shape[2:] if images else (None, None)
    facts = Facts(None, None, resolution, channels, None, None, count, None, None, "", "", None, {})
    places = None if features is None else torch.arange(len(features))
    tensors: dict[str, Any] = {"path": path, "features": features, "places": places}
    if {"mu", "sigma"} <= names:
        if count is not None and count < 2:
            raise InputError(f"count is {count}: mu and sigma are of 2 images or more")
        moments = Moments.from_covariance(count or 2, *adm.read_statistics(path, Inception.num_features))
        if detector is not None and detector.sha256 != Inception.sha256:
            tensors |= {"features": None, "places": None}  # features of another detector do not match the moments
        facts = replace(facts, detector=Inception.name, detector_sha256=Inception.sha256)
        return ReferenceCard(**asdict(facts), moments=moments, **tensors)
    if images is None:
        raise InputError(f"{path} holds {sorted(names)}, and neither mu and sigma nor images arr_0")
    if detector is None or features is None:
        raise InputError(f"{path} holds images and no statistics: a detector must be given to measure them")
    if len(features) < 2:
        raise InputError(f"{path} holds {len(features)} image, and moments take 2 or more")
    counts = adm.count_labels(path, len(features)) if "arr_1" in names else None
    facts = replace(facts, count=len(features), counts=counts)
    facts = replace(facts, detector=detector.name, detector_sha256=detector.sha256)
    return ReferenceCard(**asdict(facts), moments=Moments.from_features([features]), **tensors)


def check_card(
    card: ReferenceCard,
    detector: Detector | None = None,
    resolution: int | None = None,
    channels: int | None = None,
    classes: Sequence[str] | None = None,
    crop: str | None = None,
    filter: str | None = None,
) -> None:
    """Refuse a card of other images or another detector. What is None on either side is unknown and not compared."""
    if detector is not None and detector.sha256 != card.detector_sha256:
        raise InputError(
            f"{card.path} holds features of {card.detector} (SHA-256 {card.detector_sha256}), "
            f"which do not compare with those of {detector.name} (SHA-256 {detector.sha256})"
        )
    for name, given in (("resolution", resolution), ("channels", channels), ("crop", crop), ("filter", filter)):
        known = getattr(card, name)
        if None not in (known, given) and known != given:
            raise InputError(f"{card.path} is of images with {name} {known}, which do not compare with {name} {given}")
    check_same_classes(card.classes, classes, card.path, "the images")


def card_names(cards: Sequence[ReferenceCard]) -> list[str]:
    """A different name for each of several cards: its split, its file name, or both."""
    names = [card.split or card.path.stem for card in cards]
    if len(set(names)) < len(names):
        both = [f"{card.split}_{card.path.stem}" if card.split else card.path.stem for card in cards]
        names = [full if names.count(name) > 1 else name for name, full in zip(names, both, strict=True)]
    repeated = {name for name in names if names.count(name) > 1}  # files with the same name in several folders
    return [f"{name}_{number}" if name in repeated else name for number, name in enumerate(names, 1)]


def card_summaries(cards: Sequence[ReferenceCard]) -> list[dict[str, Any]]:
    """The metadata of several cards, each with the name that figures use for it."""
    return [{"name": name, **card.summary()} for card, name in zip(cards, card_names(cards), strict=True)]


def bias_note(n: int | None) -> str:
    """A note for a distance over n images: "" for 50,000 or more, else that it is biased upwards."""
    if n is None:
        return "the number of images is not known, and the fewer there are the larger the distance"
    if n >= ENOUGH:
        return ""
    return f"n = {n:,} is less than {ENOUGH:,}, which makes the distance larger: compare it at equal n only"
