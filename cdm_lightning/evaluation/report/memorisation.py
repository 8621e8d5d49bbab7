"""The search for memorised images: how many samples copy a real one, and the real images nearest to samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cdm_lightning.data.shards import find_folder, read_manifest, shards_digest
from cdm_lightning.evaluation.metrics.manifold import copy_threshold, nearest
from cdm_lightning.evaluation.references.cards import ReferenceCard
from cdm_lightning.evaluation.report.stored_samples import pictures
from cdm_lightning.foundation.errors import InputError

EXPECTED = 0.01  # share of honest samples that the threshold takes for copies
SHOWN, NEIGHBOURS = 8, 4  # generated images on the page, and real ones beside each


def memorisation(card: ReferenceCard, sets: Sequence[torch.Tensor]) -> dict[str, Any]:
    """How many generated images lie nearer to a real one than 1 % of the real ones lie to one another.

    sets: features (n, d) of generated images. share: of them below `threshold`; about `expected` is honest.
    """
    assert card.features is not None
    threshold = copy_threshold(card.features, EXPECTED)
    distance = torch.cat([nearest(card.features, features, 1)[0][:, 0] for features in sets])
    return {
        "share": float((distance <= threshold).double().mean()), "expected": EXPECTED, "threshold": threshold,
        "least": float(distance.min()), "searched": len(card.features), "split": card.split,
    }  # fmt: skip


def neighbour_rows(card: ReferenceCard, features: torch.Tensor, samples: Path, real: Path) -> list[Any]:
    """The generated images that lie nearest to real ones: (image, its real neighbours, distances, whether a copy).

    samples: the folder of shards behind `features`. real: root of the shards behind the card; others are refused.
    """
    assert card.features is not None and card.places is not None
    folder = real_folder(card, real)
    distance, row = nearest(card.features, features, NEIGHBOURS)
    shown = distance[:, 0].argsort()[:SHOWN]
    threshold = copy_threshold(card.features, EXPECTED)
    generated = pictures(samples, shown.tolist())
    found = pictures(folder, card.places[row[shown].flatten()].tolist(), card.resolution)
    rows = []
    for number, index in enumerate(shown.tolist()):
        around = found[number * row.shape[1] : (number + 1) * row.shape[1]]
        rows.append((generated[number], around, distance[index].tolist(), bool(distance[index, 0] <= threshold)))
    return rows


def searched(cards: Sequence[ReferenceCard]) -> ReferenceCard:
    """The card whose images are searched for copies: the training images', where there is one."""
    return next((card for card in cards if card.split == "train"), cards[0])


def real_folder(card: ReferenceCard, real: Path) -> Path:
    """The folder of shards under `real` that a card was made of; refuses any other."""
    if card.shards_sha256 is None:
        raise InputError(f"{card.path} does not say which images it was made of, so that none of {real} can be shown")
    folder = find_folder(real, str(card.split), int(card.resolution or 0))
    shards, count = read_manifest(folder).shards, card.count or 0
    measured = next((k for k in range(len(shards)) if sum(s.count for s in shards[:k]) >= count), len(shards))
    if card.shards_sha256 not in (
        shards_digest(shards),
        shards_digest(shards[:measured]),
    ):  # of all, or of the first `count`
        raise InputError(f"{folder} does not hold the images that {card.path} was made of")
    return folder
