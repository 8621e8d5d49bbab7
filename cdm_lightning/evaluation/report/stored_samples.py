"""Pictures from folders of shards: images by position, one of each class at every resolution, and contact sheets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from cdm_lightning.data.shards import Folder, Manifest, open_images, read_manifest
from cdm_lightning.foundation.class_names import NO_CLASSES
from cdm_lightning.foundation.images import downscale, encode_png

MOST_CLASSES, MOST_UNLABELLED = 20, 8  # rows of pictures on a page, with and without classes
SHEET_IMAGES, SHEET_COLUMNS = 40, 10


def read_pictures(folder: Folder, places: Sequence[int], resolution: int | None = None) -> list[torch.Tensor]:
    """Images of a folder of shards, uint8 (C, R, R), by stored position; downscaled to `resolution` if given."""
    manifest = read_manifest(folder)
    opened = open_images(folder, manifest, manifest.shards, places)
    image = torch.from_numpy(opened.read(range(len(places))).image).permute(0, 3, 1, 2)
    opened.close()
    return list(downscale(image, resolution or manifest.resolution))


def resolution_folders(folder: Path) -> list[Path]:
    """The folders of all resolutions that `cdm sample` stored, low to high. folder: one of them."""
    return sorted((f for f in folder.parent.iterdir() if f.name.isdecimal()), key=lambda f: int(f.name))


def stage_rows(folders: Sequence[Path]) -> list[tuple[str, list[torch.Tensor]]]:
    """The first sample of each class at every resolution: rows (class name, [image per resolution]).

    folders: shards of the same samples, from low to high resolution. Classes are ordered by their first samples.
    Without classes, the rows are the first samples.
    """
    manifest = read_manifest(folders[-1])
    if manifest.classes == NO_CLASSES:
        rows = {f"image {place}": place for place in range(min(MOST_UNLABELLED, manifest.count))}
    else:
        rows = {manifest.classes[label]: place for label, place in first_of_each_class(folders[-1], manifest).items()}
    columns = [read_pictures(folder, list(rows.values())) for folder in folders]
    return [(name, list(images)) for name, *images in zip(rows, *columns, strict=True)]


def first_of_each_class(folder: Path, manifest: Manifest) -> dict[int, int]:
    """The position of the first sample of each class, {label: position}, for the first MOST_CLASSES classes."""
    positions: dict[int, int] = {}
    wanted = min(MOST_CLASSES, sum(count > 0 for count in manifest.counts))
    first = 0
    for shard in manifest.shards:
        opened = open_images(folder, manifest, [shard], range(shard.count))
        for item in range(shard.count):
            positions.setdefault(opened.label(item), first + item)
            if len(positions) == wanted:
                break
        opened.close()
        if len(positions) == wanted:
            break
        first += shard.count
    return positions


def contact_sheet(folder: Path) -> bytes:
    """PNG bytes of the first 40 samples of a folder of shards, 10 per row."""
    images = read_pictures(folder, list(range(min(SHEET_IMAGES, read_manifest(folder).count))))
    blank = [torch.full_like(images[0], 255)] * (-len(images) % SHEET_COLUMNS)
    rows = torch.stack([*images, *blank]).split(SHEET_COLUMNS)
    whole = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)  # (C, rows * R, 10 * R)
    return encode_png(whole.permute(1, 2, 0).numpy())
