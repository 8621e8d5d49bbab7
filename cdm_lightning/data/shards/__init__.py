"""Shards: their manifest.py, PNGs in tars (tar.py) and packed arrays (packed.py).

folders.py finds a folder of them, on a disk or by way of cache.py at an address, and reading.py reads its images.
"""

from cdm_lightning.data.shards.folders import (
    Folder,
    RemoteFolder,
    fetching_ahead,
    find_folder,
    read_manifest,
    refuse_address,
    shards_root,
)
from cdm_lightning.data.shards.manifest import Manifest, Shard, shards_digest, write_manifest
from cdm_lightning.data.shards.packed import write_packed
from cdm_lightning.data.shards.reading import Images, OpenedImages, in_batches, open_images
from cdm_lightning.data.shards.tar import read_shard, write_images, write_shard

__all__ = [
    "Folder",
    "Images",
    "Manifest",
    "OpenedImages",
    "RemoteFolder",
    "Shard",
    "fetching_ahead",
    "find_folder",
    "in_batches",
    "open_images",
    "read_manifest",
    "read_shard",
    "refuse_address",
    "shards_digest",
    "shards_root",
    "write_images",
    "write_manifest",
    "write_packed",
    "write_shard",
]
