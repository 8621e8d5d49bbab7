"""Shards of PNGs: WebDataset tars, written reproducibly, and read safely from files that are not trusted.

Only plain files with safe names are read, and memory is bounded.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import webdataset as wds
from webdataset.tariterators import group_by_keys

from cdm_lightning.data.shards.manifest import Manifest, Shard, write_manifest
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import write_atomically
from cdm_lightning.foundation.images import encode_png

MAX_FILE_BYTES = 1 << 26  # of one file in a shard; 4096x4096 RGB pixels, uncompressed, are smaller


def tar_files(stream: BinaryIO, name: str) -> Iterator[dict[str, Any]]:
    """The files in a tar, gzipped or not, as webdataset groups them; refuses paths that lead out of their folder.

    Memory is bounded whatever the headers declare. A file larger than MAX_FILE_BYTES is refused, and so is a gzipped
    archive that unpacks to more than 50 times its size plus MAX_FILE_BYTES.
    """
    stream.seek(0)
    packed = stream.read(2) == b"\x1f\x8b"
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    source: Any = SizeLimitedStream(gzip.GzipFile(fileobj=stream), MAX_FILE_BYTES + 50 * size) if packed else stream
    with tarfile.open(fileobj=source, mode="r|") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps every header in memory
            check_member(member, name)
            if member.isdir():
                continue
            if member.size > MAX_FILE_BYTES:
                raise InputError(
                    f"{name} holds {member.name!r} of {member.size} bytes: more than {MAX_FILE_BYTES} is no image"
                )
            data = tar.extractfile(member).read()  # type: ignore[union-attr]  # a regular file
            yield {"fname": member.name, "data": data, "__url__": name}


def check_member(member: tarfile.TarInfo, name: str) -> None:
    """Refuse a member of the tar `name` that is no plain file or folder, or whose path leads out of the folder."""
    if not (member.isreg() or member.isdir()):
        raise InputError(f"{name} holds {member.name!r}, a link or a device: plain files alone are read")
    if not member.name.isprintable():
        raise InputError(f"{name} holds {member.name!r}: a name that cannot be printed is refused")
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise InputError(f"{name} holds {member.name!r}: a path that leads out of its folder is refused")


class SizeLimitedStream:
    """A stream that raises ValueError after `left` bytes: a small archive may unpack to more than the memory."""

    def __init__(self, stream: Any, left: int) -> None:
        self.stream, self.left = stream, left

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError("it unpacks to far more than its size, as no shard does")
        return data


def write_shard(path: Path, samples: Iterable[tuple[str, bytes, int]]) -> Shard:
    """Write (key, png, label) samples as one tar, gzipped if the name ends in .gz. Equal samples give equal bytes."""
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


def read_shard(path: Path, count: int | None = None, sha256: str | None = None) -> Iterator[dict[str, Any]]:
    """The samples of one shard in order, undecoded: {"__key__": str, "png": bytes, "cls": bytes}.

    count, sha256: the expected number of samples and hash of the file, where known. A file with another hash is refused
    before any sample is read. Raises InputError for a damaged shard. Nothing is extracted to disk.
    """
    seen = 0
    try:
        with open(path, "rb") as stream:  # WebDataset(path) treats some names as URLs or shell commands
            if sha256 is not None and hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
                raise InputError(f"{path} is not the file its manifest lists: its SHA-256 is another")
            for sample in group_by_keys(tar_files(stream, str(path))):
                seen += 1
                if count is not None and seen > count:
                    break
                yield sample
    except InputError:
        raise
    except Exception as error:  # a damaged archive makes tarfile, gzip or webdataset raise many kinds of error
        reason = getattr(error, "strerror", None) or str(error.args[0] if error.args else "")
        raise InputError(f"{path} cannot be read: {type(error).__name__}: {reason}") from error
    if count is not None and seen != count:
        more = "more" if seen > count else str(seen)
        raise InputError(f"{path} holds {more} images where its manifest says {count}")


def write_images(
    folder: Path,
    images: np.ndarray,
    labels: np.ndarray,
    keys: Sequence[int] | np.ndarray,
    classes: Sequence[str],
    seed: int | None,
    images_per_shard: int = 1000,
    suffix: str = ".tar",
    **metadata: Any,
) -> Manifest:
    """Write a finished folder <split>/<resolution> of images that fit in memory, shuffled by `seed` if it is not None.

    images: uint8 (N, R, R, C). labels: (N,). keys: (N,), their numbers in the source. metadata: further fields of the
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
    manifest = Manifest(resolution, channels, folder.parent.name, list(classes), counts, shards, seed, **metadata)
    write_manifest(folder, manifest)
    return manifest
