"""`cdm prepare lsun`: LSUN's LMDB databases of encoded images, read in random order and never unpacked."""

from __future__ import annotations

import io
import os
import re
import zipfile
from functools import partial
from pathlib import Path
from typing import IO, Any, get_args

from cdm_lightning.data.preparation.listing import Listing, Split, examples
from cdm_lightning.data.preparation.lmdb_file import LmdbFile
from cdm_lightning.data.preparation.prepare import prepare
from cdm_lightning.data.preparation.raw_images import RawImage
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.progress_bar import ProgressBar

DATA = "data.mdb"
NAME = re.compile(r"(?P<name>.+)_(?P<split>train|val|test)_lmdb")
BEGINNINGS = (b"\xff\xd8\xff", b"RIFF", b"\x89PNG")  # JPEG, WebP and PNG, which need not be opened


def prepare_lsun(source: Path, out: Path, split: Split = "train", **options: Any) -> None:
    """Make shards from LSUN's databases as downloaded and unzipped, of one category or of several.

    If it is stopped or killed, the same command continues. The shards are the same bytes for any number of workers.
    Several categories are classes, sorted by name; one is one class, which a model without classes ignores.

    Args:
        source: folder of one database, such as bedroom_train_lmdb with its data.mdb, or a folder that holds several:
            then those of the split are taken.
        out: output folder; the shards go to OUT/SPLIT/RESOLUTION.
        split: which part of the data set the source is: train or val.
    """
    prepare(partial(list_lsun, source, split), source, out, split, **options)


def list_lsun(source: Path, split: Split) -> Listing:
    """Images of a database, or of those of a split in one folder; the classes are their names."""
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
    listing, path, file = Listing(name), folder / DATA, str(folder / DATA)
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no plain file")
    try:
        with open(path, "rb") as opened:
            database = LmdbFile(opened)
            if not database.entries:
                raise InputError(f"{folder} is an empty database")
            values = ProgressBar(database.values(), total=database.entries, desc=f"listing {name}", unit="image")
            for key, offset, size in values:
                image = RawImage(f"{name}/{os.fsdecode(key)}", file, offset, size)
                if database.read(offset, 4).startswith(BEGINNINGS):
                    listing.images[name].append(image)
                else:
                    listing.add(name, image, partial(value, image))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from error
    return listing


def value(image: RawImage) -> IO[bytes]:
    """A value as an open file."""
    return io.BytesIO(image.read())
