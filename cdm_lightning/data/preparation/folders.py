"""`cdm prepare folder`: a folder with one subfolder of images per class, or pictures whose classes a table names."""

from __future__ import annotations

import io
import os
import re
import stat
import unicodedata
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from cdm_lightning.data.preparation.archives import members, open_tar
from cdm_lightning.data.preparation.label_tables import LabelTable, sorted_by_table
from cdm_lightning.data.preparation.listing import HIDDEN, Listing, examples
from cdm_lightning.data.preparation.prepare import prepare
from cdm_lightning.data.preparation.raw_images import RawImage
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.progress_bar import ProgressBar
from cdm_lightning.foundation.terminal import printable

SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
OF_A_SPLIT = {"set", "data", "dataset", "images", "split"}  # words that stand beside those, as in training_set
TABLES = {".txt", ".csv", ".tsv", ".json", ".jsonl"}
TABLE_CHARACTERS = 1 << 16  # of a table, among which names of images are looked for
CLASSLESS = {"images", "image", "imgs", "img", "pictures", "photos", "jpg", "jpeg", "png"}  # folders of all classes


def prepare_folder(
    source: Path,
    out: Path,
    labels: Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    **options: Any,
) -> None:
    """Make shards from a folder of images with one subfolder per class, or from images and a table of their labels.

    If it is stopped or killed, the same command continues. The shards are the same bytes for any number of workers. A
    class index is the rank of the class's name; the classes of a table that are all numbers are in their order. The
    validation split may lack classes of the training split, if that one is prepared first.

    Args:
        source: folder with one subfolder per class, images inside or in folders below: JPEG, PNG, BMP, GIF, WebP, TIFF,
            PPM, PGM, PBM and AVIF. What is left out is named. With `labels` any folder of images, or a tar of them.
        out: output folder; the shards go to OUT/SPLIT/RESOLUTION.
        labels: table that names the class of each image: CSV, or separated by tabs, semicolons or white space.
        image_column: column of `labels` with the images, by name or by number from 1. Default: as its header says, else
            the first.
        label_column: column of `labels` with the classes. Default: as its header says, else the second.
    """
    if labels is None and (column := image_column or label_column):
        raise InputError(f"column {column} is of a table: give it by labels")
    table = LabelTable(labels, image_column, label_column) if labels is not None else None
    prepare(partial(list_folder, source, table), source, out, **options)


def list_folder(source: Path, table: LabelTable | None = None) -> Listing:
    """Images of `source`/CLASS, in subfolders too; the classes are the names of the folders, or those of a table."""
    if table is not None:
        return list_by_table(source, table)
    folders, listing = class_folders(source)
    check_no_splits(source, {folder.name for folder in folders})
    listing.merge(list_class_folders(folders))
    if len(folders) == 1:
        note_folders_below(source, listing.images[folders[0].name])
    if len(folders) == 1 and (naming := table_that_names(listing.images[folders[0].name], source)):
        raise InputError(
            f"{source} holds one folder, {folders[0].name}, and {printable(naming)}, a table that names its images: "
            f"give it by --labels {printable(str(source / naming))}"
        )
    return listing


def check_no_splits(source: Path, folders: set[str]) -> None:
    """Refuse folders that are all named as the splits of a data set."""
    words = [set(re.findall(r"[^\W_]+", name.lower())) for name in folders]
    if all(found & SPLITS and found <= SPLITS | OF_A_SPLIT for found in words):
        raise InputError(f"{source} holds {examples(folders)}: give one split as the source, not all")


def note_folders_below(source: Path, images: list[RawImage]) -> None:
    """Say of a single class whose images all lie in several folders below that those may be the classes.

    They need not be: large sets of one kind are dealt into numbered folders.
    """
    folders = {PurePosixPath(image.name).parent for image in images}
    common = PurePosixPath(os.path.commonpath(folders)) if folders else PurePosixPath()
    below = {part for folder in folders for part in folder.relative_to(common).parts[:1]}
    if common not in folders and len(below) > 1:
        check_no_splits(source / common, below)
        print(
            f"one class, {printable(common.parts[0])}, is made of the images in {len(below)} folders, "
            f"{examples(below)}: if those are classes, give --source {printable(str(source / common))}"
        )


