"""`cdm upscale`: enlarge pictures of one's own by the super-resolution stages of a trained cascade."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from PIL import Image

from cdm_lightning.data.preparation.raw_images import FILTERS, Crop, cut_square, decode
from cdm_lightning.data.shards import read_manifest, write_images
from cdm_lightning.diffusion import Sampler
from cdm_lightning.foundation.class_names import NO_CLASSES, class_number
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import check_output_folder, write_atomically
from cdm_lightning.foundation.images import decode_png, downscale, save_grid
from cdm_lightning.foundation.process_group import Accelerator, first_process, wait_for_all
from cdm_lightning.foundation.progress_bar import ProgressBar
from cdm_lightning.sampling.manifest import Precision, SampleManifest, make_sample_manifest
from cdm_lightning.sampling.sample import read_samples

SHOWN = 20  # rows of the picture
# A cascade is Any here: jsonargparse runs the imports of a TYPE_CHECKING block, and help must be quick.


def upscale(
    bundle: Path,
    images: list[Path],
    out: Path,
    class_name: int | str | None = None,
    low_resolution: PositiveInt | None = None,
    crop: Crop | None = None,
    seed: int = 0,
    levels: list[int] | None = None,
    truncated: bool | None = None,
    sampler: Sampler | None = None,
    sampling_steps: list[int] | None = None,
    block_size: int = 64,
    precision: Precision = "32-true",
    devices: PositiveInt = 1,
    accelerator: Accelerator = "auto",
) -> None:
    """Enlarge pictures of your own by the super-resolution stages of a trained cascade.

    The pictures are cut to squares and reduced to the input of the first stage that is used, as `cdm prepare` does it.
    Writes shards that `cdm evaluate` takes to out/train/<resolution>/, a PNG of each result to out/pictures/, and
    out/upscaled.png, the first pictures beside their results. If it is stopped, the same command continues.

    Args:
        bundle: A folder written by `cdm bundle`, such as data/fashion-cascade.
        images: Files of pictures, or one folder: with a subfolder per class, called by its name or its number, or with
            pictures only.
        out: Folder for the results.
        class_name: Name or number of the class of all pictures, where no subfolders tell it; null where the stages that
            are used take no classes.
        low_resolution: Size at which the cascade takes the pictures up: the low resolution of one of its stages; null
            for the largest that the smallest picture reaches.
        crop: How a picture becomes a square, as in `cdm prepare`: adm or area; null for that of the training images, or
            adm.
        seed: Seed of the results.
        levels: The level s of each stage that is used, such as [501]; null for the bundle's choice.
        truncated: true stops each reverse process at s; false runs it to the end and adds noise up to s; null for the
            bundle's choice. The pictures themselves are always noised.
        sampler: ddpm, ddim or dpm++; null for each stage's own.
        sampling_steps: Network calls of each stage that is used, such as [25]; null for each stage's own.
        block_size: Images per shard at most, drawn together by one process.
        precision: Of the networks: 32-true, bf16-mixed or 16-mixed. The mixed ones are faster, and change the images.
        devices: Number of processes.
        accelerator: cpu, gpu or auto.
    """
    from cdm_lightning.cascade import CascadeModule
    from cdm_lightning.cascade.metadata import read_bundle_metadata
    from cdm_lightning.sampling.draw_blocks import draw
    from cdm_lightning.sampling.shared_work import join_processes, make_trainer

    check_output_folder(out)
    cascade = CascadeModule(bundle, seed=seed)
    pictures = reduced_pictures(images, cascade, low_resolution, crop)
    used = choose_settings(cascade, pictures.image.shape[-1], levels, truncated, sampler, sampling_steps)
    labels = class_labels(pictures, cascade, class_name, used)
    make_trainer(devices, accelerator)  # refuses a device that is not there, before anything is written
    join_processes()
    start = store_pictures(pictures, labels, cascade, Path(out))
    stages = read_bundle_metadata(bundle)["stages_sha256"]
    manifest = make_sample_manifest(cascade, stages, len(labels), labels, block_size, start, precision)
    folders = draw(cascade, manifest, out, start, devices, accelerator)
    if first_process():
        write_results(folders, pictures, manifest, Path(out))
        size, names = pictures.image.shape[-1], " -> ".join(stage.name for stage in used)
        print(f"{out}: {len(labels)} pictures of {size}x{size} -> {names}, as shards in {out}/train")
        print(f"{out}/pictures: a PNG of each; {out}/upscaled.png: the first of them beside their input")


class Picture(NamedTuple):
    """A file, and the name of its class's folder, None in no such folder. listed: the user gave the file itself."""

    file: Path
    folder: str | None
    listed: bool


