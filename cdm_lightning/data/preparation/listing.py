"""The classes and images of a source, a folder or an archive that is never unpacked, and what is left out of it."""

from __future__ import annotations

import io
import os
import re
import stat
import tarfile
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Literal

import numpy as np

from cdm_lightning.data.preparation.raw_images import MAX_FILE_BYTES, RawImage, has_image_header, image_suffixes
from cdm_lightning.data.shards.tar import check_member, tar_files
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.progress_bar import ProgressBar
from cdm_lightning.foundation.terminal import printable

DEVKIT = "ILSVRC2012_devkit_t12"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
TABLES = {".txt", ".csv", ".tsv", ".json", ".jsonl"}
TABLE_CHARACTERS = 1 << 16  # of a table, among which names of images are looked for
CLASSLESS = {"images", "image", "imgs", "img", "pictures", "photos", "jpg", "jpeg", "png"}  # folders of all classes
VALIDATION = "ILSVRC2012_val_"
HIDDEN = "hidden"
Split = Literal["train", "val"]


class Listing:
    """Images by class, in any order, and the names of what is left out, by kind.

    A file that is called an image, by its suffix, is listed as one, and counted as unreadable later if it is none. Any
    other file is listed if it begins as an image does.
    """

    def __init__(self, *classes: str) -> None:
        self.images: dict[str, list[RawImage]] = {name: [] for name in classes}
        self.left_out: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, to_class: str, image: RawImage, open_file: Callable[[], IO[bytes] | None]) -> None:
        """Add a file to a class, or to what is left out. open_file: opens it, to look at its first bytes."""
        path = PurePosixPath(image.name)
        if path.name.startswith("."):
            kind = HIDDEN
        elif path.suffix.lower() in image_suffixes():
            kind = ""
        else:
            kind = image.problem or without_image(image.size, open_file)
        if kind:
            self.left_out[kind].append(image.name)
        else:
            self.images[to_class].append(image)

    def merge(self, other: Listing) -> None:
        """Add what another listing holds."""
        self.images |= other.images
        for kind, names in other.left_out.items():
            self.left_out[kind] += names

    def labelled(self, classes: list[str]) -> list[RawImage]:
        """All images, each with the place of its class in `classes`."""
        labels = {name: label for label, name in enumerate(classes)}
        for name, images in self.images.items():
            for image in images:
                image.label = labels[name]
        return [image for images in self.images.values() for image in images]

    def about_left_out(self) -> str:
        """How many files of each kind are left out, with some names. "" if none are."""
        return "; ".join(f"{kind}: {len(names):,} ({examples(names)})" for kind, names in self.left_out.items())


def without_image(size: int, open_file: Callable[[], IO[bytes] | None]) -> str:
    """Why a file that is not called an image is left out; "" if it is one."""
    if size > MAX_FILE_BYTES:
        return "larger than an image may be"
    try:
        file = open_file()
        assert file is not None
        with file:
            return "" if has_image_header(file) else "no known image format"
    except OSError as error:
        return (error.strerror or "cannot be opened").lower()


def examples(names: Iterable[str]) -> str:
    """Three of the names, of different suffixes where possible."""
    names = sorted(names)
    of_suffix = {PurePosixPath(name).suffix.lower(): name for name in reversed(names)}
    chosen = list(dict.fromkeys([*sorted(of_suffix.values()), *names[:3]]))[:3]
    return ", ".join(map(printable, chosen)) + (", ..." if len(names) > 3 else "")


# ------------------------------------------------------------------------------------------------------------ folders


def list_folder(source: Path) -> Listing:
    """Images of `source`/CLASS, in subfolders too; the classes are the names of the folders."""
    folders, listing = class_folders(source)
    if {folder.name.lower() for folder in folders} <= SPLITS:
        raise InputError(f"{source} holds {examples(f.name for f in folders)}: give one split as the source, not all")
    listing.merge(list_class_folders(folders))
    if len(folders) == 1 and (table := table_that_names(listing.images[folders[0].name], source)):
        raise InputError(
            f"{source} holds one folder, {folders[0].name}, and {printable(table)}, a table that names its images: "
            "labels are not read from tables, one folder per class is expected, with the images inside"
        )
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
            + (f"; labels are not read from tables such as {examples(found)}" if (found := tables(source)) else "")
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


