"""ADM's .npz files: writing samples for its evaluator, and reading its reference statistics. Nothing is unpickled."""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from numpy.lib import format as npy

from cdm_lightning.data.shards import find_folder, read_manifest
from cdm_lightning.evaluation.real_images import read_images
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import check_output_folder
from cdm_lightning.foundation.progress_bar import ProgressBar

TORN = (OSError, ValueError, EOFError, KeyError, TypeError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile)
BROKEN = (*TORN, zlib.error, NotImplementedError, RuntimeError)  # raised by zipfile and numpy for a corrupt .npz


MAX_RESOLUTION = 1024  # a batch of images must fit in memory, whatever size the file claims


@dataclass(frozen=True)
class Images:
    """arr_0 of an .npz: `shape` is (N, H, W, C); iterating reads batches, uint8 (B, C, H, W)."""

    path: Path
    shape: tuple[int, int, int, int]
    batch_size: int = 50

    def __iter__(self) -> Iterator[torch.Tensor]:
        n, *size = self.shape
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
            read_header(member)
            for start in range(0, n, self.batch_size):
                shape = (min(self.batch_size, n - start), *size)
                try:
                    data = member.read(int(np.prod(shape)))
                    batch = np.frombuffer(data, np.uint8).reshape(shape).transpose(0, 3, 1, 2)
                except BROKEN as error:
                    raise InputError(f"{self.path} cannot be read: {reason(error)}") from error
                yield torch.from_numpy(batch.copy())  # a copy with contiguous (B, C, H, W) strides


def read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and dtype of a .npy stream. Leaves the stream at the first number."""
    version = npy.read_magic(member)
    return npy.read_array_header_1_0(member) if version == (1, 0) else npy.read_array_header_2_0(member)


def reason(error: BaseException) -> str:
    """The type and first line of an error."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'it is damaged'}"


def names_in(path: Path) -> set[str]:
    """Names of the arrays in an .npz file. Raises InputError for another file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except BROKEN as error:
        raise InputError(f"{path} is no .npz file: {reason(error)}") from error


def read_array(path: Path, name: str, most: int) -> np.ndarray:
    """One array of at most `most` numbers. Refuses arrays of objects, which would have to be unpickled."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
            shape, _, dtype = read_header(member)
        if math.prod(shape) > most or dtype.itemsize > 8:
            raise ValueError(f"it says {dtype} {shape}, where {most} numbers are expected")
        with np.load(path, allow_pickle=False) as arrays:
            array = arrays[name]
    except BROKEN as error:
        raise InputError(f"{path} holds no array {name} of numbers: {reason(error)}") from error
    if array.dtype.kind not in "iuf":
        raise InputError(f"{path} holds {name} as {array.dtype}, where numbers are expected")
    return array


def find_images(path: Path) -> Images:
    """The images arr_0 of an .npz, whose header is checked but not their data. They must be uint8 (N, R, R, 1 or 3)."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            shape, fortran, dtype = read_header(member)
    except BROKEN as error:
        raise InputError(f"{path} holds no images arr_0: {reason(error)}") from error
    if dtype != np.uint8:
        raise InputError(f"{path} holds arr_0 as {dtype}, where uint8 images, 0 ... 255, are expected")
    square = len(shape) == 4 and shape[1] == shape[2] and shape[3] in (1, 3) and min(shape) > 0
    if square and shape[1] > MAX_RESOLUTION:
        raise InputError(
            f"{path} holds images of {shape[1]}x{shape[1]}, and {MAX_RESOLUTION}x{MAX_RESOLUTION} is the most"
        )
    if not square or fortran:
        raise InputError(f"{path} holds arr_0 of shape {tuple(shape)}, where images (N, R, R, 1 or 3) are expected")
    n, height, width, channels = shape
    return Images(path, (n, height, width, channels))


def read_statistics(path: Path, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """mu (d,) and sigma (d, d), float64, of an .npz for d features. sigma is divided by n - 1, as in numpy.cov."""
    mean, covariance = (read_array(path, name, 4 * features**2) for name in ("mu", "sigma"))
    if mean.shape != (features,) or covariance.shape != (features, features):
        raise InputError(
            f"{path} holds mu {mean.shape} and sigma {covariance.shape}, "
            f"where {(features,)} and {(features, features)} are expected"
        )
    for name, array in (("mu", mean), ("sigma", covariance)):
        if not np.isfinite(array).all():
            raise InputError(f"{path} holds numbers in {name} that are not finite")
    return torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance.astype(np.float64))


def npz(samples: Path, out: Path, resolution: PositiveInt | None = None, split: str = "train") -> None:
    """Write finished samples as ADM's .npz: arr_0, uint8 (N, R, R, C), and arr_1, int64 (N,) class numbers.

    Images are written in stored order, one batch at a time, so that memory does not grow with their number. ADM's
    evaluator expects colour images; grey images are written with one channel.

    Args:
        samples: A folder written by `cdm sample`, with <split>/<resolution>/ in it.
        out: The .npz file to write.
        resolution: Resolution of the images; null for the largest stored.
        split: The split to write; samples are in train.
    """
    if Path(out).suffix != ".npz":
        raise InputError(f"{out} is the name of no .npz file")
    check_output_folder(Path(out).parent)
    if resolution is None:
        stored = [int(f.name) for f in Path(samples, split).glob("*") if f.name.isdecimal() and f.is_dir()]
        resolution = max(stored, default=1)
    manifest = read_manifest(find_folder(samples, split, resolution))
    shape = (manifest.count, resolution, resolution, manifest.channels)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    partial = Path(out).with_name(Path(out).name + ".partial")
    try:
        with zipfile.ZipFile(partial, "w") as archive:
            labels = write_images(archive, shape, read_images(samples, split, resolution, 500))
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                npy.write_array(member, labels, version=(1, 0), allow_pickle=False)
        partial.replace(out)
    except OSError as error:
        raise InputError(f"{out} could not be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    print(f"{out}: {manifest.count} images {resolution}x{resolution}, {manifest.channels} channels, and their classes")


def write_images(
    archive: zipfile.ZipFile, shape: tuple[int, ...], batches: Iterator[tuple[torch.Tensor, torch.Tensor]]
) -> np.ndarray:
    """Write arr_0 of the given shape from batches of uint8 (B, C, R, R), and return all labels, int64 (N,)."""
    labels = []
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with (
        archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member,
        ProgressBar(total=shape[0], desc="images", unit="image") as bar,
    ):
        npy.write_array_header_1_0(member, header)
        for image, label in batches:
            member.write(image.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
            labels.append(label.numpy())
            bar.update(len(image))
    return np.concatenate(labels).astype(np.int64)


def count_labels(path: Path, n: int) -> list[int]:
    """Images per class from arr_1, the class numbers of n images."""
    labels = read_array(path, "arr_1", n)
    if labels.shape != (n,) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise InputError(f"{path} holds arr_1 as {labels.dtype} {labels.shape}, not the class numbers of {n} images")
    return np.bincount(labels.astype(np.int64)).tolist()
