"""Folders of WebDataset shards: `<root>/<split>/<resolution>/` holds tars and a manifest.json.

A tar holds a (png, cls) for each image, or, packed, all images of the shard in one array (packed.py).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from webdataset.tariterators import group_by_keys

from cdm_lightning.data.shards.tar import files_of
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import encode_png

MOST = 10_000_000  # images in a shard
HEAD, HEAD_EACH = 8192, 80  # bytes before the pixels of a packed shard are fewer than these, and these of each image


@dataclass(frozen=True)
class Shard:
    """One tar: its file name, how many images it holds, its size in bytes and its SHA-256.

    head, head_sha256: of a packed shard alone, how many bytes lie before its first pixel, and their SHA-256.
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
    seed: int | None = None  # of the one global random order
    crop: str = "none"  # how the raw image became square
    filter: str = "none"  # how it reached the largest resolution prepared with it
    source: str = ""
    skipped: int = 0  # images of the source that could not be read
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return sum(shard.count for shard in self.shards)

    @property
    def packed(self) -> bool:
        """Whether the shards are of the packed form: all are, or none."""
        return any(shard.head for shard in self.shards)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image as stored."""
        return self.resolution, self.resolution, self.channels


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside, then rename: `path` holds all of `data` or what it held before, a power cut included.

    Any number of processes may write the same path: each has a partial file of its own, and the last rename wins. What
    killed ones left of the same path goes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for turn in range(100):
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
        try:
            partial.write_bytes(data)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())  # a rename may reach the disk before the data it names
            partial.replace(path)
            for left in path.parent.glob(f"{escape(path.name)}.*.partial"):
                left.unlink(missing_ok=True)
            return
        except OSError as error:
            gone = isinstance(error, FileNotFoundError) and path.parent.is_dir()
            partial.unlink(missing_ok=True)
            if turn == 99 or not gone:  # gone: another process, which has finished, took it for one that was left
                raise InputError(f"{path} could not be written: {error.strerror or error}") from error


def write_shard(path: Path, samples: Iterable[tuple[str, bytes, int]]) -> Shard:
    """Write (key, png, label) samples as one tar, gzipped where the name ends in .gz; the same bytes each time."""
    buffer, count = io.BytesIO(), 0
    with wds.TarWriter(buffer, encoder=False, mtime=0) as writer:
        for key, png, label in samples:
            writer.write({"__key__": key, "png": png, "cls": str(label).encode()})
            count += 1
    data = buffer.getvalue()
    if path.suffix == ".gz":
        data = gzip.compress(data, compresslevel=9, mtime=0)
    write_atomically(path, data)
    return Shard(path.name, count, len(data), hashlib.sha256(data).hexdigest())


def write_images(
    folder: Path,
    images: np.ndarray,
    labels: np.ndarray,
    keys: Sequence[int] | np.ndarray,
    classes: Sequence[str],
    seed: int | None,
    images_per_shard: int = 1000,
    suffix: str = ".tar",
    **about: Any,
) -> Manifest:
    """Write a finished folder <split>/<resolution> of images that fit in memory, in an order of `seed`, or as they are.

    images: uint8 (N, R, R, C). labels: (N,). keys: (N,), their numbers in the source. about: the other fields of the
    manifest, such as crop and source.
    """
    order = np.arange(len(images)) if seed is None else np.random.default_rng(seed).permutation(len(images))
    shards = []
    for number, start in enumerate(range(0, len(order), images_per_shard)):
        samples = [
            (f"{keys[position]:05d}", encode_png(images[position]), int(labels[position]))
            for position in order[start : start + images_per_shard]
        ]
        shards.append(write_shard(folder / f"{number:03d}{suffix}", samples))
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    resolution, channels = images.shape[1], images.shape[3]
    manifest = Manifest(resolution, channels, folder.parent.name, list(classes), counts, shards, seed, **about)
    write_manifest(folder, manifest)
    return manifest


def read_shard(path: Path, count: int | None = None, sha256: str | None = None) -> Iterator[dict[str, Any]]:
    """The samples of one shard in order, undecoded: {"__key__": str, "png": bytes, "cls": bytes}; refuses a torn one.

    count, sha256: how many there must be, and the hash of the file, where they are known. A file of another hash is
    refused before any of it is read. Nothing is extracted to disk.
    """
    seen = 0
    try:
        with open(path, "rb") as stream:  # WebDataset(path) would take some names for addresses or commands
            if sha256 is not None and hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
                raise InputError(f"{path} is not the file its manifest lists: its SHA-256 is another")
            for sample in group_by_keys(files_of(stream, str(path))):
                seen += 1
                if count is not None and seen > count:
                    break
                yield sample
    except InputError:
        raise
    except Exception as error:  # whatever a torn archive makes tarfile, gzip or webdataset raise
        reason = getattr(error, "strerror", None) or str(error.args[0] if error.args else "")
        raise InputError(f"{path} cannot be read: {type(error).__name__}: {reason}") from error
    if count is not None and seen != count:
        more = "more" if seen > count else str(seen)
        raise InputError(f"{path} holds {more} images where its manifest says {count}")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, the last file of a finished folder."""
    fields = asdict(manifest)
    for shard in fields["shards"]:
        if not shard["head"]:  # of PNGs: as ever
            del shard["head"], shard["head_sha256"]
    write_atomically(folder / "manifest.json", (json.dumps(fields, indent=1) + "\n").encode())