def list_below(folder: Path) -> Listing:
    """Images in a class folder and the folders below it. Links to files are followed, links to folders are not."""
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
            else:
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


# ----------------------------------------------------------------------------------------------------------- ImageNet


def list_imagenet(source: Path, split: Split, devkit: Path | None) -> Listing:
    """Images of ILSVRC2012, as archives, as a folder of them, or unpacked."""
    if source.is_file():
        return list_train_archive(source) if split == "train" else list_val_archive(source, devkit)
    if source.is_dir():
        names = [entry.name for entry in os.scandir(source) if entry.is_file()]
        if any(name.startswith(VALIDATION) for name in names):
            if split == "train":
                raise InputError(f"{source} holds the validation images, {VALIDATION}...: give --split val")
            return list_val_folder(source, devkit)
        if any(is_class_archive(name) for name in names):
            return list_class_archives(source)
    folders, listing = class_folders(source)
    for folder in folders:
        if not is_wnid(folder.name):
            raise InputError(f"{source} holds a folder {folder.name}: ImageNet has nXXXXXXXX, try `cdm prepare folder`")
    listing.merge(list_class_folders(folders))
    return listing


def list_train_archive(source: Path) -> Listing:
    """Images of ILSVRC2012_img_train.tar, a tar of one tar per WNID. Only headers are read, nothing is unpacked."""
    listing = Listing()
    with open_tar(source) as outer:
        for member in ProgressBar(members(outer), desc="reading headers", unit="class"):
            if not is_class_archive(PurePosixPath(member.name).name):
                raise InputError(
                    f"{source} is not the training archive: it holds {member.name} where nXXXXXXXX.tar is expected"
                )
            with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                found = list_class_archive(inner, PurePosixPath(member.name).stem, source, member.offset_data)
            if not any(found.images.values()):
                raise InputError(f"{source} holds no images in {member.name}: every class needs at least one")
            listing.merge(found)
    return listing


def list_class_archives(source: Path) -> Listing:
    """Images of a folder of nXXXXXXXX.tar, as the training archive unpacks to."""
    listing = Listing()
    for path in ProgressBar(sorted(source.iterdir()), desc="reading headers", unit="class"):
        if is_wnid(path.name):
            raise InputError(f"{source} holds {path.name} beside nXXXXXXXX.tar: is it unpacked in part?")
        if not (is_class_archive(path.name) and path.is_file()):
            listing.left_out["beside the class archives"].append(path.name)
            continue
        with open_tar(path) as tar:
            found = list_class_archive(tar, path.stem, path, 0)
        if not any(found.images.values()):
            raise InputError(f"{path} holds no images: every class needs at least one")
        listing.merge(found)
    return listing


def list_class_archive(tar: tarfile.TarFile, wnid: str, file: Path, start: int) -> Listing:
    """Images of one nXXXXXXXX.tar, which begins at byte `start` of `file`."""
    listing = Listing(wnid)
    for member in members(tar):
        name = f"{wnid}/{PurePosixPath(member.name).name}"
        image = RawImage(name, str(file), start + member.offset_data, member.size)
        listing.add(wnid, image, partial(tar.extractfile, member))
    return listing


def list_val_archive(source: Path, devkit: Path | None) -> Listing:
    """Images of ILSVRC2012_img_val.tar, labelled by the devkit."""
    found = Listing(VALIDATION)
    with open_tar(source) as tar:
        for member in members(tar):
            name = PurePosixPath(member.name).name
            if not name.startswith((VALIDATION, ".")):
                raise InputError(
                    f"{source} is not the validation archive: it holds {name}, not ILSVRC2012_val_XXXXXXXX.JPEG"
                )
            image = RawImage(name, str(source), member.offset_data, member.size)
            found.add(VALIDATION, image, partial(tar.extractfile, member))
    return labelled_by_devkit(found, source, devkit or find_devkit(source.parent))


