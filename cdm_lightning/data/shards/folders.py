"""Folders of shards, on a disk or at an address: how they are found, what their manifest says, and their files."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any, overload

from cdm_lightning.data.shards.cache import ShardCache
from cdm_lightning.data.shards.manifest import Manifest, Shard, check_types
from cdm_lightning.foundation.addresses import NoSuchFile, address_of, read_address
from cdm_lightning.foundation.errors import InputError

MAX_RESOLUTION = 4096  # that is looked for at an address, where folders cannot be listed


class RemoteFolder:
    """A folder of shards at an address, or a folder above it, in place of the Path of a local one.

    The shards are read through the cache.
    """

    def __init__(self, address: str, cache: ShardCache) -> None:
        self.address, self.cache = address.rstrip("/"), cache

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: str) -> RemoteFolder:
        return RemoteFolder(f"{self.address}/{name}", self.cache)

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]

    @cached_property
    def manifest(self) -> bytes:
        """The bytes of manifest.json. Raises NoSuchFile or NoAnswer."""
        return read_address(f"{self.address}/manifest.json")

    def find(self, split: str, resolution: int) -> RemoteFolder:
        """The folder of `split` at `resolution`, or else at the smallest power of two times it."""
        sizes = [resolution, *(resolution << n for n in range(1, 13) if resolution << n <= MAX_RESOLUTION)]
        for size in sizes:
            folder = self / split / str(size)
            try:
                assert folder.manifest is not None
                return folder
            except NoSuchFile as error:
                reason = str(error)
        raise InputError(
            f"{self / split} has no shards for resolution {resolution}: at {', '.join(map(str, sizes))} there is no "
            f"manifest.json (of the last, {reason}); shards are expected in <root>/<split>/<resolution>"
        )


Folder = Path | RemoteFolder


def shards_root(root: str | Path, cache: Path | None = None, cache_gb: float = 50) -> Folder:
    """The root of folders of shards that a path or an address names. cache, cache_gb: see `ShardDataModule`."""
    if (address := address_of(root)) is None:
        return Path(root)
    if "?" in address or "#" in address:
        raise InputError(
            f"{address} is no address of a folder: names of files are put behind it, so it takes no ? or #"
        )
    return RemoteFolder(address, ShardCache(cache, int(cache_gb * 1e9)))


@contextmanager
def local_file(folder: Folder, shard: Shard) -> Iterator[Path]:
    """The path of a shard of a folder, which stays there within the context as far as the cache is concerned."""
    if isinstance(folder, RemoteFolder):
        with folder.cache.local(str(folder / shard.name), shard) as path:
            yield path
    else:
        yield folder / shard.name


def read_manifest(folder: Folder, check_files: bool = True) -> Manifest:
    """Read manifest.json. Refuses a folder that is missing or unfinished.

    check_files: also refuse a folder with a missing shard, or one whose size is not that in the manifest. The shards at
    an address are checked when they are fetched.
    """
    remote = isinstance(folder, RemoteFolder)
    if isinstance(folder, RemoteFolder):
        data = folder.manifest
    else:
        refuse_address(folder := Path(folder))
        if not (folder / "manifest.json").is_file():
            raise InputError(
                f"{folder} holds no manifest.json, which `cdm prepare` writes last: it is no finished folder"
            )
        data = (folder / "manifest.json").read_bytes()
    path = folder / "manifest.json"
    try:
        fields = json.loads(data)
        manifest = Manifest(**{**fields, "shards": [Shard(**shard) for shard in fields["shards"]]})
        check_types(manifest)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{path} is not a manifest of shards: {type(error).__name__}: {error}") from error
    if not manifest.count:
        raise InputError(f"{folder} holds no images: its manifest lists {len(manifest.shards)} shards and 0 images")
    for shard in manifest.shards:
        if Path(shard.name).name != shard.name:
            raise InputError(f"{path} lists a shard {shard.name!r}: it must be the name of a file in its own folder")
        if remote and not re.fullmatch("[0-9a-f]{64}", shard.sha256):  # it names the file in the cache
            raise InputError(f"{path} lists {shard.name} with the SHA-256 {shard.sha256!r}, which is none")
        if remote or not check_files:
            continue
        file = Path(str(folder)) / shard.name
        if not file.is_file():
            raise InputError(f"{file} is missing: the manifest lists it with {shard.count} images")
        if (size := file.stat().st_size) != shard.bytes:
            raise InputError(f"{file} has {size} bytes where its manifest says {shard.bytes}: it was cut or changed")
    return manifest


def refuse_address(folder: Path) -> None:
    """Refuse an address where shards are read from a disk alone."""
    if address := address_of(folder):
        raise InputError(
            f"{address} is an address, and only data.root and data.val_root of cdm fit, validate and test may be one: "
            "copy the folder to a disk, and give its path"
        )


@overload
def find_folder(root: Path, split: str, resolution: int) -> Path: ...
@overload
def find_folder(root: Folder, split: str, resolution: int) -> Folder: ...
def find_folder(root: Folder, split: str, resolution: int) -> Folder:
    """The folder of `split` at `resolution`, or else at the smallest larger resolution that halving reduces to it."""
    if resolution < 1:
        raise InputError(f"resolution {resolution} is less than 1")
    if isinstance(root, RemoteFolder):
        return root.find(split, resolution)
    refuse_address(root)
    folder = Path(root) / split
    inside = folder.iterdir() if folder.is_dir() else ()
    stored = sorted(int(f.name) for f in inside if f.is_dir() and f.name.isdecimal())
    for place in (folder, Path(root)):
        if not stored and (tar := next(place.glob("*.tar*"), None)):
            raise InputError(
                f"{place} holds {tar.name}, and shards are expected in <root>/<split>/<resolution>: make them by "
                f"`cdm prepare webdataset --source {place} --split {split} --out OUT`"
            )
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist: shards are expected in <root>/<split>/<resolution>")
    for larger in stored:
        ratio = larger // resolution
        if ratio and larger == ratio * resolution and not ratio & (ratio - 1):
            return Path(root) / split / str(larger)
    raise InputError(
        f"{Path(root) / split} has no shards for resolution {resolution}: stored are {stored}, "
        "and only a stored resolution that is this one times a power of two can serve"
    )


Window = tuple[int, "list[Shard]", Any]  # first place, shards, order


def fetching_ahead(folder: Folder, windows: Iterator[Window]) -> Iterator[Window]:
    """The windows; while one is read, a thread fetches the shards of the next one.

    An error of the thread is left to whoever reads the shard.
    """
    if not isinstance(folder, RemoteFolder):
        yield from windows
        return
    wanted: SimpleQueue[Shard | None] = SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        while (shard := wanted.get()) is not None:
            with suppress(InputError), folder.cache.local(str(folder / shard.name), shard, stop):
                pass

    threading.Thread(target=work, daemon=True).start()
    try:
        window = next(windows, None)
        while window is not None:
            following = next(windows, None)
            for shard in [*window[1], *(following[1] if following else [])]:  # this one first: the reader needs it
                wanted.put(shard)
            yield window
            window = following
    finally:
        stop.set()
        wanted.put(None)
