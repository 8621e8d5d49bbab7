"""The search for memorised images, and the pictures of samples beside their nearest real neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cdm_lightning.data.shards import Manifest, find_folder, open_images, read_manifest, shards_digest
from cdm_lightning.evaluation.metrics.manifold import copy_threshold, nearest
from cdm_lightning.evaluation.references.cards import ReferenceCard
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import downscale, encode_png
from cdm_lightning.sampling.manifest import NO_CLASSES

EXPECTED = 0.01  # share of honest samples that the threshold takes for copies
SHOWN, NEIGHBOURS, CLASSES, SHEET, COLUMNS = 8, 4, 20, 40, 10


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


def pictures(folder: Path, places: Sequence[int], resolution: int | None = None) -> list[torch.Tensor]:
    """uint8 (C, R, R) images of a folder of shards by their places in stored order."""
    manifest = read_manifest(folder)
    opened = open_images(folder, manifest, manifest.shards, places)
    image = torch.from_numpy(opened.read(range(len(places))).image).permute(0, 3, 1, 2)
    opened.close()
    return list(downscale(image, resolution or manifest.resolution))


def stored(folder: Path) -> list[Path]:
    """All resolutions of a folder of `cdm sample`, low to high, of which `folder` is one."""
    return sorted((f for f in folder.parent.iterdir() if f.name.isdecimal()), key=lambda f: int(f.name))


def stage_rows(folders: Sequence[Path]) -> list[tuple[str, list[torch.Tensor]]]:
    """The first sample of each class at every resolution, from folders of shards of the same samples, low to high.

    Classes come in the order of their first samples. Without classes, the first samples whatever they are.
    """
    manifest = read_manifest(folders[-1])
    if manifest.classes == NO_CLASSES:
        rows = {f"image {place}": place for place in range(min(SHOWN, manifest.count))}
    else:
        rows = {manifest.classes[label]: place for label, place in first_of_each(folders[-1], manifest).items()}
    columns = [pictures(folder, list(rows.values())) for folder in folders]
    return [(name, list(images)) for name, *images in zip(rows, *columns, strict=True)]


def first_of_each(folder: Path, manifest: Manifest) -> dict[int, int]:
    """Where the first sample of a class lies, of the first 20 classes that come."""
    found: dict[int, int] = {}
    wanted = min(CLASSES, sum(count > 0 for count in manifest.counts))
    first = 0
    for shard in manifest.shards:
        opened = open_images(folder, manifest, [shard], range(shard.count))
        for item in range(shard.count):
            found.setdefault(opened.label(item), first + item)
            if len(found) == wanted:
                break
        opened.close()
        if len(found) == wanted:
            break
        first += shard.count
    return found


def sheet(folder: Path) -> bytes:
    """PNG bytes of the first samples of a folder of shards, ten a row."""
    images = pictures(folder, list(range(min(SHEET, read_manifest(folder).count))))
    blank = [torch.full_like(images[0], 255)] * (-len(images) % COLUMNS)
    rows = torch.stack([*images, *blank]).split(COLUMNS)
    whole = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)  # (C, rows * R, 10 * R)
    return encode_png(whole.permute(1, 2, 0).numpy())
