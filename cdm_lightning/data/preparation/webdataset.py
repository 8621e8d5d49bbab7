"""`cdm prepare webdataset`: tars of images with labels beside them, on the disk, at addresses or from commands."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from webdataset.tariterators import base_plus_ext

from cdm_lightning.data.preparation.archives import members, open_tar
from cdm_lightning.data.preparation.class_labels import ClassLabels, read_class_names
from cdm_lightning.data.preparation.listing import HIDDEN, Listing, Split, examples
from cdm_lightning.data.preparation.prepare import prepare
from cdm_lightning.data.preparation.raw_images import RawImage
from cdm_lightning.data.preparation.staging import Part, Staging, asked_for, expand, needs_staging
from cdm_lightning.foundation.errors import InputError

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
METADATA = r"__[^/]*__($|/)"  # which webdataset skips
MAX_LABEL_BYTES = 1 << 20
FIELD_OF_CLASS = "class"


def prepare_webdataset(
    source: str,
    out: Path,
    split: Split = "train",
    image: str = "jpg;jpeg;png;webp",
    label: str = "cls",
    classes: Path | None = None,
    allow_commands: bool = False,
    **options: Any,
) -> None:
    """Make shards from WebDataset tars, in which an image and its label are files of one name with two endings.

    If it is stopped or killed, the same command continues. The shards are the same bytes for any number of workers, and
    wherever the tars lie. Uncompressed tars on the disk are read in place. All others are first fetched or unpacked
    into OUT/SPLIT/.progress, which takes their room until the shards are made.

    Args:
        source: the tars, as webdataset names them: "train-{0000..1023}.tar", several such patterns parted by "::",
            addresses (https://, s3://, gs://, hf://), and "pipe:COMMAND". Stars and folders are taken too.
        out: output folder; the shards go to OUT/SPLIT/RESOLUTION.
        split: which part of the data set the source is: train or val.
        image: the endings that an image may have; of several in one sample, the first in this order is taken.
        label: the ending of the label, a number, or a name of the classes. json:a.b is the value b in the table a
            of the file that ends in .json.
        classes: file with the name of each class, in the order of the numbers: one a line, or a JSON list. Default: the
            numbers are the names, and labels must be numbers.
        allow_commands: run the commands of the source that begin with "pipe:". They can do whatever you can.
    """
    images = [ending.strip().lstrip(".").lower() for ending in image.split(";") if ending.strip(" .")]
    field, _, keys = label.partition(":")
    field = field.lstrip(".").lower()
    if not images or not field or field in images:
        raise InputError(f"image is {image!r} and label {label!r}: both are endings of files, and differ")
    labels = ClassLabels(None if classes is None else read_class_names(classes))
    parts = expand(source, SUFFIXES, allow_commands)
    staged = any(map(needs_staging, parts))
    asked = asked_for(source, parts, images=images, label=label, names=labels.names) if staged else None
    index = partial(index_tar, images=images, label=field, keys=keys.split(".") if keys else [], labels=labels)
    find = partial(list_tars, parts, Path(out) / split, index, labels)
    prepare(find, source, out, split, _asked=asked, **options)


def list_tars(parts: Sequence[Part], folder: Path, index: partial[None], labels: ClassLabels) -> Listing:
    """The images of all tars. folder: OUT/SPLIT, below which tars are staged that cannot be read in place."""
    listing = Staging(folder).index(parts, index)
    listing.classes = labels.in_order(listing.images)
    return listing


def index_tar(
    path: Path,
    part: Part,
    listing: Listing,
    images: Sequence[str],
    label: str,
    labels: ClassLabels,
    keys: Sequence[str] = (),
) -> None:
    """Add the images of a tar to a listing. Headers and labels are read, images are not.

    images: endings of images, the first that is there is taken. label: the ending of labels. keys: those that lead to
    the label in a JSON file; without them the file is the label. Raises InputError for a label that is no class, and
    for a first tar without a single labelled image.
    """
    samples: dict[str, dict[str, RawImage | str]] = {}
    endings: set[str] = set()
    with open_tar(path) as tar:
        for member in members(tar):
            if re.match(METADATA, member.name):
                continue
            key, ending = base_plus_ext(member.name)
            name = f"{part.name}/{member.name}"
            if key is None:
                hidden = PurePosixPath(member.name).name.startswith(".")
                listing.left_out[HIDDEN if hidden else "without an ending"].append(name)
                continue
            endings.add(ending := ending.lower())
            sample = samples.setdefault(key, {})
            if (FIELD_OF_CLASS if ending == label else ending) in sample:
                listing.left_out["second file of a name"].append(name)
            elif ending in images:
                sample[ending] = RawImage(name, str(path), member.offset_data, member.size)
            elif ending == label and member.size > MAX_LABEL_BYTES:
                listing.left_out[f"{label} too large for a label"].append(name)
            elif ending == label:
                stated = label_in(tar.extractfile(member).read(), keys)  # type: ignore[union-attr]  # a plain file
                if stated is not None:
                    sample[FIELD_OF_CLASS] = labels.class_of(stated, name)
    for key, sample in samples.items():
        add_sample(f"{part.name}/{key}", sample, images, label, listing)
    if not any(listing.images.values()):
        if not samples:
            about = listing.about_left_out()
            raise InputError(f"{path} holds no images" + (f"; left out are {about}" if about else ""))
        raise InputError(
            f"{path} holds no image with a label: its files end in {examples(endings)}, and an image should end in "
            f"{' or '.join(images)}, a label in {label}{' and hold ' + '.'.join(keys) if keys else ''}"
        )


def add_sample(name: str, sample: dict[str, Any], images: Sequence[str], label: str, listing: Listing) -> None:
    """Add the image of a sample to its class, or its name to what is left out."""
    found = [sample[ending] for ending in images if ending in sample]
    if not found:
        listing.left_out[f"without {' or '.join(images)}"].append(name)
    elif FIELD_OF_CLASS not in sample:
        listing.left_out[f"without a label in {label}"].append(name)
    else:
        image, *others = found
        image.name = f"{sample[FIELD_OF_CLASS]}/{image.name}"
        listing.images.setdefault(sample[FIELD_OF_CLASS], []).append(image)
        for other in others:
            listing.left_out["second image of a sample"].append(other.name)


def label_in(data: bytes, keys: Sequence[str]) -> Any:
    """The label that a file states: its text, or what the keys lead to in its JSON. None if there is none."""
    if not keys:
        return data.decode("utf-8-sig", errors="replace").strip() or None
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
