"""Blocks of images for a page: stages side by side, nearest real neighbours, and samples by level s."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cdm_lightning.evaluation.report.figure_tables import format_number
from cdm_lightning.evaluation.report.page import Block, Pixels, Slider, Table, size_of
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import encode_png

Picture = torch.Tensor | bytes  # uint8 (C, H, W), C = 1 or 3, or an encoded PNG


def png_of(picture: Picture) -> bytes:
    """PNG bytes of a picture. Raises InputError for a tensor that is not uint8 (1 or 3, H, W)."""
    if isinstance(picture, bytes):
        return picture
    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] not in (1, 3):
        raise InputError(f"a picture on a page is uint8 (1 or 3, H, W), not {picture.dtype} {tuple(picture.shape)}")
    return encode_png(picture.cpu().permute(1, 2, 0).numpy())


def enlarged(picture: Picture, alt: str, least_width: int = 0, below: str = "", flag: bool = False) -> Pixels:
    """An image enlarged by a whole factor to at least `least_width` CSS pixels, with a text below it."""
    png = png_of(picture)
    width = size_of(png)[0]
    return Pixels(png, width * math.ceil(max(least_width, width) / width), alt, below, flag)


def stages_grid(rows: Sequence[tuple[str, Sequence[Picture]]], caption: str = "") -> list[Block]:
    """A table of images: one row per class, one column per resolution, all enlarged to the same size.

    rows: (class name, one image per resolution, from low to high). [] without images.
    """
    if not rows or not rows[0][1]:
        return []
    stages = [(name, [png_of(image) for image in images]) for name, images in rows]
    widths = [size_of(png)[0] for png in stages[0][1]]
    shown = max(widths) * math.ceil(112 / max(widths))  # a multiple of the largest width, and so of the others
    lines = [
        [name, *(enlarged(png, "{}, generated, {} × {}".format(name, *size_of(png)), shown) for png in images)]
        for name, images in stages
    ]
    caption = caption or "Generated images: each row shows the output of every stage for one image"
    return [Table(caption, ["class", *(f"{width} × {width}" for width in widths)], lines, pictures=True)]


def neighbours_grid(
    rows: Sequence[tuple[Picture, Sequence[Picture], Sequence[float], bool]], measured_in: str = ""
) -> list[Block]:
    """A table of generated images and their nearest real images, nearest first. Copies are marked as such.

    rows: (generated image, real neighbours, their distances, whether it counts as a copy). measured_in: the space of
    the distances, such as "features of inception". [] without rows.
    """
    if not rows:
        return []
    most = max(len(neighbours) for _, neighbours, _, _ in rows)
    lines: list[list[Any]] = []
    for index, (image, neighbours, distances, is_copy) in enumerate(rows, 1):
        cells = [enlarged(image, f"generated image {index}", 96, "copy" if is_copy else "generated", flag=is_copy)]
        for rank, (neighbour, distance) in enumerate(zip(neighbours, distances, strict=True), 1):
            alt = f"real neighbour {rank} of generated image {index}, at distance {format_number(distance)}"
            cells.append(enlarged(neighbour, alt, cells[0].wide, format_number(distance)))
        lines.append([*cells, *[None] * (most - len(neighbours))])
    copies = [index for index, row in enumerate(rows) if row[3]]
    space = f" in {measured_in}" if measured_in else ""
    caption = f"Generated images and their nearest real neighbours, with the distance{space}"
    heads = ["generated", "nearest", *(f"nearest {rank}" for rank in range(2, most + 1))][: most + 1]
    summary = f"{len(copies)} of the {len(rows)} images shown count as copies of a real one."
    return [Table(caption, heads, lines, marked=copies, pictures=True), summary]


def level_slider(pictures: Mapping[int, bytes], start: int | None = None, what: str = "Samples") -> list[Block]:
    """A slider over the samples of each level s.

    pictures: PNG bytes per s. start: the s shown first; None for the smallest. what: alt text. [] without pictures.
    """
    if not pictures:
        return []
    shown = {s: enlarged(pictures[s], f"{what} at s = {s}", 480) for s in sorted(pictures)}
    return [Slider(shown, start if start in shown else min(shown))]
