"""The search for memorised images: the share of samples that copy a real image, and nearest real neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cdm_lightning.data.shards import find_folder, read_manifest, shards_digest
from cdm_lightning.evaluation.metrics.manifold import copy_threshold, nearest
from cdm_lightning.evaluation.references.cards import ReferenceCard
from cdm_lightning.evaluation.report.stored_samples import read_pictures
from cdm_lightning.foundation.errors import InputError

EXPECTED_SHARE = 0.01  # of samples that count as copies when nothing is memorised
SHOWN, NEIGHBOURS = 8, 4  # generated images on the page, and real images next to each


def memorisation(card: ReferenceCard, sets: Sequence[torch.Tensor]) -> dict[str, Any]:
    """The share of generated images that count as copies: nearer to a real image than a threshold.

    The threshold is a distance in feature space: 1 % of the real images have a real neighbour nearer than this. sets:
    features (n, d) of generated images. Returns the table stored in results.json: share; expected, the share without
    memorisation; threshold; least, the smallest distance; searched, the number of real images; split.
    """
    assert card.features is not None
    threshold = copy_threshold(card.features, EXPECTED_SHARE)
    distance = torch.cat([nearest(card.features, features, 1)[0][:, 0] for features in sets])
    return {
        "share": float((distance <= threshold).double().mean()), "expected": EXPECTED_SHARE, "threshold": threshold,
        "least": float(distance.min()), "searched": len(card.features), "split": card.split,
    }  # fmt: skip


def neighbour_rows(card: ReferenceCard, features: torch.Tensor, samples: Path, real: Path) -> list[Any]:
    """The generated images nearest to real ones: rows (image, its real neighbours, distances, whether it is a copy).

    samples: folder of shards that `features` (n, d) were computed from. real: root of the shards that the card was made
    from. Raises InputError for other shards.
    """
    assert card.features is not None and card.places is not None
    folder = real_folder(card, real)
    distance, row = nearest(card.features, features, NEIGHBOURS)
    shown = distance[:, 0].argsort()[:SHOWN]
    threshold = copy_threshold(card.features, EXPECTED_SHARE)
    generated = read_pictures(samples, shown.tolist())
    found = read_pictures(folder, card.places[row[shown].flatten()].tolist(), card.resolution)
    rows = []
    for number, index in enumerate(shown.tolist()):
        around = found[number * row.shape[1] : (number + 1) * row.shape[1]]
        rows.append((generated[number], around, distance[index].tolist(), bool(distance[index, 0] <= threshold)))
    return rows


def card_to_search(cards: Sequence[ReferenceCard]) -> ReferenceCard:
    """The card whose images are searched for copies: the first of the training images, else the first card."""
    return next((card for card in cards if card.split == "train"), cards[0])


def real_folder(card: ReferenceCard, real: Path) -> Path:
    """The folder of shards under `real` that a card was made from. Raises InputError if it holds other images."""
    if card.shards_sha256 is None:
        raise InputError(f"{card.path} does not say which images it was made of, so none of {real} can be shown")
    folder = find_folder(real, str(card.split), int(card.resolution or 0))
    shards, count = read_manifest(folder).shards, card.count or 0
    measured = next((k for k in range(len(shards)) if sum(s.count for s in shards[:k]) >= count), len(shards))
    digests = (shards_digest(shards), shards_digest(shards[:measured]))  # all shards, or those of the first `count`
    if card.shards_sha256 not in digests:
        raise InputError(f"{folder} does not hold the images that {card.path} was made of")
    return folder
