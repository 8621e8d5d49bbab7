"""Raw images as they come: archives, folders and the devkit, made small."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

from cdm_lightning.data.shards import open_images, read_manifest

WNIDS = ["n02119789", "n01440764", "n03000134", "n02100735"]  # not sorted, as in the devkit
RNG = np.random.default_rng(0)


def picture(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    """Noise over a slope: a mistake of one pixel or one grey level shows."""
    slope = np.linspace(0, 150, width)[None, :, None] + np.zeros((height, 1, 3))
    return Image.fromarray((slope + RNG.integers(0, 100, (height, width, 3))).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def jpeg(width: int = 40, height: int = 30, mode: str = "RGB") -> bytes:
    return encoded(picture(width, height, mode), "JPEG", quality=90)


def tar_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def train_files(per_class: int = 6) -> dict[str, dict[str, bytes]]:
    """WNID -> file name -> bytes; each synset has one grey and one CMYK JPEG."""
    modes = ["L", "CMYK"] + ["RGB"] * per_class
    return {w: {f"{w}_{i}.JPEG": jpeg(36 + 3 * i, 50 - i, modes[i]) for i in range(per_class)} for w in WNIDS}


def write_train_archive(path: Path, files: dict[str, dict[str, bytes]]) -> Path:
    path.write_bytes(tar_bytes({f"{wnid}.tar": tar_bytes(inner) for wnid, inner in files.items()}))
    return path


def write_tree(root: Path, files: dict[str, dict[str, bytes]]) -> Path:
    for folder, inner in files.items():
        (root / folder).mkdir(parents=True)
        for name, data in inner.items():
            (root / folder / name).write_bytes(data)
    return root


def write_devkit(path: Path, truth: list[int]) -> Path:
    """The devkit as it is: leaves first, in an order that is not the WNIDs', then inner nodes of the tree."""
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    synsets = np.zeros((len(WNIDS) + 1, 1), dtype=[(field, object) for field in fields])
    for number, wnid in enumerate(WNIDS, 1):
        synsets[number - 1, 0] = (float(number), wnid, "a thing", "what it is", 0.0, np.zeros((1, 0)), 0.0)
    synsets[-1, 0] = (float(len(WNIDS) + 1), "n00001740", "entity", "all", 2.0, np.array([[1.0, 2.0]]), 19.0)
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"synsets": synsets})
    lines = "".join(f"{number}\n" for number in truth).encode()
    root = "ILSVRC2012_devkit_t12"
    data = {f"{root}/data/meta.mat": buffer.getvalue(), f"{root}/data/ILSVRC2012_validation_ground_truth.txt": lines}
    with tarfile.open(path, "w:gz") as tar:
        for name, content in data.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def val_archive(folder: Path, truth: list[int]) -> tuple[Path, dict[str, bytes]]:
    files = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg() for i in range(len(truth))}
    path = folder / "ILSVRC2012_img_val.tar"
    path.write_bytes(tar_bytes(dict(reversed(files.items()))))  # the order inside the tar does not matter
    write_devkit(folder / "ILSVRC2012_devkit_t12.tar.gz", truth)
    return path, files


def tiny_tree(root: Path, classes: int, per_class: int, side: int = 8) -> Path:
    def one_class() -> dict[str, bytes]:
        return {f"{i:04d}.bmp": encoded(picture(side, side), "BMP") for i in range(per_class)}

    return write_tree(root, {f"class{c}": one_class() for c in range(classes)})


def stored(out: Path) -> Iterator[tuple[str, np.ndarray, int]]:
    """(key, uint8 image, label) of every sample of a folder of shards, in order."""
    manifest = read_manifest(out)
    opened = open_images(out, manifest, manifest.shards, range(manifest.count))
    for item in range(manifest.count):
        yield opened.key(item), *opened.load(item)
