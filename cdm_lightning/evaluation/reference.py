"""Real images to compare with: the validation shards, streamed at the resolution that is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from cdm_lightning import InputError
from cdm_lightning.images import downscale
from cdm_lightning.shards import Manifest, Shard, decode_sample, find_folder, read_manifest, read_shard


def read_images(
    root: Path, split: str, resolution: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """All images of <root>/<split> in stored order: uint8 (B, C, R, R), reduced to R by 2x2 means, and their labels.

    Raises InputError where no stored resolution leads to R, or a folder is unfinished or holds what cannot be read.
    """
    folder = find_folder(root, split, resolution)
    manifest = read_manifest(folder)
    yield from stream(folder, manifest, manifest.shards, resolution, batch_size)


def stream(
    folder: Path, manifest: Manifest, shards: Sequence[Shard], resolution: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of the images of some shards of a folder, as `read_images` gives them."""
    images: list[np.ndarray] = []
    labels: list[int] = []
    for shard in shards:
        for sample in read_shard(folder / shard.name, shard.count):
            image, label = decode_sample(sample, manifest)
            images.append(image)
            labels.append(label)
            if len(images) == batch_size:
                yield batch_of(images, labels, resolution)
                images, labels = [], []
    if images:
        yield batch_of(images, labels, resolution)


def batch_of(images: list[np.ndarray], labels: list[int], resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return downscale(image, resolution), torch.tensor(labels)


def real_images_of(label: torch.Tensor, root: Path, split: str, resolution: int) -> torch.Tensor:
    """Real images, uint8 (N, C, R, R), of the classes in `label`, (N,): the first of each class, in stored order.

    Raises InputError where a class has fewer images than `label` asks for.
    """
    wanted = {c: (label == c).nonzero()[:, 0].tolist() for c in label.unique().tolist()}
    found: dict[int, torch.Tensor] = {}
    for batch, classes in read_images(root, split, resolution, 500):
        for image, c in zip(batch, classes.tolist(), strict=True):
            if wanted.get(c):
                found[wanted[c].pop(0)] = image
        if len(found) == len(label):
            return torch.stack([found[i] for i in range(len(label))])
    c = next(c for c, places in wanted.items() if places)
    asked = int((label == c).sum())
    raise InputError(
        f"n = {len(label)} asks for {asked} real images of class {c}, and {root}/{split} has {asked - len(wanted[c])}"
    )
