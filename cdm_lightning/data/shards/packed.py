"""Packed shards: all images of a shard in one array. Any row can be read alone, and is checked by its CRC-32."""

from __future__ import annotations

import hashlib
import io
import math
import os
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cdm_lightning.data.shards.manifest import Manifest, Shard
from cdm_lightning.data.shards.tar import check_member
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import write_atomically

MAX_KEY_BYTES = 64


def npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    """The header of a .npy file, format 1.0: 128 bytes, the same with every version of numpy."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"


NPY_HEADER_BYTES = len(npy_header("|u1", (1,)))


def write_packed(path: Path, images: np.ndarray, labels: Sequence[int] | np.ndarray, keys: Sequence[str]) -> Shard:
    """Write one packed shard: an uncompressed tar of one WebDataset sample. Equal images give equal bytes.

    Its members are <stem>.labels.npy (int64, (N,)), .crc.npy (uint32 (N,), the CRC-32 of each image's bytes), .keys.npy
    (ASCII, (N,)) and, last, .images.npy. images: uint8 (N, H, W, C). Raises InputError if it cannot be written.
    """
    if bad := [key for key in keys if not key.isascii() or len(key) > MAX_KEY_BYTES]:
        raise InputError(
            f"{path} cannot hold the key {bad[0]!r}: ASCII of {MAX_KEY_BYTES} characters at most is needed"
        )
    images = np.ascontiguousarray(images, np.uint8)
    width = max([len(key) for key in keys], default=1)
    arrays = {
        "labels": np.asarray(labels, "<i8"),
        "crc": np.array([zlib.crc32(image) for image in images], "<u4"),
        "keys": np.array([key.encode("ascii") for key in keys], f"|S{width}"),
        "images": images,
    }
    parts: list[bytes | memoryview] = []
    for name, array in arrays.items():
        member = tarfile.TarInfo(f"{path.name.partition('.')[0]}.{name}.npy")
        member.size, member.mode = NPY_HEADER_BYTES + array.nbytes, 0o444
        padding = bytes(-member.size % tarfile.BLOCKSIZE)
        pixels = array.reshape(-1).view(np.uint8).data
        parts += [member.tobuf(tarfile.GNU_FORMAT), npy_header(array.dtype.str, array.shape), pixels, padding]
    head = sum(len(part) for part in parts[:-2])
    data = b"".join([*parts, bytes(2 * tarfile.BLOCKSIZE)])
    write_atomically(path, data)
    hashes = [hashlib.sha256(part).hexdigest() for part in (data, memoryview(data)[:head])]
    return Shard(path.name, len(images), len(data), hashes[0], head, hashes[1])


class PackedShard:
    """A packed shard, open for reading. Refuses a missing file, a wrong size, and a head with another SHA-256.

    The head holds the keys, labels and CRCs of all images, and its hash is in the manifest. Opening reads the head
    only; `read` checks each image by its CRC. Pixels are not memory-mapped, since a process dies if a mapped file is
    truncated. Memory is bounded by the size of the file.
    """

    def __init__(self, path: Path, shard: Shard, manifest: Manifest) -> None:
        self.path, self.head, self.size = path, shard.head, math.prod(manifest.shape)
        try:
            self.file = open(path, "rb", buffering=0)  # noqa: SIM115  # close() closes it
        except OSError as error:
            raise InputError(f"{path} cannot be read: {type(error).__name__}: {error.strerror or error}") from error
        try:
            label, crc, self.keys = self.read_checked_head(shard, manifest)
            self.label, self.crc = label.tolist(), crc.tolist()
        except BaseException:
            self.close()
            raise

    def read_checked_head(self, shard: Shard, manifest: Manifest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Labels, CRCs and keys, (N,) each, of a head whose size and hash are those in the manifest."""
        try:
            size, head = os.fstat(self.file.fileno()).st_size, os.pread(self.file.fileno(), shard.head, 0)
            if size != shard.bytes:
                raise InputError(
                    f"{self.path} has {size} bytes where its manifest says {shard.bytes}: it was cut or changed"
                )
            if hashlib.sha256(head).hexdigest() != shard.head_sha256:
                raise InputError(f"{self.path} is not the file its manifest lists: the SHA-256 of its head is another")
            return read_head(head, self.path, shard.count, manifest)
        except InputError:
            raise
        except Exception as error:  # from the disk, or from tarfile for a foreign archive
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(f"{self.path} cannot be read: {type(error).__name__}: {reason[:200]}") from error

    def prefetch(self, rows: np.ndarray) -> None:
        """Tell the operating system which images will be read, so that it loads them in the background."""
        if hasattr(os, "posix_fadvise"):
            for row in np.sort(rows).tolist():
                start = self.head + row * self.size
                os.posix_fadvise(self.file.fileno(), start, self.size, os.POSIX_FADV_WILLNEED)

    def key(self, row: int) -> str:
        """The key of one image."""
        return self.keys[row].decode("ascii", "backslashreplace")

    def read(self, row: int, image: np.ndarray) -> str | None:
        """Read one image into `image`, uint8 (H, W, C), contiguous. Returns None, or what is wrong with the image."""
        try:
            got = os.preadv(self.file.fileno(), [image.data], self.head + row * self.size)
        except OSError as error:
            return f"cannot be read: {type(error).__name__}: {error.strerror or error}"
        if got < self.size:
            return f"is cut: {got} of its {self.size} bytes are there"
        return None if zlib.crc32(image.data) == self.crc[row] else "is damaged: its CRC-32 is another"

    def close(self) -> None:
        self.file.close()


def read_head(head: bytes, path: Path, count: int, manifest: Manifest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, CRCs and keys of a head, which must hold exactly what `write_packed` writes for this manifest.

    The .npy headers are not parsed: the manifest determines their bytes, and they are compared.
    """
    types, arrays = {"labels": "<i8", "crc": "<u4", "keys": "|S", "images": "|u1"}, []
    with tarfile.open(fileobj=io.BytesIO(head), mode="r:") as tar:
        for name, descr in types.items():
            member = tar.next()
            name_in_tar = member.name[:80] if member else ""
            if member is None or not name_in_tar.endswith(f".{name}.npy"):
                raise InputError(f"{path} is no packed shard: it holds {name_in_tar!r}, not its {name}.npy")
            check_member(member, str(path))
            start, shape = (
                member.offset_data + NPY_HEADER_BYTES,
                (count, *manifest.shape) if name == "images" else (count,),
            )
            if name == "keys":
                descr += str(max(1, (member.size - NPY_HEADER_BYTES) // max(1, count)))
            nbytes = math.prod(shape) * np.dtype(descr).itemsize
            expected = npy_header(descr, shape)
            if member.size != NPY_HEADER_BYTES + nbytes or head[member.offset_data : start] != expected:
                raise InputError(f"{path} is no packed shard: its {name}.npy is not of type {descr} and shape {shape}")
            if name != "images":
                arrays.append(np.frombuffer(head, descr, count, start))
    if start != len(head):
        raise InputError(f"{path} is no packed shard: its pixels begin at byte {start}, not {len(head)}")
    labels, crc, keys = arrays
    return labels, crc, keys
