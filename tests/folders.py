"""Folders of shards: made of noise, read by other means than the package's, damaged, and compared."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from cdm_lightning.data.shards import Manifest, read_manifest, write_manifest, write_shard
from cdm_lightning.foundation.images import encode_png

FASHION = Path(__file__).parents[1] / "data" / "fashion"


def make_folder(folder, sizes, resolution=8, channels=1, classes=10, suffix=".tar"):
    """A finished folder of noise; image i has label 3 i mod `classes`, so that a shift of one shows."""
    rng, shards, first = np.random.default_rng(0), [], 0
    shape = (resolution, resolution, channels)
    for number, size in enumerate(sizes):
        images = [encode_png(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(size)]
        samples = [(f"{i:08d}", png, 3 * i % classes) for i, png in enumerate(images, first)]
        shards.append(write_shard(folder / f"{number:03d}{suffix}", samples))
        first += size
    names = [f"class {c}" for c in range(classes)]
    counts = [len(range(c, first, classes)) for c in range(classes)]
    write_manifest(folder, Manifest(resolution, channels, folder.parent.name, names, counts, shards))
    return read_manifest(folder)


def read_raw(folder):
    """key -> (uint8 (H, W) or (H, W, C), label) of all shards, by tarfile and Pillow alone."""
    files = {}
    for path in sorted(folder.glob("*.tar*")):
        with tarfile.open(path) as tar:
            files |= {member.name: tar.extractfile(member).read() for member in tar}
    keys = sorted({name.split(".")[0] for name in files})
    return {k: (np.array(Image.open(io.BytesIO(files[f"{k}.png"]))), int(files[f"{k}.cls"])) for k in keys}


def repacked(path, change):
    """The bytes of a shard with its files changed by change(name, data) -> data, or None to leave one out."""
    buffer = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=buffer, mode="w") as new:
        for member in old:
            data = change(member.name, old.extractfile(member).read())
            if data is not None:
                member.size = len(data)
                new.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def with_member(wanted, data):
    """A function of a shard's path: its bytes with the file `wanted` replaced, or left out where data is None."""
    return lambda path: repacked(path, lambda name, old: data if name == wanted else old)


def hashes(folder: Path, pattern: str = "*") -> dict[str, str]:
    """SHA-256 of every file under a folder but pictures of samples."""
    files = [p for p in sorted(folder.rglob(pattern)) if p.is_file() and p.name != "samples.png"]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
