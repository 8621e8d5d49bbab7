"""Reading shards from an address beside the disk: `python experiments/bench/addresses.py`.

Packed 64x64 shards of random pixels, from `python -m http.server` on this machine, through the loader in batches of 64.
Each round reads them from the disk, from the server into an empty cache, and from the server with a full one. Images a
second of the clock, and the median ratio to the disk within a round.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from cdm_lightning.data.shards import (
    Manifest,
    find_folder,
    read_manifest,
    shards_root,
    write_manifest,
    write_packed,
)
from cdm_lightning.data.stream import ShardStream


def rate(folder: Any, workers: int) -> float:
    """Images a second of one epoch."""
    manifest = read_manifest(folder)
    stream = ShardStream(folder, manifest, 64, 64, end=manifest.count, flip=True)
    start = time.perf_counter()
    images = sum(len(batch[0]) for batch in DataLoader(stream, batch_size=None, num_workers=workers))
    return images / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--images", type=int, default=1000, help="of a shard")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    given = parser.parse_args()
    # A thread may still fetch ahead while the folder is removed.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        root = Path(temporary)
        folder, rng = root / "train" / "64", np.random.default_rng(0)
        folder.mkdir(parents=True)
        labels, keys = np.zeros(given.images, int), [f"{number:08d}" for number in range(given.images)]
        shards = [
            write_packed(
                folder / f"{n:06d}.tar", rng.integers(0, 256, (given.images, 64, 64, 3), np.uint8), labels, keys
            )
            for n in range(given.shards)
        ]
        write_manifest(folder, Manifest(64, 3, "train", ["noise"], [given.shards * given.images], shards))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "-d", temporary]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found: dict[str, list[float]] = {}
        try:
            for number in range(given.rounds):
                for workers in (0, 2):
                    cache = root / f"cache-{number}-{workers}"
                    for name in ("disk", "empty cache", "full cache"):
                        place = folder if name == "disk" else shards_root(f"http://127.0.0.1:{port}", cache)
                        read = place if name == "disk" else find_folder(place, "train", 64)
                        found.setdefault(f"{name}, {workers} workers", []).append(rate(read, workers))
        finally:
            server.terminate()
    rows = {}
    for name, rates in found.items():
        disk = found[f"disk, {name.partition(', ')[2]}"]
        rows[name] = {"rate": median(rates), "of_disk": median(a / b for a, b in zip(rates, disk, strict=True))}
        print(f"{name}: {rows[name]['rate']:,.0f} images/s, {rows[name]['of_disk']:.2f} of the disk")
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "addresses.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
