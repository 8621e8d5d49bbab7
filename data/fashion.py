"""Make shards of Fashion-MNIST: `python data/fashion.py IDX_FOLDER OUT [--train N] [--val N]`.

IDX_FOLDER holds the four original files (train-images-idx3-ubyte.gz, ...). The 28x28 images are padded to 32x32 with
two black pixels on each side. --train N and --val N take the first N / 10 images of every class; the default is all.
The shards in data/fashion were made with `--train 15000 --val 3000`.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np

from cdm_lightning.data.shards import write_images

CLASSES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
SEED, RESOLUTION = 0, 32


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of an IDX file: two zero bytes, type 8, the number of dimensions, their sizes, the data."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is not an IDX file of bytes: it starts with {data[:4]!r}")
    sizes = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(sizes)


def first_of_each_class(labels: np.ndarray, count: int | None) -> np.ndarray:
    """Positions of the first count / 10 images of every class, in the original order."""
    if count is None:
        return np.arange(len(labels))
    if count % len(CLASSES):
        raise SystemExit(f"{count} images cannot be balanced over {len(CLASSES)} classes: give a multiple")
    per_class = count // len(CLASSES)
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in range(len(CLASSES))]))


def write_split(source: Path, out: Path, split: str, count: int | None) -> None:
    """Write the shards of one split, train or val, with `count` images (None: all), and print their size."""
    prefix = {"train": "train", "val": "t10k"}[split]
    images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
    chosen = first_of_each_class(labels, count)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None]
    folder = out / split / str(RESOLUTION)
    manifest = write_images(
        folder,
        padded[chosen],
        labels[chosen],
        chosen,
        CLASSES,
        SEED,
        suffix=".tar.gz",
        crop="padded from 28 to 32",
        source="Fashion-MNIST",
    )
    print(
        f"{folder}: {manifest.count} images, {len(manifest.shards)} shards, "
        f"{sum(shard.bytes for shard in manifest.shards):,} bytes"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="IDX_FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--train", type=int, help="training images to take, balanced over the classes (default: all)")
    parser.add_argument("--val", type=int, help="validation images to take, from the original test set (default: all)")
    arguments = parser.parse_args()
    write_split(arguments.source, arguments.out, "train", arguments.train)
    write_split(arguments.source, arguments.out, "val", arguments.val)


if __name__ == "__main__":
    main()
