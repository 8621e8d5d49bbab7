"""`cdm prepare parquet`: tables with a column of encoded images and one of labels, as the hub's image data sets are."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cdm_lightning.data.preparation.class_labels import ClassLabels, distinct, read_class_names
from cdm_lightning.data.preparation.listing import Listing, Split
from cdm_lightning.data.preparation.prepare import prepare
from cdm_lightning.data.preparation.staging import Part, Staging, asked_for, expand
from cdm_lightning.data.preparation.webdataset import index_tar
from cdm_lightning.foundation.errors import InputError

ROWS = 16  # that are in memory at once
DESCRIPTION = "__labels__"  # the member of a staged tar that says what its labels are


def prepare_parquet(
    source: str,
    out: Path,
    split: Split = "train",
    image: str = "image",
    label: str = "label",
    classes: Path | None = None,
    **options: Any,
) -> None:
    """Make shards from parquet files with a column of encoded images and one of labels, such as the hub's.

    If it is stopped or killed, the same command continues. The shards are the same bytes for any number of workers, and
    wherever the files lie. They are first fetched and written as tars into OUT/SPLIT/.progress, which takes their room
    until the shards are made. Needs pyarrow: pip install "cdm_lightning[parquet]".

    Args:
        source: a file, a folder of *.parquet, a pattern with stars or braces, several parted by "::", or addresses:
            "hf://datasets/OWNER/NAME/data/train-*.parquet".
        out: output folder; the shards go to OUT/SPLIT/RESOLUTION.
        split: which part of the data set the source is: train or val.
        image: the column of images: bytes, or a struct with a field "bytes".
        label: the column of labels: numbers of classes, or their names.
        classes: file with the name of each class, in the order of the numbers: one a line, or a JSON list. Default: the
            names that the file itself states, as the hub's do; else the numbers, or the sorted names.
    """
    try:
        import pyarrow.parquet  # noqa: F401, only to see that it is there
    except ImportError as error:
        raise InputError(f'{source} needs pyarrow, which is missing: pip install "cdm_lightning[parquet]"') from error
    names = None if classes is None else read_class_names(classes)
    parts = expand(source, [".parquet"])
    asked = asked_for(source, parts, image=image, label=label, names=names)
    find = partial(list_parquet, parts, Path(out) / split, image, label, names)
    prepare(find, source, out, split, _asked=asked, **options)


def list_parquet(
    parts: Sequence[Part], folder: Path, image: str, label: str, names: Sequence[str] | None = None
) -> Listing:
    """The images of all files, staged as tars below `folder`, which is OUT/SPLIT."""
    labels: list[ClassLabels] = []

    def index(path: Path, part: Part, listing: Listing) -> None:
        """Add the images of a staged tar, whose first member says what its labels are."""
        with tarfile.open(path) as tar:
            described = json.load(tar.extractfile(DESCRIPTION))  # type: ignore[arg-type]  # the first member
        text = described["text"]
        own = ClassLabels(described["names"] if names is None else names, text, numbers=not text)
        first = labels[0] if labels else own
        if (own.names, own.free) != (first.names, first.free):
            raise InputError(f"{path} has other classes than {parts[0].where}: give files of one data set")
        labels[:] = [first]
        index_tar(path, part, listing, ["image"], "label", first)

    listing = Staging(folder).index(parts, index, partial(write_tar, image=image, label=label), f"{image}\n{label}")
    listing.classes = labels[0].in_order(listing.images)
    return listing


def write_tar(path: Path, tar: Path, image: str, label: str) -> None:
    """Write the rows of a parquet file as a tar of ROW.image and ROW.label; what a row lacks is not written.

    A few rows are in memory at a time. Raises InputError for a file that is damaged or has no such columns.
    """
    import pyarrow

    try:
        with tarfile.open(tar, "w") as archive:
            for name, data in members_of(path, image, label):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(f"{path} cannot be read as parquet: {' '.join(str(error).split())[:200]}") from error


def members_of(path: Path, image: str, label: str) -> Iterator[tuple[str, bytes]]:
    """(name, data) of each file of the tar of a parquet file."""
    import pyarrow.parquet
    from pyarrow import types

    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        schema = file.schema_arrow
        for option, column in (("image", image), ("label", label)):
            if (count := schema.names.count(column)) != 1:
                raise InputError(
                    f"{path} has {count or 'no'} column{'s' * (count > 1)} {column!r}: --{option} names one of "
                    f"{', '.join(schema.names)}"
                )
        kind, of_labels = schema.field(image).type, schema.field(label).type
        packed = types.is_struct(kind)
        if packed:
            kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
        if not (types.is_binary(kind) or types.is_large_binary(kind)):
            raise InputError(
                f"{path} has {kind} in the column {image!r}: encoded images are bytes, or a struct with bytes"
            )
        of_labels = of_labels.value_type if types.is_dictionary(of_labels) else of_labels
        text = types.is_string(of_labels) or types.is_large_string(of_labels)
        if not (text or types.is_integer(of_labels)):
            raise InputError(f"{path} has {of_labels} in the column {label!r}: a label is a whole number or a name")
        yield DESCRIPTION, json.dumps({"names": stated_names(schema, label), "text": text}).encode()
        row = 0
        for batch in file.iter_batches(ROWS, columns=[image, label]):
            for picture, stated in zip(batch.column(image), batch.column(label), strict=True):
                data = (picture["bytes"] if packed and picture.is_valid else picture).as_py()
                value = stated.as_py()
                if data is not None:
                    yield f"{row:08d}.image", data
                if value is not None:
                    yield f"{row:08d}.label", str(value).encode()
                if data is None and value is None:
                    yield f"{row:08d}.empty", b""
                row += 1


def stated_names(schema: Any, label: str) -> list[str] | None:
    """The names of the classes that the hub writes into a schema (ClassLabel), in label order; None without them."""
    try:
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]
        names = feature["names"]
    except (ValueError, TypeError, KeyError):
        return None
    is_list = isinstance(names, list) and names and all(isinstance(name, str) and name.isprintable() for name in names)
    return distinct(names) if is_list else None
