"""Reference cards: the moments and features of real images in one file, with all that a distance to them depends on."""

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
from cdm_lightning.foundation.bars import Bar
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import write_atomically

ENOUGH = 50_000  # images on each side, as published distances have it


@dataclass(frozen=True)
class Facts:
    """What a card says of its images and features in JSON; None is unknown."""

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
    shards_sha256: str | None  # over the SHA-256 of every shard
    made: dict[str, Any]  # when, from which stored resolution, with which versions


@dataclass(frozen=True, eq=False)
class ReferenceCard(Facts):
    """What one measured set of images is, and its moments; of the first images the features too.

    moments: float64. Where `count` is None (statistics of others), moments.n is 2, a stand-in, and the mean and the
    covariance hold.
    features: float32 (k, d), and places: int64 (k,), the positions of those images in stored order.
    canonical: whether the features are the canonical Inception's, decided by the hash alone.
    """

    path: Path
    moments: Moments
    features: torch.Tensor | None = field(repr=False)
    places: torch.Tensor | None = field(repr=False)

    def about(self) -> dict[str, Any]:
        """The card without its numbers, as JSON can hold it."""
        return {field.name: getattr(self, field.name) for field in fields(Facts)}

    @property
    def canonical(self) -> bool:
        return self.detector_sha256 == Inception.sha256


def write_card(card: ReferenceCard) -> None:
    """One safetensors file: tensors total, outer, features, places, and everything else as JSON in its metadata."""
    facts = {name: getattr(card, name) for name in Facts.__dataclass_fields__}
    tensors = {"total": card.moments.total, "outer": card.moments.outer}
    if card.features is not None and card.places is not None:
        tensors |= {"features": card.features, "places": card.places}
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(card.path, save_safetensors(whole, {"card": json.dumps(facts)}))


def read_card(path: str | Path, detector: Detector | None = None, count: int | None = None) -> ReferenceCard:
    """A card that `cdm reference` wrote, or one made of an .npz in ADM's format; raises InputError for anything else.

    An .npz of mu and sigma says nothing about its making, so that all of it is None on its card, but for the detector:
    ADM measured with the canonical Inception in TensorFlow, the same weights. count: how many images are behind them,
    where that is known. An .npz of images alone (arr_0) has its features computed by `detector`, and so have the images
    that ADM puts beside mu and sigma, whose features are None on the card without a detector. ADM's mu_s and sigma_s
    (spatial features) are not read.
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
    """Raise ValueError where a fact is of another type than it should be, which JSON lets pass."""
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
    """Raise ValueError where a card's numbers do not fit one another."""
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
        bar = Bar(images, detector.name, -(-images.shape[0] // images.batch_size), unit="batch")
        device = next(detector.parameters(), torch.zeros(0)).device
        features = torch.cat([features_of(detector, image.to(device)).cpu() for image in bar])
    resolution, channels = images.shape[2:] if images else (None, None)
    facts = Facts(None, None, resolution, channels, None, None, count, None, None, "", "", None, {})
    places = None if features is None else torch.arange(len(features))
    about: dict[str, Any] = {"path": path, "features": features, "places": places}
    if {"mu", "sigma"} <= names:
        if count is not None and count < 2:
            raise InputError(f"count is {count}: mu and sigma are of 2 images or more")
        moments = Moments.from_covariance(count or 2, *adm.read_statistics(path, Inception.num_features))
        if detector is not None and detector.sha256 != Inception.sha256:
            about |= {"features": None, "places": None}  # they would not go with the moments
        facts = replace(facts, detector=Inception.name, detector_sha256=Inception.sha256)
        return ReferenceCard(**asdict(facts), moments=moments, **about)
    if images is None:
        raise InputError(f"{path} holds {sorted(names)}, and neither mu and sigma nor images arr_0")
    if detector is None or features is None:
        raise InputError(f"{path} holds images and no statistics: a detector must be given to measure them")
    if len(features) < 2:
        raise InputError(f"{path} holds {len(features)} image, and moments take 2 or more")
    counts = adm.count_labels(path, len(features)) if "arr_1" in names else None
    facts = replace(facts, count=len(features), counts=counts)
    facts = replace(facts, detector=detector.name, detector_sha256=detector.sha256)
    return ReferenceCard(**asdict(facts), moments=Moments.of([features]), **about)


def check_card(
    card: ReferenceCard,
    detector: Detector | None = None,
    resolution: int | None = None,
    channels: int | None = None,
    classes: Sequence[str] | None = None,
    crop: str | None = None,
    filter: str | None = None,
) -> None:
    """Refuse to compare with a card of other images or features; None on either side is unknown and not compared."""
    if detector is not None and detector.sha256 != card.detector_sha256:
        raise InputError(
            f"{card.path} holds features of {card.detector} (SHA-256 {card.detector_sha256}), "
            f"which do not compare with those of {detector.name} (SHA-256 {detector.sha256})"
        )
    for name, given in (("resolution", resolution), ("channels", channels), ("crop", crop), ("filter", filter)):
        known = getattr(card, name)
        if None not in (known, given) and known != given:
            raise InputError(f"{card.path} is of images with {name} {known}, which do not compare with {name} {given}")
    if card.classes is None or classes is None or card.classes == list(classes):
        return
    if len(card.classes) != len(classes):
        raise InputError(f"{card.path} is of {len(card.classes)} classes, which do not compare with {len(classes)}")
    label = next(k for k, name in enumerate(classes) if card.classes[k] != name)
    raise InputError(f"{card.path} calls class {label} {card.classes[label]!r}, and the images {classes[label]!r}")


def names_of(cards: Sequence[ReferenceCard]) -> list[str]:
    """What to call cards beside one another, each differently: by its split, by its file's name, or by both."""
    names = [card.split or card.path.stem for card in cards]
    if len(set(names)) < len(names):
        both = [f"{card.split}_{card.path.stem}" if card.split else card.path.stem for card in cards]
        names = [full if names.count(name) > 1 else name for name, full in zip(names, both, strict=True)]
    repeated = {name for name in names if names.count(name) > 1}  # files of one name in several folders
    return [f"{name}_{number}" if name in repeated else name for number, name in enumerate(names, 1)]


def about_all(cards: Sequence[ReferenceCard]) -> list[dict[str, Any]]:
    """The cards without their numbers, under the names that figures against them carry."""
    return [{"name": name, **card.about()} for card, name in zip(cards, names_of(cards), strict=True)]


def bias_note(n: int | None) -> str:
    """What to say beside a distance of n images: "" for 50,000 or more, else that so few make it larger."""
    if n is None:
        return "the number of images is not known, and the fewer there are the larger the distance"
    if n >= ENOUGH:
        return ""
    return f"n = {n:,} is less than {ENOUGH:,}, which makes the distance larger: compare it at equal n only"
