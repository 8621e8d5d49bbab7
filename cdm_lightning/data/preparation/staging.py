"""Sources that cannot be read at random: fetched or unpacked file by file into plain tars, which are indexed instead.

A source is several files: at addresses, on the disk, or the output of commands. What is staged stays in
OUT/SPLIT/.progress/staged until the shards are made, so that a stopped command goes on with the files that are missing.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cdm_lightning.data.preparation.listing import Listing
from cdm_lightning.data.preparation.prepare import recorded_name
from cdm_lightning.data.preparation.tasks import PROGRESS
from cdm_lightning.foundation.addresses import address_of, is_address, several_tries
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.progress_bar import ProgressBar

PIPE = "pipe:"
CHUNK = 1 << 22  # bytes that are copied at once
MAX_RATIO = 50  # of the unpacked to the packed size, beside MAX_SMALL
MAX_SMALL = 1 << 26
OPENERS: dict[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
ZSTD = b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True)
class Part:
    """One file of a source: its address, path or command, and the name that its images carry, unique in the source."""

    where: str
    name: str

    @property
    def path(self) -> Path | None:
        """Its path, if it lies on the disk."""
        return None if self.where.startswith(PIPE) or is_address(self.where) else Path(self.where)


def expand(pattern: str, suffixes: Sequence[str], allow_commands: bool = False) -> list[Part]:
    """The files of a source, as webdataset reads a pattern: braces, and several patterns parted by "::".

    A pattern may also have stars, or be a folder, whose files that end in `suffixes` are taken. Raises InputError for
    one that matches no file, for a file that is named twice, and for a command without `allow_commands`.
    """
    from webdataset.shardlists import expand_urls

    address_of(pattern)  # which refuses a chain
    try:
        places = expand_urls(pattern)
    except (ValueError, AssertionError) as error:  # a brace without its fellow, or ${NAME} without $WDS_NAME
        raise InputError(f"source {pattern} cannot be expanded: {' '.join(str(error).split())}") from error
    found: list[str] = []
    for place in places:
        if place.startswith(PIPE):
            if not allow_commands:
                raise InputError(
                    f"source {place} is a command, and a source may come from a stranger: it is run with "
                    "--allow_commands true only"
                )
            found.append(place)
        elif is_address(place) and not place.startswith("file://"):
            found += at_address(place, suffixes)
        else:
            found += on_disk(place.removeprefix("file://"), suffixes)
    if twice := [place for place, count in Counter(found).items() if count > 1]:
        raise InputError(f"source {pattern} names {twice[0]} twice: each of its images would be taken twice")
    return [Part(place, name) for place, name in zip(found, names_of(found), strict=True)]


def on_disk(place: str, suffixes: Sequence[str]) -> list[str]:
    """The files of one pattern of paths, sorted."""
    import glob

    if os.path.isdir(place):
        found = sorted(entry.path for entry in os.scandir(place) if entry.name.endswith(tuple(suffixes)))
        if not found:
            raise InputError(f"source {place} is a folder without a file that ends in {' or '.join(suffixes)}")
        return found
    found = [place] if os.path.lexists(place) else sorted(glob.glob(place, recursive=True))
    if not found:
        raise InputError(
            f"source {place} does not exist" if not glob.has_magic(place) else f"source {place} matches no file"
        )
    for path in found:
        if not os.path.isfile(path):
            raise InputError(f"source {path} is no file that can be read")
    return found


def at_address(place: str, suffixes: Sequence[str]) -> list[str]:
    """The files of one address, which is asked for them only if it has stars or ends in a slash."""
    if not set("*[") & set(place) and not place.endswith("/"):
        return [place]
    stars = place if not place.endswith("/") else f"{place}*"
    found = several_tries(stars, lambda files, path: sorted(map(files.unstrip_protocol, files.glob(path))))
    found = [one for one in found if not place.endswith("/") or one.endswith(tuple(suffixes))]
    if not found:
        raise InputError(f"source {place} matches no file")
    return found


def names_of(places: Sequence[str]) -> list[str]:
    """A name for each place that does not depend on where all lie: its last part, or as many parts as tell them apart.

    Without .gz and the like, so that a packed file has the name of the plain one.
    """
    paths = []
    for number, place in enumerate(places):
        if place.startswith(PIPE):  # the last file that the command names
            files = re.findall(r"[^\s'\"|<>=]+\.(?:tar|tgz)\b", place)
            place = files[-1] if files else f"{number:06d}"
        path = PurePosixPath(place.partition("?")[0] if is_address(place) else place)
        paths.append(path.with_name(re.sub(r"(\.tar)?(\.gz|\.bz2|\.xz)$|\.tgz$", ".tar", path.name)).parts)
    for count in range(1, max(map(len, paths), default=0) + 1):
        names = ["/".join(part for part in parts[-count:] if part != "..") for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{number:06d}/{parts[-1]}" for number, parts in enumerate(paths)]


def asked_for(source: str, parts: Sequence[Part], **options: Any) -> str:
    """What a source is, as far as it is known before it is fetched: recorded, so that it is not fetched twice.

    Hashed, as addresses may hold passwords.
    """
    sizes = [part.path.stat().st_size if part.path else None for part in parts]
    whole = json.dumps([[part.where for part in parts], sizes, options], default=str)
    return f"{recorded_name(source)} {hashlib.sha256(whole.encode()).hexdigest()[:16]}"


def needs_staging(part: Part) -> bool:
    """Whether a tar cannot be read in place: it is elsewhere, or compressed."""
    return part.path is None or compression(part.path) is not None


def compression(path: Path) -> bytes | None:
    """The first bytes of a compressed file, which tell its kind; None for any other file."""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from error
    return next((kind for kind in (*OPENERS, ZSTD) if start.startswith(kind)), None)


class Staging:
    """The folder of what is staged for OUT/SPLIT."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / PROGRESS / "staged"
        self.made = [place for place in (self.folder, *self.folder.parents) if not place.exists()]

    def index(
        self,
        parts: Sequence[Part],
        index: Callable[[Path, Part, Listing], None],
        convert: Callable[[Path, Path], None] | None = None,
        variant: str = "",
    ) -> Listing:
        """What all parts hold, each one fetched if it must be, and then indexed.

        index: adds what a tar holds to a listing. convert: makes a tar (its second argument) of a file that is none.
        variant: what the tars depend on beside their addresses. A part that is refused is not kept, and nothing is if
        it is the first.
        """
        listing, fetched = Listing(), 0

        def status() -> str:
            return f"{fetched / 1e9:.2f} GB fetched" if fetched else ""

        with ProgressBar(total=len(parts), desc="reading", unit="file", status=status) as bar:

            def count(more: int) -> None:
                nonlocal fetched
                fetched += more
                bar.refresh()

            for part in parts:
                tar = part.path if convert is None and not needs_staging(part) else None
                try:
                    tar = tar or self.staged(part, convert, variant, count)
                    with naming(part, tar):
                        index(tar, part, listing)
                except InputError:
                    if tar is not None and tar != part.path:
                        tar.unlink(missing_ok=True)
                    raise
                finally:
                    self.remove_if_empty()
                bar.update()
        return listing

    def remove_if_empty(self) -> None:
        """Remove the folders that were made for nothing."""
        for place in self.made:
            with suppress(OSError):  # it holds what is staged already
                place.rmdir()

    def staged(
        self,
        part: Part,
        convert: Callable[[Path, Path], None] | None,
        variant: str,
        count: Callable[[int], None],
    ) -> Path:
        """The plain tar of a part: made now, unless an earlier call made it."""
        digest = hashlib.sha256(f"{part.where}\n{variant}".encode()).hexdigest()[:16]
        done = self.folder / f"{digest}.tar"
        if done.is_file():
            return done
        raw, unpacked = done.with_suffix(".raw"), done.with_suffix(".unpacked")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            source = part.path
            if source is None:
                fetch(part.where, raw, count)
                source = raw
            with naming(part, raw):
                if convert is not None:
                    convert(source, unpacked)
                    source = unpacked
                elif kind := compression(source):
                    unpack(source, unpacked, kind, count)
                    source = unpacked
            source.replace(done)
        except OSError as error:
            raise InputError(f"{part.where} could not be staged in {self.folder}: {error.strerror or error}") from error
        finally:
            for left in (raw, unpacked):
                left.unlink(missing_ok=True)
        return done


