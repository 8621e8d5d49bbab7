"""The manifest of a folder of shards: `<root>/<split>/<resolution>/` holds tars and a manifest.json.

A tar holds a (png, cls) pair for each image (tar.py) or, if packed, all its images in one array (packed.py).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cdm_lightning.foundation.files import write_atomically

MAX_IMAGES = 10_000_000  # in one shard
MAX_HEAD, MAX_HEAD_PER_IMAGE = 8192, 80  # bytes before the pixels of a packed shard


@dataclass(frozen=True)
class Shard:
    """One tar: its file name, how many images it holds, its size in bytes and its SHA-256.

    head, head_sha256: for a packed shard, the number of bytes before its first pixel, and their SHA-256.
    """

    name: str
    count: int
    bytes: int
    sha256: str
    head: int = 0
    head_sha256: str = ""


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds. `classes` are names in label order; `counts` are images per class."""

    resolution: int
    channels: int
    split: str
    classes: list[str]
    counts: list[int]
    shards: list[Shard]
    seed: int | None = None  # of the random order of all images
    crop: str = "none"  # how the raw image became square
    filter: str = "none"  # how it was resized to the largest resolution
    source: str = ""
    skipped: int = 0  # images of the source that could not be read
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of images in all shards."""
        return sum(shard.count for shard in self.shards)

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes; None for the numbers that samples of a cascade without names of its classes carry.

        Real images always have names: their classes may be called 0 ... n - 1.
        """
        numbers = [str(number) for number in range(len(self.classes))]
        return None if "samples" in self.extra and self.classes == numbers else self.classes

    @property
    def packed(self) -> bool:
        """Whether the shards are packed: either all are, or none."""
        return any(shard.head for shard in self.shards)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image as stored."""
        return self.resolution, self.resolution, self.channels


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json. It must be the last file of a folder: it marks the folder as finished."""
    fields = asdict(manifest)
    for shard in fields["shards"]:
        if not shard["head"]:  # a shard of PNGs
            del shard["head"], shard["head_sha256"]
    write_atomically(folder / "manifest.json", (json.dumps(fields, indent=1) + "\n").encode())


def shards_digest(shards: Sequence[Shard]) -> str:
    """One SHA-256 over the hashes of all shards: it is equal for folders with equal shards."""
    return hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()


def check_types(manifest: Manifest) -> None:
    """Raise ValueError for a field of the wrong type or out of range; JSON itself does not check."""
    lists = {"classes": manifest.classes, "counts": manifest.counts}
    texts = {"split": manifest.split, "crop": manifest.crop, "filter": manifest.filter, "source": manifest.source}
    numbers = {"resolution": manifest.resolution, "channels": manifest.channels, "skipped": manifest.skipped}
    for shard in manifest.shards:
        sizes = {"count": shard.count, "bytes": shard.bytes, "head": shard.head}
        numbers |= {f"{name} of {shard.name}": size for name, size in sizes.items()}
        texts |= {f"name {shard.name!r} of a shard": shard.name, f"sha256 of {shard.name}": shard.sha256}
        texts |= {f"head_sha256 of {shard.name}": shard.head_sha256}
    for name, value in lists.items():
        if not isinstance(value, list):
            raise ValueError(f"{name} is {value!r}, not a list")
    numbers |= {f"counts[{label}]": number for label, number in enumerate(manifest.counts)}
    texts |= {f"class {label}": name for label, name in enumerate(manifest.classes)}
    for name, number in numbers.items():
        if type(number) is not int or number < 0:
            raise ValueError(f"{name} is {number!r}, not a natural number")
    for shard in manifest.shards:
        if shard.count > min(
            shard.bytes, MAX_IMAGES
        ):  # else a line of JSON could make us allocate any amount of memory
            raise ValueError(f"{shard.name} of {shard.bytes} bytes cannot hold {shard.count} images")
        if manifest.packed and not 0 < shard.head <= shard.bytes - shard.count * math.prod(manifest.shape):
            raise ValueError(f"{shard.name} of {shard.bytes} bytes cannot hold {shard.count} images after its head")
        if shard.head > MAX_HEAD + MAX_HEAD_PER_IMAGE * shard.count:
            raise ValueError(f"{shard.name} has a head of {shard.head} bytes, too many for {shard.count} images")
    for name, text in texts.items():
        if not isinstance(text, str) or not text.isprintable():
            raise ValueError(f"{name} is {text!r}, not a line of text")
    if not isinstance(manifest.extra, dict):
        raise ValueError(f"extra is {manifest.extra!r}, not a table")
    if len(manifest.counts) != len(manifest.classes):
        raise ValueError(f"{len(manifest.counts)} counts are given for {len(manifest.classes)} classes")
