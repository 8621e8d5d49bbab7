"""Pictures for people to look at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from cdm_lightning.data.shards.manifest import write_atomically


def save_grid(rows: Sequence[Sequence[torch.Tensor]], path: str | Path, cell: int, gap: int = 2) -> None:
    """Save rows of images as one PNG, each image enlarged to `cell` pixels by nearest neighbour.

    rows: uint8 (C, H, W) images; rows may differ in length and images in size.
    """
    columns = max(len(row) for row in rows)
    size = (columns * (cell + gap) - gap, len(rows) * (cell + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            array = image.cpu().permute(1, 2, 0).numpy()
            picture = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).convert("RGB")
            sheet.paste(picture.resize((cell, cell), Image.Resampling.NEAREST), (x * (cell + gap), y * (cell + gap)))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_atomically(Path(path), buffer.getvalue())  # two commands on one folder may end at the same moment
