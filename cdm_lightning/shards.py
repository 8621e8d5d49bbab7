"""Folders of WebDataset shards: `<root>/<split>/<resolution>/` holds tars of (png, cls) and a manifest.json."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import webdataset as wds

from cdm_lightning import InputError


@dataclass(frozen=True)
class Shard:
    """One tar: its file name, how many images it holds, its size in bytes and its SHA-256."""

    name: str
    count: int
    bytes: int
    sha256: str


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


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside, then rename: `path` holds all of `data` or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"{path} could not be written: {error.strerror or error}") from error


def write_shard(path: Path, samples: Iterable[tuple[str, bytes, int]]) -> Shard:
    """Write (key, png, label) samples as one tar, or as a gzipped one where the name ends in .gz; same bytes each time."""
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


def read_shard(path: Path) -> Iterator[dict[str, Any]]:
    """The samples of one shard in order, undecoded: {"__key__": str, "png": bytes, "cls": bytes}."""
    dataset = wds.WebDataset(
        [str(path)], shardshuffle=False, nodesplitter=None, workersplitter=None, empty_check=False
    )
    return iter(dataset)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, the last file of a finished folder."""
    write_atomically(folder / "manifest.json", (json.dumps(asdict(manifest), indent=1) + "\n").encode())


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json and refuse a folder that is missing, unfinished, or whose shards differ in size from it."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no manifest.json: a folder of shards is what `cdm prepare` leaves when it ends")
    try:
        fields = json.loads(path.read_text())
        manifest = Manifest(**{**fields, "shards": [Shard(**shard) for shard in fields["shards"]]})
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is not a manifest of shards: {error}") from error
    if not manifest.count:
        raise InputError(f"{folder} holds no images: its manifest lists {len(manifest.shards)} shards and 0 images")
    for shard in manifest.shards:
        file = Path(folder) / shard.name
        if Path(shard.name).name != shard.name or not file.is_file():
            raise InputError(f"{file} is missing: the manifest lists it with {shard.count} images")
        if file.stat().st_size != shard.bytes:
            raise InputError(f"{file} has {file.stat().st_size} bytes where its manifest says {shard.bytes}: it is cut short or changed")
    return manifest


def find_folder(root: Path, split: str, resolution: int) -> Path:
    """The folder of `split` stored at `resolution`, else at the smallest larger one from which halving reaches it."""
    if not (Path(root) / split).is_dir():
        raise InputError(f"{Path(root) / split} does not exist: shards are expected in <root>/<split>/<resolution>")
    stored = sorted(int(f.name) for f in (Path(root) / split).iterdir() if f.is_dir() and f.name.isdigit())
    for larger in stored:
        ratio = larger // resolution
        if ratio and larger == ratio * resolution and not ratio & (ratio - 1):
            return Path(root) / split / str(larger)
    raise InputError(
        f"{Path(root) / split} has no shards for resolution {resolution}: stored are {stored}, "
        "and a power of two must lie between"
    )
