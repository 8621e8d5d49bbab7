"""Real images for comparison: reads the shards of a split at any resolution, and writes subsets of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cdm_lightning.data.shards import (
    Folder,
    Manifest,
    Shard,
    find_folder,
    in_batches,
    open_images,
    read_manifest,
    write_manifest,
    write_shard,
)
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import downscale, encode_png, stored_to_tensor
from cdm_lightning.foundation.progress_bar import ProgressBar
from cdm_lightning.foundation.randomness import key

IMAGES_PER_SHARD = 1000


def read_images(
    root: Folder, split: str, resolution: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """All images of <root>/<split> in stored order, uint8 (B, C, R, R), reduced to R by 2x2 means, and labels (B,).

    Raises InputError if no stored resolution can be reduced to R, or if the folder is unfinished or damaged.
    """
    folder = find_folder(root, split, resolution)
    manifest = read_manifest(folder)
    yield from stream_shards(folder, manifest, manifest.shards, resolution, batch_size)


def stream_shards(
    folder: Folder,
    manifest: Manifest,
    shards: Sequence[Shard],
    resolution: int,
    batch_size: int,
    at_most: int | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of images and labels of some shards of a folder, as in `read_images`.

    at_most: how many images of each shard, from the first; None for all.
    """
    rows = [range(s.count)[:at_most] for s in shards]
    windows = ((np.array(r), open_images(folder, manifest, [s], r)) for s, r in zip(shards, rows, strict=True))
    for _, images in in_batches(windows, batch_size):
        image = stored_to_tensor(images.image)
        yield downscale(image, resolution), torch.from_numpy(images.label)


def first_images(n: int, root: Folder, split: str, resolution: int) -> torch.Tensor:
    """The first n real images in stored order, whatever their classes: uint8 (n, C, R, R)."""
    images: list[torch.Tensor] = []
    for batch, _ in read_images(root, split, resolution, 500):
        images.extend(batch)
        if len(images) >= n:
            return torch.stack(images[:n])
    raise InputError(f"n = {n} asks for {n} real images, and {root}/{split} has {len(images)}")


def real_images_for_labels(label: torch.Tensor, root: Folder, split: str, resolution: int) -> torch.Tensor:
    """Real images, uint8 (N, C, R, R), whose classes are `label`, (N,): the first of each class in stored order.

    Raises InputError if a class has fewer images than `label` needs.
    """
    wanted = {c: (label == c).nonzero()[:, 0].tolist() for c in label.unique().tolist()}
    images: dict[int, torch.Tensor] = {}
    for batch, classes in read_images(root, split, resolution, 500):
        for image, c in zip(batch, classes.tolist(), strict=True):
            if wanted.get(c):
                images[wanted[c].pop(0)] = image
        if len(images) == len(label):
            return torch.stack([images[i] for i in range(len(label))])
    c = next(c for c, places in wanted.items() if places)
    asked = int((label == c).sum())
    raise InputError(
        f"n = {len(label)} asks for {asked} real images of class {c}, and {root}/{split} has {asked - len(wanted[c])}"
    )


def write_subset(root: Path, split: str, resolution: int, counts: Sequence[int], out: Path, seed: int) -> Manifest:
    """Write out/train/<resolution>: counts[c] images of each class c, chosen at random with `seed` from a split.

    Makes one pass in stored order, with one shard in memory. Images keep their keys and their order, which is random
    already. If `resolution` is stored, PNGs are copied; else images are reduced by 2x2 means. A finished folder is left
    unchanged. Raises InputError if a class has too few images, or if `out` holds another subset.
    """
    source = find_folder(root, split, resolution)
    manifest, folder = read_manifest(source), Path(out) / "train" / str(resolution)
    digest = hashlib.sha256("".join(shard.sha256 for shard in manifest.shards).encode()).hexdigest()
    extra = {"subset": {"split": split, "shards_sha256": digest, "counts": list(counts), "seed": seed}}
    extra |= {name: manifest.extra[name] for name in ("samples",) if name in manifest.extra}
    if (folder / "manifest.json").is_file():
        existing = read_manifest(folder)
        if existing.extra != extra:
            raise InputError(f"{folder} holds another choice of images than the one asked for: choose another folder")
        return existing
    if len(counts) != len(manifest.classes):
        raise InputError(f"{len(counts)} counts are given, and {source} has {len(manifest.classes)} classes")
    for c, (asked, held) in enumerate(zip(counts, manifest.counts, strict=True)):
        if asked > held:
            raise InputError(f"{asked} images of class {c} ({manifest.classes[c]}) are asked for, {source} has {held}")
    shards: list[Shard] = []
    with ProgressBar(total=sum(counts), desc=f"subset of {source}", unit="image") as bar:
        chosen = chosen_samples(source, manifest, resolution, counts, seed)
        while samples := list(islice(chosen, IMAGES_PER_SHARD)):
            shards.append(write_shard(folder / f"{len(shards):06d}.tar", samples))
            bar.update(len(samples))
    metadata: dict[str, Any] = {"crop": manifest.crop, "filter": manifest.filter, "source": str(root), "extra": extra}
    subset = Manifest(resolution, manifest.channels, "train", manifest.classes, list(counts), shards, seed, **metadata)
    if subset.count != sum(counts):
        raise InputError(f"{source} holds fewer images of some class than its manifest's counts {manifest.counts}")
    write_manifest(folder, subset)
    return subset


def chosen_samples(
    source: Path, manifest: Manifest, resolution: int, counts: Sequence[int], seed: int
) -> Iterator[tuple[str, bytes, int]]:
    """(key, png, label) of counts[c] random images of each class c, in stored order."""
    kept = []
    for c, (asked, held) in enumerate(zip(counts, manifest.counts, strict=True)):
        kept.append(set(np.random.default_rng(key(seed, "subset", c)).choice(held, asked, replace=False).tolist()))
    ranks = [count() for _ in counts]  # counts the images of each class passed so far
    for shard in manifest.shards:
        opened = open_images(source, manifest, [shard], range(shard.count))
        for item in range(shard.count):
            label = opened.label(item)
            if next(ranks[label]) in kept[label]:
                png = opened.png(item)
                if resolution != manifest.resolution:
                    image = torch.from_numpy(opened.load(item)[0]).permute(2, 0, 1)
                    png = encode_png(downscale(image, resolution).permute(1, 2, 0).numpy())
                yield opened.key(item), png, label
        opened.close()