class Pictures(NamedTuple):
    """Pictures as the cascade takes them up: uint8 (N, C, R, R), in order, and the files that they are from."""

    files: list[Picture]
    image: torch.Tensor


def list_pictures(images: Sequence[Path]) -> list[Picture]:
    """The files to enlarge, in order: those that are given, and those in folders and in their class folders."""
    pictures = []
    for path in map(Path, images):
        if not path.exists():
            raise InputError(f"{path} does not exist: it should be a picture, or a folder of pictures")
        if path.is_file():
            pictures.append(Picture(path, None, True))
            continue
        for file in sorted(file for file in path.rglob("*") if file.is_file() or not file.exists()):  # a broken link
            inside = file.relative_to(path).parts
            if not any(part.startswith(".") for part in inside):  # hidden files are no pictures of the user's
                pictures.append(Picture(file, inside[0] if len(inside) > 1 else None, False))
    return pictures


def reduced_pictures(images: Sequence[Path], cascade: Any, low_resolution: int | None, crop: Crop | None) -> Pictures:
    """The pictures that can be read, at the low resolution of one of the cascade's stages.

    low_resolution: None for the largest that all of them reach, else the smallest. What is no picture is left out of a
    folder and reported, and what is enlarged to that size is counted. Raises InputError if the user gave what is no
    picture by name, or if nothing is left.
    """
    listed = list_pictures(images)
    possible = [stage.low_resolution for stage in list(cascade.stages)[1:]]
    if not possible:
        raise InputError("a cascade of one stage enlarges nothing: a bundle with a super-resolution stage is needed")
    if low_resolution is not None and low_resolution not in possible:
        raise InputError(f"low_resolution {low_resolution} is none at which the cascade takes pictures up: {possible}")
    resolutions = [stage.resolution for stage in cascade.stages]
    known: Crop = next((name for name in FILTERS if name == cascade.origin["crop"]), "adm")
    least = low_resolution or possible[0]
    files, reduced, small = [], [], []
    for picture in ProgressBar(listed, "reading pictures", unit="image"):
        try:
            image = decode(picture.file.read_bytes(), grey=cascade.image_channels == 1)
        except (OSError, ValueError) as error:
            told = f"{picture.file} is no picture that can be read: {getattr(error, 'strerror', None) or error}"
            if picture.listed:
                raise InputError(told) from error
            if first_process():
                print(f"left out: {told}", file=sys.stderr)
            continue
        reached = [size for size in possible if size <= min(image.size)] or possible[:1]
        sizes = reached if low_resolution is None else [low_resolution]
        files.append(picture)
        small += [f"{picture.file} of {image.width}x{image.height}"] if min(image.size) < least else []
        reduced.append({size: reduce_picture(image, size, resolutions, crop or known) for size in sizes})
    if not files:
        where = ", ".join(map(str, images)) or "images []"
        raise InputError(f"{where} holds no picture that can be read: give files, or a folder that holds some")
    if small and first_process():
        told = f"{len(small)} of {len(files)} pictures are smaller than {least}x{least}, at which all are taken up"
        print(f"{told}, and are enlarged to it first: the first is {small[0]}", file=sys.stderr)
    common = min(max(sizes) for sizes in reduced)
    return Pictures(files, torch.stack([sizes[common] for sizes in reduced]))


def reduce_picture(image: Image.Image, size: int, resolutions: Sequence[int], crop: Crop) -> torch.Tensor:
    """uint8 (C, size, size): cut to the largest of `resolutions` that the image reaches, and then halved to `size`."""
    largest = max([r for r in resolutions if size <= r <= min(image.size)], default=size)
    return downscale(torch.from_numpy(np.array(cut_square(image, largest, crop))).permute(2, 0, 1), size)