def list_by_table(source: Path, table: LabelTable) -> Listing:
    """Images anywhere in a folder, or in an uncompressed tar, by the class that a table names."""
    if source.is_dir():
        source = source.resolve()
        found = list_below(source, table.path.resolve())
        images = found.images.pop(source.name)
        for image in images:
            image.name = image.name.removeprefix(f"{source.name}/")
    else:
        found = Listing("")
        with open_tar(source) as tar:
            for member in members(tar):
                name = str(PurePosixPath(member.name))
                image = RawImage(name, str(source), member.offset_data, member.size)
                found.add("", image, partial(tar.extractfile, member))
        images = found.images.pop("")
    listing = sorted_by_table(images, table)
    listing.merge(found)
    return listing


def class_folders(source: Path) -> tuple[list[Path], Listing]:
    """The class folders of a source, sorted, and what lies beside them. Refuses names that no manifest can hold."""
    if not source.is_dir():
        raise InputError(f"{source} is not a folder: one subfolder per class is expected inside it")
    folders, beside, home = [], Listing(), source.resolve()
    for entry in os.scandir(source):
        path = Path(entry.path)
        if entry.name.startswith((".", "__MACOSX")):  # the second is of archives made on a Mac
            beside.left_out[HIDDEN].append(entry.name)
        elif not path.is_dir():
            beside.left_out["beside the class folders"].append(entry.name)
        elif home.is_relative_to(path.resolve()):
            beside.left_out["link to a folder that holds it"].append(entry.name)
        else:
            folders.append(path)
    if not folders:
        raise InputError(
            f"{source} has no subfolders: one folder per class is expected, with the images inside"
            ", or a table of their classes by --labels"
            + (f", such as {examples(found)}" if (found := tables(source)) else "")
        )
    names: dict[str, str] = {}
    for folder in sorted(folders):
        if not folder.name.isprintable():
            raise InputError(f"{source} holds a folder {folder.name!r}: the name of a class must be printable")
        twin = names.setdefault(unicodedata.normalize("NFC", folder.name), folder.name)
        if twin != folder.name:
            raise InputError(f"{source} holds {twin!a} and {folder.name!a}: two classes cannot have one name")
    return sorted(folders), beside


def list_class_folders(folders: list[Path]) -> Listing:
    """Images of class folders. A folder may be empty, but one that holds other files alone is refused."""
    listing = Listing()
    for folder in ProgressBar(folders, desc="listing", unit="class"):
        found = list_below(folder)
        if not found.images[folder.name] and found.left_out.keys() - {HIDDEN}:
            raise InputError(f"{folder} holds no images that can be read; left out are {found.about_left_out()}")
        listing.merge(found)
    return listing


def list_below(folder: Path, without: Path | None = None) -> Listing:
    """Images in a class folder and the folders below it. Links to files are followed, links to folders are not.

    without: a file there that is not looked at.
    """
    listing, pending = Listing(folder.name), [(str(folder), folder.name)]
    while pending:
        path, prefix = pending.pop()
        try:
            entries = list(os.scandir(path))
        except OSError as error:
            listing.left_out[f"folder, {(error.strerror or 'cannot be opened').lower()}"].append(prefix)
            continue
        for entry in entries:
            name = f"{prefix}/{entry.name}"
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                pending.append((entry.path, name))
            elif without is None or Path(entry.path) != without:
                image = RawImage(name, entry.path, 0, *size_and_problem(entry))
                listing.add(folder.name, image, partial(io.FileIO, entry.path))
    return listing


def size_and_problem(entry: os.DirEntry[str]) -> tuple[int, str]:
    """The size of a file and "", or 0 and why it must not be opened: a pipe, for one, would be waited for."""
    try:
        status = entry.stat()
    except OSError as error:
        return 0, "broken link" if entry.is_symlink() else (error.strerror or "cannot be opened").lower()
    if stat.S_ISREG(status.st_mode):
        return status.st_size, ""
    return 0, "link to a folder" if stat.S_ISDIR(status.st_mode) else "no plain file"


def tables(folder: Path) -> list[str]:
    """The names of files that may be tables of labels."""
    return sorted(f.name for f in folder.iterdir() if f.suffix.lower() in TABLES and f.is_file())


def table_that_names(images: list[RawImage], source: Path) -> str:
    """The name of a table beside a folder "images" that names one of its images; "" if there is none."""
    if not images or PurePosixPath(images[0].name).parts[0].lower() not in CLASSLESS:
        return ""
    names = {PurePosixPath(image.name).name for image in images}
    for table in tables(source):
        with open(source / table, encoding="utf-8", errors="replace") as file:
            if names & set(re.split(r'[\s,;:"/\\]+', file.read(TABLE_CHARACTERS))):
                return table
    return ""