@contextmanager
def naming(part: Part, path: Path) -> Iterator[None]:
    """Errors about a staged file name where it comes from."""
    try:
        yield
    except InputError as error:
        said = str(error)
        for shown in (str(path.absolute()), str(path)):
            said = said.replace(shown, part.where)
        raise InputError(said) from error


def fetch(where: str, path: Path, count: Callable[[int], None]) -> None:
    """Write what is at an address, or what a command prints, to a file. count: is told how many bytes have come."""
    if where.startswith(PIPE):
        run(where, path, count)
        return
    from fsspec.callbacks import Callback

    class Counting(Callback):
        def relative_update(self, inc: int = 1) -> None:
            count(inc)

    several_tries(where, lambda files, remote: files.get_file(remote, str(path), callback=Counting()))


def run(where: str, path: Path, count: Callable[[int], None]) -> None:
    """Write what a command prints to a file. Raises InputError if it ends with an error."""
    from webdataset.gopen import Pipe

    pipe = Pipe(where.removeprefix(PIPE), mode="rb", shell=True, start_new_session=True)
    try:
        with open(path, "wb") as file:
            while data := pipe.stream.read1(CHUNK):
                file.write(data)
                count(len(data))
        status = pipe.proc.wait()
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(pipe.proc.pid, signal.SIGKILL)
        raise
    if status:
        raise InputError(f"source {where} ended with exit code {status}: nothing of it is taken")


def unpack(source: Path, path: Path, kind: bytes, count: Callable[[int], None]) -> None:
    """Decompress a file. Raises InputError for damage, and for one that unpacks to far more than its size."""
    if kind == ZSTD:
        raise InputError(
            f"{source} is compressed by zstd, which Python 3.11 cannot read: unpack it, or give "
            "'pipe:zstd -dc FILE' and --allow_commands true"
        )
    left = MAX_SMALL + MAX_RATIO * source.stat().st_size
    try:
        with OPENERS[kind](source) as packed, open(path, "wb") as file:
            while data := packed.read(CHUNK):
                left -= len(data)
                if left < 0:
                    raise InputError(f"{source} unpacks to far more than its size, as no archive of images does")
                file.write(data)
                count(0)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, ValueError) as error:
        raise InputError(f"{source} cannot be unpacked: {error}; is it an unfinished download?") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise InputError(f"{source} cannot be unpacked: {error}; is it an unfinished download?") from error