def read_manifest(folder: Path, whole: bool = True) -> Manifest:
    """Read manifest.json and refuse a folder that is missing or unfinished.

    whole: also one whose shards are missing or differ in size from it.
    """
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no manifest.json, which `cdm prepare` writes last: it is no finished folder")
    try:
        fields = json.loads(path.read_text())
        manifest = Manifest(**{**fields, "shards": [Shard(**shard) for shard in fields["shards"]]})
        check_types(manifest)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{path} is not a manifest of shards: {type(error).__name__}: {error}") from error
    if not manifest.count:
        raise InputError(f"{folder} holds no images: its manifest lists {len(manifest.shards)} shards and 0 images")
    for shard in manifest.shards:
        file = Path(folder) / shard.name
        if Path(shard.name).name != shard.name:
            raise InputError(f"{path} lists a shard {shard.name!r}: it must be the name of a file in its own folder")
        if not whole:
            continue
        if not file.is_file():
            raise InputError(f"{file} is missing: the manifest lists it with {shard.count} images")
        if (size := file.stat().st_size) != shard.bytes:
            raise InputError(f"{file} has {size} bytes where its manifest says {shard.bytes}: it was cut or changed")
    return manifest


def digest_of(shards: Sequence[Shard]) -> str:
    """One hash that says whether two folders of shards hold the same."""
    return hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()


def check_types(manifest: Manifest) -> None:
    """Raise ValueError where a field that others compute with is of another type, which JSON lets pass."""
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
        if shard.count > min(shard.bytes, MOST):  # else a line of JSON could ask for any amount of memory
            raise ValueError(f"{shard.name} of {shard.bytes} bytes cannot hold {shard.count} images")
        if manifest.packed and not 0 < shard.head <= shard.bytes - shard.count * math.prod(manifest.shape):
            raise ValueError(f"{shard.name} of {shard.bytes} bytes cannot hold {shard.count} images after its head")
        if shard.head > HEAD + HEAD_EACH * shard.count:
            raise ValueError(f"{shard.name} has a head of {shard.head} bytes, too many for {shard.count} images")
    for name, text in texts.items():
        if not isinstance(text, str) or not text.isprintable():
            raise ValueError(f"{name} is {text!r}, not a line of text")
    if not isinstance(manifest.extra, dict):
        raise ValueError(f"extra is {manifest.extra!r}, not a table")
    if len(manifest.counts) != len(manifest.classes):
        raise ValueError(f"{len(manifest.counts)} counts are given for {len(manifest.classes)} classes")


def find_folder(root: Path, split: str, resolution: int) -> Path:
    """The folder of `split` stored at `resolution`, else at the smallest larger one from which halving reaches it."""
    if resolution < 1:
        raise InputError(f"resolution {resolution} is less than 1")
    if not (Path(root) / split).is_dir():
        raise InputError(f"{Path(root) / split} does not exist: shards are expected in <root>/<split>/<resolution>")
    stored = sorted(int(f.name) for f in (Path(root) / split).iterdir() if f.is_dir() and f.name.isdecimal())
    for larger in stored:
        ratio = larger // resolution
        if ratio and larger == ratio * resolution and not ratio & (ratio - 1):
            return Path(root) / split / str(larger)
    raise InputError(
        f"{Path(root) / split} has no shards for resolution {resolution}: stored are {stored}, "
        "and a power of two must lie between"
    )
