"""Pictures out of folders of shards: samples by place, one of each class at every resolution, a sheet of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from cdm_lightning.data.shards import Manifest, open_images, read_manifest
from cdm_lightning.foundation.images import downscale, encode_png
from cdm_lightning.sampling.manifest import NO_CLASSES

CLASSES, UNNAMED = 20, 8  # most rows of a page's pictures, with classes and without
SHEET, COLUMNS = 40, 10  # images of a sheet, and how many of them in a row


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
        rows = {f"image {place}": place for place in range(min(UNNAMED, manifest.count))}
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
