"""`cdm prepare`: raw images to shards in <out>/<split>/<resolution>/, each image decoded once for all resolutions."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import PIL

from cdm_lightning.data.preparation.listing import Listing, Split, examples
from cdm_lightning.data.preparation.raw_images import FILTERS, Crop, RawImage
from cdm_lightning.data.preparation.tasks import PROGRESS, Task, make_shards
from cdm_lightning.data.shards import Manifest, Shard, read_manifest, write_manifest
from cdm_lightning.data.shards.manifest import MAX_IMAGES
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import read_table, write_atomically
from cdm_lightning.foundation.images import check_power_of_two
from cdm_lightning.foundation.terminal import printable

MAX_RESOLUTION = 4096  # a larger image may not fit into what is read of one file in a shard


def prepare(
    find: Callable[[], Listing],
    source: Path | str,
    out: Path,
    split: Split = "train",
    resolutions: Sequence[int] = (64, 32),
    grey: bool = False,
    crop: Crop = "adm",
    seed: int = 0,
    images_per_shard: int = 1000,
    workers: int | None = None,
    max_corrupt: float = 0.001,
    limit: int | None = None,
    packed: int = 64,
    _asked: str | None = None,
) -> None:
    """Put all images into one random order, make the missing shards, and write the manifests last.

    Args:
        find: lists the classes and images of the source.
        source: the source, which errors name: a path, or what else `find` understands.
        out: output folder; the shards go to OUT/SPLIT/RESOLUTION.
        split: which part of the data set the source is: train or val.
        resolutions: widths to store. The largest is cropped from the raw image; each lower one is the mean over 2x2
            pixels of the next larger, so the ratio of two widths must be a power of two.
        grey: store one grey channel instead of red, green and blue.
        crop: how a raw image becomes a square. adm: resize by box halvings and bicubic, then crop the centre, as
            guided-diffusion does. area: crop the centre square, then take the mean over each pixel's area.
        seed: seed of the random order of all images over the shards.
        images_per_shard: images in one tar file.
        workers: number of processes, each with about 0.7 GB of memory at 256 pixels. Default: one per core.
        max_corrupt: share of the images that may be unreadable; more is an error. They are listed in the manifest.
        limit: use only this many images, chosen at random.
        packed: the largest width that is stored packed: as bare pixels in one array per shard, which are read many
            times faster. Larger widths are stored as PNG; 0 stores all as PNG. At 64x64 an image takes 12 KB packed,
            and 11 KB as PNG.
        _asked: for a source that is fetched, all that is known of it before. A folder that is finished with the same is
            not made again, and the source is not fetched to see whether it has changed. No option of the command line.
    """
    workers = os.cpu_count() or 1 if workers is None else workers
    check_arguments(resolutions, crop, images_per_shard, workers, max_corrupt, limit, packed)
    resolutions, folder = sorted(resolutions, reverse=True), Path(out) / split
    in_arrays = [resolution for resolution in resolutions if resolution <= packed]
    if isinstance(source, Path) and not source.exists():
        raise InputError(f"{source} does not exist: it should be the archive or folder of raw images")
    if isinstance(source, Path) and not (source.is_file() or source.is_dir()):  # a pipe would be waited for
        raise InputError(f"{source} is neither a file nor a folder: it should be the archive or folder of raw images")
    if Path(out).resolve() == Path(source).resolve():
        raise InputError(f"out {out} is the source itself, whose folders are classes: give another folder")
    arguments: dict[str, Any] = {  # everything that the bytes of the shards depend on
        "seed": seed, "resolutions": resolutions, "crop": crop, "grey": grey, "images_per_shard": images_per_shard,
        "limit": limit, "pillow": PIL.__version__, "packed": in_arrays,
        "png": f"averages, zlib {zlib.ZLIB_RUNTIME_VERSION}",
    }  # fmt: skip
    if _asked is not None:
        arguments["source"] = _asked
        if is_finished(folder, arguments):
            shutil.rmtree(folder / PROGRESS, ignore_errors=True)
            print(f"{folder} is finished: the source is not fetched again")
            print_summary(folder, resolutions)
            return
    listing = find()
    if not any(listing.images.values()):
        left_out = listing.about_left_out()
        raise InputError(f"{source} holds no images" + (f"; left out are {left_out}" if left_out else ""))
    classes = settle_classes(Path(out), split, listing.classes or sorted(listing.images))
    images = listing.labelled(classes)
    print_listing(listing, classes)
    lines = sorted(os.fsencode(f"{image.name} {image.label} {image.size}\n") for image in images)
    arguments |= {"images": len(images), "listing": hashlib.sha256(b"".join(lines)).hexdigest()[:16]}
    images = sorted(images, key=lambda image: hashlib.sha256(os.fsencode(f"{seed}/{image.name}")).digest())[:limit]

    if not is_finished(folder, arguments):
        make_split(images, classes, source, folder, arguments, workers, max_corrupt)
    shutil.rmtree(folder / PROGRESS, ignore_errors=True)
    print_summary(folder, resolutions)


def make_split(
    images: list[RawImage],
    classes: list[str],
    source: Path | str,
    folder: Path,
    arguments: dict[str, Any],
    workers: int,
    max_corrupt: float,
) -> None:
    """Make the missing shards of a split from images in their final order, then the manifest of each resolution.

    arguments: what the bytes depend on, by the names of `prepare`; packed is here the list of widths stored packed.
    """
    if not (folder / PROGRESS / "arguments.json").is_file():
        write_atomically(folder / PROGRESS / "arguments.json", json.dumps(arguments).encode())
    resolutions, crop, grey, size = (arguments[k] for k in ("resolutions", "crop", "grey", "images_per_shard"))
    tasks = [
        Task(number, start, images[start : start + size], folder, resolutions, crop, grey, arguments["packed"])
        for number, start in enumerate(range(0, len(images), size))
    ]
    records = make_shards(tasks, workers, max_corrupt)
    counts = sum((Counter(record["labels"]) for record in records), Counter())
    skipped = [entry for record in records for entry in record["skipped"]]
    if not counts:
        raise InputError(f"{source} holds no image that can be read: {printable(skipped[0]['reason'])}")
    for resolution in resolutions:
        manifest = Manifest(
            resolution, 1 if grey else 3, folder.name, classes, [counts[label] for label in range(len(classes))],
            [Shard(**record["shards"][str(resolution)]) for record in records],
            arguments["seed"], crop, FILTERS[crop], printable(recorded_name(source)), len(skipped),
            {"arguments": arguments, "skipped": skipped},
        )  # fmt: skip
        write_manifest(folder / str(resolution), manifest)
    (folder / PROGRESS / "arguments.json").unlink()  # from here on the manifests record the arguments


def recorded_name(source: Path | str) -> str:
    """The name of a source for the manifest: the last part of its path, or of each of its patterns.

    What follows the question mark of an address is left out, as it may be a password.
    """
    if isinstance(source, Path):
        return source.resolve().name
    return "::".join(PurePosixPath(pattern.partition("?")[0]).name for pattern in source.split("::"))


def check_arguments(
    resolutions: Sequence[int],
    crop: str,
    images_per_shard: int,
    workers: int,
    max_corrupt: float,
    limit: int | None,
    packed: int,
) -> None:
    """Refuse arguments out of range, before hours are spent."""
    if crop not in FILTERS:
        raise InputError(f"crop is {crop}: it must be one of {', '.join(FILTERS)}")
    if not resolutions or min(resolutions) < 1 or len(set(resolutions)) < len(resolutions):
        raise InputError(f"resolutions are {list(resolutions)}: at least one is needed, each positive and named once")
    for resolution in resolutions:
        check_power_of_two(max(resolutions), resolution)
    for name, number in [("images_per_shard", images_per_shard), ("workers", workers), ("limit", limit)]:
        if number is not None and number < 1:
            raise InputError(f"{name} is {number}: it must be at least 1")
    if max(resolutions) > MAX_RESOLUTION:
        raise InputError(f"resolutions are {list(resolutions)}: {MAX_RESOLUTION} is the largest that shards can hold")
    if images_per_shard > MAX_IMAGES:
        raise InputError(f"images_per_shard is {images_per_shard}: a shard can hold {MAX_IMAGES} at most")
    if packed < 0:
        raise InputError(f"packed is {packed}: it is the largest width to store packed, 0 for none")
    if not 0 <= max_corrupt <= 1:
        raise InputError(f"max_corrupt is {max_corrupt}: it is a share and must lie between 0 and 1")


def settle_classes(out: Path, split: str, classes: list[str]) -> list[str]:
    """The classes in label order, those of the training split if the validation split has no others.

    Refuses classes that differ from those of another split, as a label would then mean two classes.
    """
    for path in sorted(out.glob("*/*/manifest.json")):
        other = path.parent.parent.name
        known = classes if other == split else read_manifest(path.parent).classes
        if (split, other) == ("val", "train") and set(classes) <= set(known):
            return known
        if known != classes:
            label = next(k for k in range(len(known) + 1) if known[k : k + 1] != classes[k : k + 1])
            raise InputError(
                f"the source has {len(classes)} classes, {out / other} has {len(known)}, and label {label} is "
                f"{classes[label : label + 1]} here and {known[label : label + 1]} there: the splits must agree, or "
                "train be prepared first and val lack some"
            )
    return classes


def print_listing(listing: Listing, classes: list[str]) -> None:
    """Print what is left out before any image is decoded, and which classes have no images."""
    if left_out := listing.about_left_out():
        print(f"left out: {left_out}")
    if empty := [name for name in classes if not listing.images.get(name)]:
        print(f"{len(empty)} of {len(classes)} classes have no images: {examples(empty)}")


def is_finished(folder: Path, arguments: dict[str, Any]) -> bool:
    """Whether `folder` is finished. Refuses one that was made or begun with other arguments."""
    started, manifests = folder / PROGRESS / "arguments.json", sorted(folder.glob("*/manifest.json"))
    earlier: dict[str, Any] = {}
    if started.is_file():
        earlier = read_table(started)
    elif manifests:
        earlier = read_manifest(manifests[0].parent).extra.get("arguments", {})
    elif not any(folder.glob("*/*.tar*")):
        return False
    if not earlier:
        raise InputError(f"{folder} holds shards that no `cdm prepare` made: give another output folder or remove it")
    changed = [f"{key} {earlier.get(key)} (now {new})" for key, new in arguments.items() if earlier.get(key) != new]
    if changed:
        raise InputError(f"{folder} was prepared with {', '.join(changed)}: give another output folder or remove it")
    return not started.is_file()


def print_summary(folder: Path, resolutions: list[int]) -> None:
    """Print what `folder` holds."""
    for resolution in resolutions:
        manifest = read_manifest(folder / str(resolution))
        print(
            f"{printable(str(folder / str(resolution)))}: {manifest.count:,} images of {len(manifest.classes)} classes "
            f"in {len(manifest.shards)} shards, {sum(shard.bytes for shard in manifest.shards):,} bytes, "
            f"{manifest.skipped} unreadable images left out"
        )
    for entry in manifest.extra.get("skipped", [])[:1]:
        print(f"the first unreadable one is {printable(entry['name'])}: {printable(entry['reason'])}")
