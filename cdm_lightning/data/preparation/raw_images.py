"""Raw images: list those of a folder or archive without unpacking it, decode them, and crop them to squares."""

from __future__ import annotations

import io
import tarfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cdm_lightning.data.shards.tar import check_member, tar_files
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.progress_bar import ProgressBar

FORMATS = [
    "JPEG",
    "PNG",
    "BMP",
    "GIF",
    "WEBP",
    "TIFF",
]  # no others: Pillow opens one of its formats with an external program
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
Split = Literal["train", "val"]
Crop = Literal["adm", "area"]
FILTERS: dict[Crop, str] = {"adm": "box halvings, then bicubic", "area": "box"}


@dataclass(frozen=True, slots=True)
class RawImage:
    """One encoded image: `size` bytes at `offset` of `file`. `name` is CLASS/FILE, in archives and folders alike."""

    name: str
    label: int
    file: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The encoded bytes."""
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


Listing = tuple[list[str], list[RawImage]]  # class names in label order, images in any order


# ---------------------------------------------------------------------------------------------------- finding images


def list_imagenet(source: Path, split: Split, devkit: Path | None) -> Listing:
    """Images of an ILSVRC2012 archive or of a folder of WNID/*.JPEG."""
    if source.is_file() and split == "train":
        return list_train_archive(source)
    if source.is_file():
        return list_val_archive(source, devkit or source.with_name(DEVKIT))
    classes, images = list_folder(source)
    for name in classes:
        if not is_wnid(name):
            raise InputError(f"{source} holds a folder {name}: ImageNet has nXXXXXXXX, try `cdm prepare folder`")
    return classes, images


def list_folder(source: Path) -> Listing:
    """Images of `source`/CLASS/FILE; the classes are the sorted names of the subfolders."""
    if not source.is_dir():
        raise InputError(f"{source} is not a folder: one subfolder per class is expected inside it")
    folders = sorted(f for f in source.iterdir() if f.is_dir() and not f.name.startswith("."))
    if not folders:
        raise InputError(f"{source} has no subfolders: one folder per class is expected, with the images inside")
    images = []
    for label, folder in enumerate(ProgressBar(folders, desc="listing", unit="class")):
        files = [f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith(".")]
        if not files:
            raise InputError(f"{folder} holds no images: every class folder needs one of {', '.join(sorted(SUFFIXES))}")
        images += [RawImage(f"{folder.name}/{f.name}", label, str(f), 0, f.stat().st_size) for f in files]
    return [folder.name for folder in folders], images


def list_train_archive(source: Path) -> Listing:
    """Images of ILSVRC2012_img_train.tar, a tar of one tar per WNID. Only headers are read, nothing is unpacked."""
    files_of_class: dict[str, list[tuple[str, int, int]]] = {}
    with open_tar(source) as outer:
        for member in ProgressBar(members(outer), desc="reading headers", unit="class"):
            wnid, suffix = PurePosixPath(member.name).stem, PurePosixPath(member.name).suffix
            if not is_wnid(wnid) or suffix != ".tar":
                raise InputError(
                    f"{source} is not the training archive: it holds {member.name} where nXXXXXXXX.tar is expected"
                )
            with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                files_of_class[wnid] = [
                    (PurePosixPath(m.name).name, member.offset_data + m.offset_data, m.size) for m in members(inner)
                ]
            if not files_of_class[wnid]:
                raise InputError(f"{source} holds no images in {member.name}: every class needs at least one")
    classes = sorted(files_of_class)
    return classes, [
        RawImage(f"{wnid}/{name}", label, str(source), offset, size)
        for label, wnid in enumerate(classes)
        for name, offset, size in files_of_class[wnid]
    ]


def list_val_archive(source: Path, devkit: Path) -> Listing:
    """Images of ILSVRC2012_img_val.tar; line k of the devkit's ground truth labels the k-th file name."""
    with open_tar(source) as tar:
        files = sorted((PurePosixPath(m.name).name, m.offset_data, m.size) for m in members(tar))
    for name, _, _ in files:
        if not name.startswith("ILSVRC2012_val_"):
            raise InputError(
                f"{source} is not the validation archive: it holds {name}, not ILSVRC2012_val_XXXXXXXX.JPEG"
            )
    wnid_of, truth = read_devkit(devkit)
    if len(truth) != len(files):
        raise InputError(f"{devkit} labels {len(truth)} images and {source} holds {len(files)}: they must be equal")
    classes = sorted(wnid_of.values())
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    return classes, [
        RawImage(f"{wnid_of[number]}/{name}", label_of[wnid_of[number]], str(source), offset, size)
        for number, (name, offset, size) in zip(truth, files, strict=True)
    ]


def read_devkit(devkit: Path) -> tuple[dict[int, str], list[int]]:
    """The WNID of every ILSVRC2012_ID that is a class, and the ID of every validation image in file order.

    The IDs do not follow the sorted WNIDs, and the inner nodes of the WordNet tree have IDs too: those have children.
    """
    import scipy.io

    if not devkit.is_file():
        raise InputError(f"{devkit} does not exist: without {DEVKIT} the validation archive has no labels")
    try:
        with open(devkit, "rb") as stream:
            contents = {PurePosixPath(file["fname"]).name: file["data"] for file in tar_files(stream, str(devkit))}
        synsets = scipy.io.loadmat(io.BytesIO(contents["meta.mat"]), squeeze_me=True)["synsets"]
        wnid_of = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in np.atleast_1d(synsets) if s["num_children"] == 0}
        truth = [int(line) for line in contents["ILSVRC2012_validation_ground_truth.txt"].split()]
        unknown = set(truth) - set(wnid_of)
    except (OSError, EOFError, tarfile.TarError, KeyError, ValueError, TypeError, IndexError) as error:
        raise InputError(f"{devkit} is not {DEVKIT} as downloaded: {type(error).__name__}: {error}") from error
    if unknown:
        raise InputError(f"{devkit} labels images with ILSVRC2012_ID {min(unknown)}, which is no class of its meta.mat")
    return wnid_of, truth


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


# --------------------------------------------------------------------------------------------------- decoding images


def decode(data: bytes, grey: bool = False) -> Image.Image:
    """Decode an image to RGB or grey. Raises ValueError with the reason if it is damaged."""
    with warnings.catch_warnings(action="ignore"):  # Pillow warns of broken EXIF data although the pixels are good
        try:
            image: Any = Image.open(io.BytesIO(data), formats=FORMATS)
            image.load()
            return as_displayed(image).convert("L" if grey else "RGB")
        except MemoryError:
            raise
        except UnidentifiedImageError as error:
            raise ValueError("no known image format") from error  # Pillow's own message holds a memory address
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error and more
            raise ValueError(str(error) or type(error).__name__) from error


def as_displayed(image: Any) -> Any:
    """The image as a viewer displays it: rotated by its EXIF tag, 8 bits, transparency on white."""
    with suppress(Exception):  # the EXIF block may be broken
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # convert() would clip 16-bit grey at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no fixed range")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image


def cut_square(image: Image.Image, size: int, crop: Crop) -> np.ndarray:
    """The centre square at size x size: uint8 (size, size, C).

    adm: resizes the image, then crops, with the steps and the rounding of guided-diffusion (ADM).
    area: crops the square, then takes the mean over the area of each target pixel (bicubic for enlarging).
    """
    if crop == "adm":
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    else:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((size, size), Image.Resampling.BOX if side > size else Image.Resampling.BICUBIC)
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array
