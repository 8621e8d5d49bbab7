"""The files in an untrusted tar: only plain ones of ordinary names, and no more memory than an honest one needs."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from cdm_lightning.foundation.errors import InputError

LARGEST = 1 << 26  # bytes of a file in a shard: 4096x4096 pixels in colour, not compressed, have fewer


def files_of(stream: BinaryIO, name: str) -> Iterator[dict[str, Any]]:
    """The files in a tar, gzipped or not, as webdataset groups them; refuses what could reach outside a folder.

    Memory is bounded whatever the headers declare: no file, and no more than 50 times the archive, above LARGEST.
    """
    stream.seek(0)
    packed = stream.read(2) == b"\x1f\x8b"
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    source: Any = Bounded(gzip.GzipFile(fileobj=stream), LARGEST + 50 * size) if packed else stream
    with tarfile.open(fileobj=source, mode="r|") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # else it remembers every header
            check_member(member, name)
            if member.isdir():
                continue
            if member.size > LARGEST:
                raise InputError(
                    f"{name} holds {member.name!r} of {member.size} bytes: more than {LARGEST} is no image"
                )
            data = tar.extractfile(member).read()  # type: ignore[union-attr]  # a regular file
            yield {"fname": member.name, "data": data, "__url__": name}


def check_member(member: tarfile.TarInfo, name: str) -> None:
    """Refuse a member of the tar `name` that is no plain file or folder, or whose path leads out of its folder."""
    if not (member.isreg() or member.isdir()):
        raise InputError(f"{name} holds {member.name!r}, a link or a device: plain files alone are read")
    if not member.name.isprintable():
        raise InputError(f"{name} holds {member.name!r}: a name that cannot be printed is refused")
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise InputError(f"{name} holds {member.name!r}: a path that leads out of its folder is refused")


class Bounded:
    """A stream of which no more than `left` bytes can be read: a small archive may unpack to more than memory holds."""

    def __init__(self, stream: Any, left: int) -> None:
        self.stream, self.left = stream, left

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError("it unpacks to far more than its size, as no shard does")
        return data
