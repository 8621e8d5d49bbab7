"""`cdm prepare imagenet`: the archives of ILSVRC2012 as downloaded, which are never unpacked, or their folders."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from cdm_lightning.data.preparation.archives import members, open_tar
from cdm_lightning.data.preparation.folders import class_folders, list_class_folders, size_and_problem
from cdm_lightning.data.preparation.label_tables import LabelTable, sorted_by_table
from cdm_lightning.data.preparation.listing import Listing, Split
from cdm_lightning.data.preparation.prepare import prepare
from cdm_lightning.data.preparation.raw_images import RawImage
from cdm_lightning.data.shards.tar import tar_files
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.progress_bar import ProgressBar

DEVKIT = "ILSVRC2012_devkit_t12"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
VALIDATION = "ILSVRC2012_val_"


def prepare_imagenet(
    source: Path,
    out: Path,
    split: Split = "train",
    resolutions: Sequence[int] = (256, 128, 64, 32),
    devkit: Path | None = None,
    labels: Path | None = None,
    **options: Any,
) -> None:
    """Make shards from the ImageNet archives as downloaded, without unpacking them, or from their unpacked folders.

    If it is stopped or killed, the same command continues. The shards are the same bytes for any number of workers. A
    class index is the rank of its WNID (n01440764 is 0).

    Args:
        source: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, or a folder that one of them was unpacked to: of
            WNID.tar, of WNID/*.JPEG, or of ILSVRC2012_val_*.JPEG.
        out: output folder; the shards go to OUT/SPLIT/RESOLUTION.
        split: which part of the data set the source is: train or val.
        resolutions: widths to store. The largest is cropped from the raw image; each lower one is the mean over 2x2
            pixels of the next larger, so the ratio of two widths must be a power of two.
        devkit: ILSVRC2012_devkit_t12.tar.gz or its folder, which labels the validation images where no folders do.
            Default: beside the source, or in it.
        labels: table that labels the validation images in place of the devkit: Kaggle's LOC_val_solution.csv.
    """
    prepare(partial(list_imagenet, source, split, devkit, labels), source, out, split, resolutions, **options)


def list_imagenet(source: Path, split: Split, devkit: Path | None = None, labels: Path | None = None) -> Listing:
    """Images of ILSVRC2012, as archives, as a folder of them, or unpacked."""
    if labels is not None and split == "train":
        raise InputError(f"labels {labels} are for the validation images: the training images lie in archives by class")
    if source.is_file():
        return list_train_archive(source) if split == "train" else list_val_archive(source, devkit, labels)
    if source.is_dir():
        names = [entry.name for entry in os.scandir(source) if entry.is_file()]
        if any(name.startswith(VALIDATION) for name in names):
            if split == "train":
                raise InputError(f"{source} holds the validation images, {VALIDATION}...: give --split val")
            return list_val_folder(source, devkit, labels)
        if labels is None and any(is_class_archive(name) for name in names):
            return list_class_archives(source)
    if labels is not None:
        raise InputError(
            f"labels {labels} are for {VALIDATION}*.JPEG, and {source} holds none: its folders are classes"
        )
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


def list_val_archive(source: Path, devkit: Path | None, labels: Path | None) -> Listing:
    """Images of ILSVRC2012_img_val.tar, labelled by a table or by the devkit."""
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
    if labels is not None:
        return labelled_by_table(found, labels)
    return labelled_by_devkit(found, source, devkit or find_devkit(source.parent))


def list_val_folder(source: Path, devkit: Path | None, labels: Path | None) -> Listing:
    """Images of a folder to which the validation archive was unpacked, labelled by a table or by the devkit."""
    found = Listing(VALIDATION)
    for entry in os.scandir(source):
        if entry.name.startswith(VALIDATION):
            image = RawImage(entry.name, entry.path, 0, *size_and_problem(entry))
            found.add(VALIDATION, image, partial(io.FileIO, entry.path))
        else:
            found.left_out["beside the images"].append(entry.name)
    if labels is not None:
        return labelled_by_table(found, labels)
    return labelled_by_devkit(found, source, devkit or find_devkit(source, source.parent))


def labelled_by_table(found: Listing, labels: Path) -> Listing:
    """The validation images by the class that a table names."""
    listing = sorted_by_table(found.images.pop(VALIDATION), LabelTable(labels))
    listing.merge(found)
    return listing


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
            f"{devkit} does not exist: without {DEVKIT}.tar.gz the validation images have no labels; or give "
            "Kaggle's LOC_val_solution.csv by --labels, or folders nXXXXXXXX of images"
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