def choose_settings(
    cascade: Any,
    size: int,
    levels: Sequence[int] | None,
    truncated: bool | None,
    sampler: Sampler | None,
    sampling_steps: Sequence[int] | None,
) -> list[Any]:
    """Set levels, samplers and steps of the stages that enlarge pictures of this size, and return these stages."""
    stages = list(cascade.stages)
    used = [stage for stage in stages[1:] if stage.low_resolution >= size]
    unused = len(stages) - len(used)
    for name, given in (("levels", levels), ("sampling_steps", sampling_steps)):
        if given is not None and len(given) != len(used):
            names = ", ".join(stage.name for stage in used)
            raise InputError(f"{name} {list(given)} has {len(given)} entries, and the stages that are used are {names}")
    chosen = cascade.levels if levels is None else [*cascade.levels[: unused - 1], *levels]
    cascade.set_levels(chosen, cascade.truncated if truncated is None else truncated)
    own = [stage.diffusion.sampling_steps or stage.diffusion.timesteps for stage in stages]
    cascade.set_sampler(sampler, own if sampling_steps is None else [*own[:unused], *sampling_steps])
    return used


def class_labels(pictures: Pictures, cascade: Any, class_name: int | str | None, used: Sequence[Any]) -> list[int]:
    """The class number of each picture: of class_name, else of its folder. Without classes all of them are 0."""
    folders = {picture.folder for picture in pictures.files}
    names = cascade.origin["classes"]
    if class_name is not None and cascade.num_classes is None:
        raise InputError(f"class_name {class_name} is given, and this cascade takes no classes")
    if class_name is not None and (subfolders := sorted(folder for folder in folders if folder is not None)):
        raise InputError(f"give class_name {class_name} or subfolders such as {subfolders[0]}, not both")
    if cascade.num_classes is None or (class_name is None and folders == {None}):
        if any(stage.num_classes is not None for stage in used):
            some = "numbers" if names is None else ", ".join(names[:3])
            raise InputError(f"the class of the pictures is needed ({some}, ...): give class_name, or a folder a class")
        cascade.origin = {**cascade.origin, "classes": NO_CLASSES if cascade.num_classes else None}
        return [0] * len(pictures.files)
    if class_name is None and None in folders:
        loose = next(picture.file for picture in pictures.files if picture.folder is None)
        raise InputError(f"{loose} lies beside folders of classes, in none of them: its class is not known")
    words = [class_name if class_name is not None else picture.folder for picture in pictures.files]
    labels = [class_number(str(word), names) for word in words]
    cascade.check_labels(torch.tensor(labels))
    return labels


def store_pictures(pictures: Pictures, labels: list[int], cascade: Any, out: Path) -> Path:
    """Write the pictures as shards to out/input/train/<R>, and return that folder.

    Refuses to replace other pictures that results were made of.
    """
    arrays = pictures.image.permute(0, 2, 3, 1).contiguous().numpy()
    files = [str(picture.file) for picture in pictures.files]
    digest = hashlib.sha256(arrays.tobytes() + repr((files, labels)).encode()).hexdigest()
    folder = out / "input" / "train" / str(arrays.shape[1])
    if first_process():
        before = [read_manifest(path.parent).extra for path in out.glob("input/train/*/manifest.json")]
        if any(out.glob("train/*/*.tar")) and any(extra.get("sha256") != digest for extra in before):
            raise InputError(f"{out} was begun with other pictures or classes: choose another folder")
        classes = cascade.origin["classes"] or [str(number) for number in range(cascade.num_classes or 1)]
        write_images(
            folder, arrays, np.array(labels), range(len(labels)), classes, None, source="pictures",
            extra={"files": files, "sha256": digest},
        )  # fmt: skip
    wait_for_all()
    return folder


def write_results(folders: Sequence[Path], pictures: Pictures, manifest: SampleManifest, out: Path) -> None:
    """Write a PNG of each result, and a picture of the first ones: input and results side by side."""
    rows: list[list[torch.Tensor]] = [[image] for image in pictures.image[:SHOWN]]
    for folder in folders:
        for number, sample in enumerate(read_samples(folder, manifest.blocks)):
            if number < SHOWN:
                rows[number].append(torch.from_numpy(decode_png(sample["png"])).permute(2, 0, 1))
            if folder == folders[-1]:
                file = pictures.files[number].file
                write_atomically(out / "pictures" / f"{number:08d}-{file.stem}.png", sample["png"])
    heads = [f"input, {pictures.image.shape[-1]}x{pictures.image.shape[-1]}", *(f"{f.name}x{f.name}" for f in folders)]
    save_grid(rows, out / "upscaled.png", cell=max(128, int(folders[-1].name)), heads=heads)
