"""Shards: manifest.py, PNGs in tars (tar.py), packed arrays (packed.py), and reading either form (reading.py)."""

from cdm_lightning.data.shards.manifest import (
    Manifest,
    Shard,
    find_folder,
    read_manifest,
    shards_digest,
    write_manifest,
)
from cdm_lightning.data.shards.packed import write_packed
from cdm_lightning.data.shards.reading import Images, OpenedImages, in_batches, open_images
from cdm_lightning.data.shards.tar import read_shard, write_images, write_shard

__all__ = [
    "Images",
    "Manifest",
    "OpenedImages",
    "Shard",
    "find_folder",
    "in_batches",
    "open_images",
    "read_manifest",
    "read_shard",
    "shards_digest",
    "write_images",
    "write_manifest",
    "write_packed",
    "write_shard",
]
