"""Shards at an address: fetched, checked by their SHA-256, and kept in a folder of bounded size.

All processes of a machine share the folder, without a server: files are complete once they have their name, and locks
of the operating system (flock), which end with the process that holds them, say what is fetched and what is read.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cdm_lightning.data.shards.manifest import Manifest, Shard
from cdm_lightning.foundation.addresses import several_tries
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import cache_folder

CHUNK = 1 << 20  # bytes that are asked for at once
CACHED = re.compile(r"[0-9a-f]{64}(\.partial)?")  # names of our files in the cache


class ShardCache:
    """A folder of shards from anywhere, of at most `size` bytes, shared by the processes of a machine.

    A file is named by its SHA-256: equal shards of two addresses are kept once, and a changed manifest never leads to
    an old file. The shards that were used longest ago make room for new ones, but none that is being read; only if all
    are does the folder grow beyond its bound. Any of the files may be removed by hand.
    """

    def __init__(self, folder: Path | None, size: int) -> None:
        self.folder, self.size = Path(folder) if folder is not None else cache_folder() / "shards", size

    @contextmanager
    def local(self, address: str, shard: Shard, stop: threading.Event | None = None) -> Iterator[Path]:
        """The local file of a shard, fetched if need be. It stays there within the context.

        stop: of a shard that is fetched ahead, which is given up when this is set, or where there is no room for it.
        Raises InputError for a file that was changed, NoSuchFile, or NoAnswer.
        """
        try:
            while (descriptor := self.hold(shard)) is None:
                self.fetch(address, shard, stop)
        except OSError as error:
            raise self.refusal(address, error) from error
        try:
            yield self.folder / shard.sha256
        finally:
            os.close(descriptor)  # frees the lock

    def hold(self, shard: Shard) -> int | None:
        """A descriptor of the file of a shard, with a lock that keeps it in the cache. None if it is not there."""
        path = self.folder / shard.sha256
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                if is_at(descriptor, path):
                    if os.fstat(descriptor).st_size == shard.bytes:
                        os.utime(path)  # it is used now
                        return descriptor
                    path.unlink()  # cut by a power failure
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        return None

    def fetch(self, address: str, shard: Shard, stop: threading.Event | None) -> None:
        """Fetch a shard, unless another process has done so in the meantime. The caller looks again.

        The unfinished file is the lock: others wait for it, and it is free if this process is killed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / shard.sha256
        partial = path.with_name(f"{path.name}.partial")
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # Not LOCK_EX: the file gets its name, and others read it and hold it, perhaps while they wait for us.
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                return
            if not is_at(descriptor, partial):
                return  # whoever fetched it gave it its name, or failed
            try:
                if path.exists():
                    partial.unlink()
                    return
                self.make_room(descriptor, shard, stop)
                self.download(descriptor, address, shard, stop)
                os.fsync(descriptor)  # else the rename could reach the disk before the data
                if is_at(descriptor, partial):  # nobody has emptied the folder by hand
                    partial.rename(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        finally:
            os.close(descriptor)

    def make_room(self, descriptor: int, shard: Shard, stop: threading.Event | None) -> None:
        """Remove the shards used longest ago until this one fits, and give its unfinished file its size at once.

        Unfinished files of processes that have ended go in any case.
        """
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two processes that make room must know of each other's files
            os.ftruncate(descriptor, 0)
            found = []
            for entry in os.scandir(self.folder):
                with suppress(FileNotFoundError):
                    if CACHED.fullmatch(entry.name):
                        found.append((entry.stat().st_mtime_ns, entry.stat().st_size, Path(entry.path)))
            total = sum(size for _, size, _ in found)
            for _, size, path in sorted(found, key=lambda one: (one[2].suffix != ".partial", one[0])):
                if total + shard.bytes > self.size or path.suffix == ".partial":
                    total -= size if remove_if_free(path) else 0
            if stop is not None and total + shard.bytes > self.size:
                raise InputError(f"{self.folder} has no room for a shard that is fetched ahead")
            os.ftruncate(descriptor, shard.bytes)

    def download(self, descriptor: int, address: str, shard: Shard, stop: threading.Event | None) -> None:
        """Write the file at an address to a descriptor. Raises InputError if it is not the one of the manifest."""

        def copy(files: Any, path: str) -> str:
            """The SHA-256 of what was copied, or "" for a file of another size."""
            digest, left = hashlib.sha256(), shard.bytes
            with files.open(path, block_size=0) as source:  # 0: as one stream, where the protocol can
                while data := source.read(min(CHUNK, left + 1)):
                    if stop is not None and stop.is_set():
                        raise InputError(f"{address} is not needed any more")
                    if len(data) > left:
                        return ""
                    self.write(descriptor, data, shard.bytes - left, address)
                    digest.update(data)
                    left -= len(data)
            return "" if left else digest.hexdigest()

        for _ in range(2):  # what lies between may have answered with an old file
            if several_tries(address, copy) == shard.sha256:
                return
        raise InputError(f"{address} was changed on the server: its size or SHA-256 is not the one in its manifest")

    def write(self, descriptor: int, data: bytes, place: int, address: str) -> None:
        """Write all of the data to a place of a file."""
        try:
            while data:
                written = os.pwrite(descriptor, data, place)
                data, place = data[written:], place + written
        except OSError as error:
            raise self.refusal(address, error) from error

    def refusal(self, address: str, error: OSError) -> InputError:
        """What to say of an error of the disk."""
        return InputError(
            f"the cache {self.folder} cannot hold {address}: {error.strerror or error}; data.cache may name another "
            f"folder, and data.cache_gb, now {self.size / 1e9:g}, less"
        )

    def check_size(self, owner: object, manifest: Manifest, window: int) -> None:
        """Refuse a bound that is too small for the window of shards that is read and the one that is fetched ahead."""
        sizes = sorted((shard.bytes for shard in manifest.shards), reverse=True)
        if self.size < (least := sum(sizes[: 2 * window])):
            raise InputError(
                f"data.cache_gb {self.size / 1e9:g} is too small for {owner}, which is read in windows of data.window "
                f"{window} shards while the next are fetched: give at least {math.ceil(least / 1e6) / 1e3:g}"
            )


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at `path`."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def remove_if_free(path: Path) -> bool:
    """Remove a file that no process holds; whether it was."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    except OSError:  # held, or gone already
        return False
    finally:
        os.close(descriptor)
