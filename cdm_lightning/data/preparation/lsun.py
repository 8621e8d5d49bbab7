"""`cdm prepare lsun`: LSUN's LMDB databases of encoded images, read in random order by key and never unpacked."""

from __future__ import annotations

import io
import os
import re
import struct
import zipfile
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

from cdm_lightning.data.preparation.listing import Listing, Split, examples
from cdm_lightning.data.preparation.prepare import prepare
from cdm_lightning.data.preparation.raw_images import MAX_FILE_BYTES, RawImage
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.progress_bar import ProgressBar

DATA = "data.mdb"
NAME = re.compile(r"(?P<name>.+)_(?P<split>train|val|test)_lmdb")
META = struct.Struct("<16x II 16x I 92x QQ")  # magic, version, page size, last page, transaction: of a meta page
MAGIC, VERSION = 0xBEEFC0DE, 1
PAGE_SIZES = {1 << power for power in range(9, 17)}
BEGINNINGS = (b"\xff\xd8\xff", b"RIFF")  # JPEG and WebP: Pillow would read the whole of a WebP to open it


@dataclass(slots=True)
class StoredImage(RawImage):
    """An encoded image that is a value of an LMDB database. `name` is CLASS/KEY, `file` the database's folder."""

    def read(self) -> bytes:
        """The encoded bytes. Raises ValueError if they cannot be read, and OSError if the database cannot."""
        import lmdb

        if self.size > MAX_FILE_BYTES:
            raise ValueError(f"{self.size:,} bytes are more than the {MAX_FILE_BYTES:,} that one image may have")
        try:
            with open_database(self.file).begin() as transaction:
                value = transaction.get(os.fsencode(self.name.partition("/")[2]))
        except InputError as error:
            raise OSError(str(error)) from error
        except lmdb.Error as error:
            raise ValueError(f"LMDB says {error}") from error
        if value is None:
            raise OSError(f"it has lost the key of {self.name}")
        return value


def prepare_lsun(source: Path, out: Path, split: Split = "train", **options: Any) -> None:
    """Make shards from LSUN's databases as downloaded and unzipped, of one category or of several.

    If it is stopped or killed, the same command continues. The shards are the same bytes for any number of workers.
    Several categories are classes, sorted by name; one is one class, which a model without classes ignores. Needs the
    package lmdb.

    Args:
        source: folder of one database, such as bedroom_train_lmdb with its data.mdb, or a folder that holds several:
            then those of the split are taken.
        out: output folder; the shards go to OUT/SPLIT/RESOLUTION.
        split: which part of the data set the source is: train or val.
    """
    prepare(partial(list_lsun, source, split), source, out, split, **options)


def list_lsun(source: Path, split: Split) -> Listing:
    """Images of a database, or of those of a split in one folder; the classes are their names."""
    try:
        import lmdb  # noqa: F401, only to see that it is there
    except ModuleNotFoundError as error:
        raise InputError('cdm prepare lsun needs the package lmdb: pip install "cdm_lightning[lsun]"') from error
    databases, listing = find_databases(source, split)
    for name, folder in databases.items():
        listing.merge(list_database(folder, name))
    return listing


def find_databases(source: Path, split: Split) -> tuple[dict[str, Path], Listing]:
    """The database folders of a split by the names of their classes, sorted, and what lies beside them."""
    if not source.is_dir():
        if zipfile.is_zipfile(source):
            raise InputError(f"{source} is a zip: unzip it, and give the folder that it holds")
        raise InputError(f"{source} is not a folder: give the one that holds {DATA}, such as bedroom_{split}_lmdb")
    if (source / DATA).exists():
        known = NAME.fullmatch(source.resolve().name)
        if known and known["split"] in get_args(Split) and known["split"] != split:
            raise InputError(f"{source} is the {known['split']} split by its name: give --split {known['split']}")
        name = known["name"] if known else source.resolve().name.removesuffix("_lmdb")
        return {checked_name(name, source): source}, Listing()
    found, beside = {}, Listing()
    for entry in os.scandir(source):
        known = NAME.fullmatch(entry.name)
        if known and known["split"] == split and entry.is_dir():
            found[checked_name(known["name"], source)] = Path(entry.path)
        else:
            beside.left_out["other splits" if known else f"beside the *_{split}_lmdb"].append(entry.name)
    if not found:
        names = [name for names in beside.left_out.values() for name in names]
        zips = [name for name in names if name.endswith(".zip")]
        raise InputError(
            f"{source} holds neither {DATA} nor a folder NAME_{split}_lmdb"
            + (f": unzip {examples(zips)}" if zips else f"; it holds {examples(names)}" if names else ": it is empty")
        )
    return dict(sorted(found.items())), beside


def checked_name(name: str, source: Path) -> str:
    """The name, if it can name a class."""
    if not name.isprintable():
        raise InputError(f"{source} names a class {name!r}: the name of a class must be printable")
    return name


def list_database(folder: Path, name: str) -> Listing:
    """Images of a database: one pass over its keys, which looks at the first bytes of each value."""
    import lmdb

    listing, path = Listing(name), str(folder)
    database = open_database(path)
    if not (count := database.stat()["entries"]):
        raise InputError(f"{folder} is an empty database")
    try:
        with database.begin(buffers=True) as transaction, transaction.cursor() as cursor:
            for key, value in ProgressBar(cursor, total=count, desc=f"listing {name}", unit="image"):
                image = StoredImage(f"{name}/{os.fsdecode(bytes(key))}", path, 0, len(value))
                if bytes(value[:4]).startswith(BEGINNINGS):
                    listing.images[name].append(image)
                else:
                    listing.add(name, image, partial(io.BytesIO, value))
    except lmdb.Error as error:
        raise InputError(f"{folder / DATA} is damaged: LMDB says {error}") from error
    return listing


@cache  # LMDB allows one opening of a database per process
def open_database(folder: str) -> Any:
    """The database of a folder, opened once in each process. Raises InputError if it is none, or cut."""
    import lmdb

    check_whole(Path(folder) / DATA)
    try:
        return lmdb.open(folder, readonly=True, create=False, lock=False, readahead=False)
    except lmdb.Error as error:
        raise InputError(f"{folder} cannot be opened as a database: LMDB says {error}") from error


def check_whole(path: Path) -> None:
    """Refuse what is no LMDB file, and one that ends before its last page: LMDB would read on, and the process die.

    LMDB (version 1 of its format) begins with two meta pages; the one of the later transaction counts.
    """
    try:
        with open(path, "rb") as file:
            first = file.read(META.size)
            size = os.fstat(file.fileno()).st_size
            page_size = META.unpack(first)[2] if len(first) == META.size else 0
            file.seek(page_size)
            metas = [META.unpack(page) for page in (first, file.read(META.size)) if len(page) == META.size]
    except OSError as error:
        raise InputError(f"{path} cannot be opened: {(error.strerror or str(error)).lower()}") from error
    if len(metas) < 2 or page_size not in PAGE_SIZES or any(meta[:3] != (MAGIC, VERSION, page_size) for meta in metas):
        raise InputError(f"{path} is no LMDB database, or its beginning is damaged")
    *_, last_page, _ = max(metas, key=lambda meta: meta[-1])
    if size < (last_page + 1) * page_size:
        raise InputError(
            f"{path} is cut: it has {size:,} bytes of {(last_page + 1) * page_size:,}; is it an unfinished download?"
        )