def list_val_folder(source: Path, devkit: Path | None) -> Listing:
    """Images of a folder to which the validation archive was unpacked, labelled by the devkit."""
    found = Listing(VALIDATION)
    for entry in os.scandir(source):
        if entry.name.startswith(VALIDATION):
            image = RawImage(entry.name, entry.path, 0, *size_and_problem(entry))
            found.add(VALIDATION, image, partial(io.FileIO, entry.path))
        else:
            found.left_out["beside the images"].append(entry.name)
    return labelled_by_devkit(found, source, devkit or find_devkit(source, source.parent))


def labelled_by_devkit(found: Listing, source: Path, devkit: Path) -> Listing:
    """The validation images by class: line k of the devkit's ground truth labels the k-th file name."""
    images = sorted(found.images.pop(VALIDATION), key=lambda image: image.name)
    wnid_of, truth = read_devkit(devkit)
    if len(truth) != len(images):
        raise InputError(f"{devkit} labels {len(truth)} images and {source} holds {len(images)}: they must be equal")
    listing = Listing(*sorted(wnid_of.values()))
    for number, image in zip(truth, images, strict=True):
        image.name = f"{wnid_of[number]}/{image.name}"
        listing.images[wnid_of[number]].append(image)
    listing.merge(found)
    return listing


def find_devkit(*folders: Path) -> Path:
    """The devkit in one of the folders, as downloaded or unpacked; where it should be, if there is none."""
    paths = [folder / name for folder in folders for name in (f"{DEVKIT}.tar.gz", DEVKIT)]
    return next((path for path in paths if path.exists()), paths[0])


def read_devkit(devkit: Path) -> tuple[dict[int, str], list[int]]:
    """The WNID of every ILSVRC2012_ID that is a class, and the ID of every validation image in file order.

    The IDs do not follow the sorted WNIDs, and the inner nodes of the WordNet tree have IDs too: those have children.
    """
    import scipy.io

    if not devkit.exists():
        raise InputError(
            f"{devkit} does not exist: without {DEVKIT}.tar.gz the validation images have no labels; tables such as "
            "Kaggle's LOC_val_solution.csv are not read, folders nXXXXXXXX of images are"
        )
    try:
        if devkit.is_dir():
            contents = {name: (devkit / "data" / name).read_bytes() for name in ("meta.mat", GROUND_TRUTH)}
        else:
            with open(devkit, "rb") as stream:
                contents = {PurePosixPath(file["fname"]).name: file["data"] for file in tar_files(stream, str(devkit))}
        synsets = scipy.io.loadmat(io.BytesIO(contents["meta.mat"]), squeeze_me=True)["synsets"]
        wnid_of = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in np.atleast_1d(synsets) if s["num_children"] == 0}
        truth = [int(line) for line in contents[GROUND_TRUTH].split()]
        unknown = set(truth) - set(wnid_of)
    except (OSError, EOFError, tarfile.TarError, KeyError, ValueError, TypeError, IndexError) as error:
        raise InputError(f"{devkit} is not {DEVKIT}.tar.gz as downloaded: {type(error).__name__}: {error}") from error
    if unknown:
        raise InputError(f"{devkit} labels images with ILSVRC2012_ID {min(unknown)}, which is no class of its meta.mat")
    return wnid_of, truth


def is_class_archive(name: str) -> bool:
    """Whether `name` is nXXXXXXXX.tar."""
    return name.endswith(".tar") and is_wnid(name.removesuffix(".tar"))


def is_wnid(name: str) -> bool:
    """Whether `name` is a WordNet ID such as n01440764."""
    return len(name) == 9 and name[0] == "n" and name[1:].isdigit()


@contextmanager
def open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """Open an uncompressed tar. Raises InputError if it cannot be read."""
    try:
        with tarfile.open(path, mode="r:") as tar:
            yield tar
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{path} cannot be read as a tar archive: {error}; is it an unfinished download?") from error


def members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files of a tar. tarfile stops silently at a broken header, so the zero block at the end is checked here."""
    for member in tar:
        check_member(member, str(tar.name))
        if member.isfile():
            yield member
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"its end is missing at byte {tar.offset}")
