"""Data loading benchmark: images per second from packed shards, PNG shards, original JPEGs, and a plain memory copy.

It generates photograph-like JPEGs of 400x350 and prepares them in both shard formats at every resolution. The sources
are measured in turn, round after round, in one process with one thread. Then it measures the loader with workers, and
`cdm prepare` in one process and on all cores, compared with decoding alone. Everything is read from the page cache.
Results are medians over rounds. Ratios compare CPU times, which other load on the machine changes little.
"""

from __future__ import annotations

import io
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from cdm_lightning.data.preparation.folders import prepare_folder
from cdm_lightning.data.preparation.raw_images import cut_square, decode
from cdm_lightning.data.shards import read_manifest
from cdm_lightning.data.stream import ShardStream

WIDTH, HEIGHT = 400, 350  # about the mean of ImageNet
DISTINCT = 50  # different pictures; the others are copies
Rate = tuple[float, float]  # images per second of wall time, and per second of CPU time of all processes


def photograph(rng: np.random.Generator) -> bytes:
    """JPEG bytes of low-frequency noise with some grain: about 50 KB, like a photograph of that size."""
    image = np.zeros((HEIGHT, WIDTH, 3))
    for waves in (4, 12, 36, 100):
        for channel in range(3):
            noise = Image.fromarray(rng.normal(size=(waves * HEIGHT // WIDTH + 1, waves)).astype(np.float32))
            image[..., channel] += (
                120 / waves**0.5 * np.asarray(noise.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
            )
    image += 128 + 4 * rng.normal(size=(HEIGHT, WIDTH, 1))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def measured(batches: Iterator[int], seconds: float) -> Rate:
    """The rate at which batches arrive, measured for `seconds`. batches: yields the number of images in each batch."""
    clock, cpu, images = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - clock < seconds:
        images += next(batches)
    return images / (time.perf_counter() - clock), images / (time.process_time() - cpu)


def from_shards(root: Path, resolution: int, batch_size: int, workers: int = 0) -> Iterator[int]:
    """Batch sizes from the endless training stream, with random flips."""
    folder = root / "train" / str(resolution)
    stream = ShardStream(folder, read_manifest(folder), resolution, batch_size, flip=True)
    loader = DataLoader(stream, batch_size=None, num_workers=workers, prefetch_factor=8 if workers else None)
    return (len(image) for image, _, _ in (loader if workers else stream))


def from_jpegs(jpegs: Sequence[bytes], resolution: int, batch_size: int) -> Iterator[int]:
    """Batch sizes from the original files: decode, crop, stack."""
    files = cycle(jpegs)
    while True:
        squares = [cut_square(decode(next(files)), resolution, "adm") for _ in range(batch_size)]
        yield len(torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous())


def copied(resolution: int, batch_size: int, images: int) -> Iterator[int]:
    """Batch sizes from copying an array of as many images as the shards hold."""
    whole = torch.zeros(max(images, batch_size), 3, resolution, resolution, dtype=torch.uint8)
    for start in cycle(range(0, len(whole) - batch_size + 1, batch_size)):
        yield len(whole[start : start + batch_size].clone())


def in_turn(sources: dict[str, Iterator[int]], rounds: int, seconds: float) -> dict[str, Rate]:
    """The median rate of each source, measured once per round, after one batch to warm up."""
    for source in sources.values():
        next(source)
    found: dict[str, list[Rate]] = {name: [] for name in sources}
    for _ in range(rounds):
        for name, source in sources.items():
            found[name].append(measured(source, seconds))
    return {name: (median(r for r, _ in rates), median(r for _, r in rates)) for name, rates in found.items()}


def loader_rate(loader: Iterator[int], seconds: float) -> Rate:
    """The rate of a loader, measured after the batches that its workers have prefetched."""
    for _ in range(20):
        next(loader)
    return measured(loader, seconds)


def prepared(source: Path, out: Path, images_per_shard: int, workers: int = 1, **options: Any) -> tuple[float, float]:
    """Run `cdm prepare folder`; returns its seconds of wall time, and of CPU time over all its processes."""
    clock, cpu = time.perf_counter(), cpu_seconds()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        prepare_folder(source, out, images_per_shard=images_per_shard, workers=workers, **options)
    return time.perf_counter() - clock, cpu_seconds() - cpu


def cpu_seconds() -> float:
    """CPU time of this process and of its finished children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def preparing(
    source: Path, out: Path, jpegs: Sequence[bytes], resolutions: Sequence[int], images: int
) -> dict[str, Rate]:
    """Rates of `cdm prepare` in both formats, and of decoding and cropping alone. The shards are measured later."""
    found: dict[str, Rate] = {}
    small = [r for r in resolutions if r <= 64]
    ways: dict[str, dict[str, Any]] = {
        "all packed": {"resolutions": resolutions, "packed": max(resolutions)},
        "all png": {"resolutions": resolutions, "packed": 0},
        **({f"{max(small)} and less, packed": {"resolutions": small}} if small else {}),
    }
    cores = len(os.sched_getaffinity(0))
    for (way, options), folder in zip(ways.items(), ("packed", "png", "small"), strict=False):
        wall, cpu = prepared(source, out / folder, max(1, images // 2), **options)
        found[f"prepare, {way}"] = (images / wall, images / cpu)
        if cores > 1:
            found[f"prepare, {way}, {cores} processes"] = on_all_cores(
                source, out / f"{folder}-all", images, cores, **options
            )
    limits: dict[str, Callable[[bytes], Any]] = {"decode alone": decode}
    for size in sorted({max(resolutions), *([max(small)] if small else [])}, reverse=True):
        limits[f"decode and cut {size}"] = lambda data, size=size: cut_square(decode(data), size, "adm")
    for name, use in limits.items():
        found[name] = measured((len([use(data)]) for data in cycle(jpegs)), 0.002 * images)
    return found


def on_all_cores(source: Path, out: Path, images: int, cores: int, **options: Any) -> Rate:
    """Rate from the extra time for three times as many images, so that the start of the processes does not count."""
    more = out.parent / f"{out.name}-source"
    (more / "a").mkdir(parents=True)
    for file in (source / "a").iterdir():
        for copy in range(3):
            os.link(file, more / "a" / f"{copy}-{file.name}")
    each = max(1, images // 5 // cores)
    took = [prepared(f, out / f.name, each, workers=cores, **options) for f in (source, more)]
    return tuple(2 * images / max(last - first, 1e-9) for first, last in zip(*took, strict=True))  # type: ignore[return-value]  # two


def table(results: dict[str, Any]) -> str:
    """The rates as a text table: one row per source, with the ratio to the original JPEGs."""
    lines = []
    for resolution, ways in results["rates"].items():
        lines.append(f"{resolution}x{resolution:<8} {'images/s':>12} {'/CPU s':>12} {'of JPEG':>9} {'bytes/image':>12}")
        for name, (wall, cpu) in ways.items():
            size = results["bytes_per_image"][resolution].get(name, "")
            lines.append(f"  {name:<20} {wall:>12,.0f} {cpu:>12,.0f} {cpu / ways['jpeg'][1]:>8.1f}x {size:>12}")
        for name, (wall, _) in results["loader"].get(resolution, {}).items():
            lines.append(f"  {name:<20} {wall:>12,.0f}")
    lines.append(f"{'prepare':<48} {'images/s':>10} {'/CPU s':>10}")
    lines += [f"  {name:<46} {wall:>10,.0f} {cpu:>10,.0f}" for name, (wall, cpu) in results["prepare"].items()]
    return "\n".join(lines)


def run(
    quick: bool = False,
    resolutions: Sequence[int] = (32, 64, 128, 256),
    images: int = 1000,
    batch_size: int = 64,
    rounds: int = 5,
    seconds: float = 0.5,
    workers: Sequence[int] = (0, 1, 2),
) -> dict[str, Any]:
    """Measure data loading and preparation.

    Args:
        quick: run in a few seconds, as a test; the results mean nothing.
        resolutions: image sizes to measure; each is half of the next.
        images: images in each folder of shards.
        batch_size: images in a batch.
        rounds: how often each source is measured.
        seconds: length of each measurement.
        workers: numbers of worker processes of the loader; one row each.
    """
    if quick:
        resolutions, images, rounds, seconds, workers = resolutions[:2], 60, 1, 0.05, workers[:2]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    jpegs = [photograph(rng) for _ in range(min(DISTINCT, images) if not quick else 5)]
    results: dict[str, Any] = {"rates": {}, "loader": {}, "bytes_per_image": {}}
    with tempfile.TemporaryDirectory() as folder:
        source, shards = Path(folder, "raw"), Path(folder, "shards")
        (source / "a").mkdir(parents=True)
        for number in range(images):
            (source / "a" / f"{number:05d}.jpg").write_bytes(jpegs[number % len(jpegs)])
        results["prepare"] = preparing(source, shards, jpegs, resolutions, images)
        for resolution in resolutions:
            forms = {name: shards / name for name in ("packed", "png")}
            ways = {name: from_shards(root, resolution, batch_size) for name, root in forms.items()}
            ways |= {"jpeg": from_jpegs(jpegs, resolution, batch_size), "copy": copied(resolution, batch_size, images)}
            results["rates"][resolution] = in_turn(ways, rounds, seconds)
            manifests = {name: read_manifest(root / "train" / str(resolution)) for name, root in forms.items()}
            sizes = {name: sum(s.bytes for s in m.shards) // m.count for name, m in manifests.items()}
            results["bytes_per_image"][resolution] = {**sizes, "jpeg": sum(map(len, jpegs)) // len(jpegs)}
            results["loader"][resolution] = {
                f"{name}, {n} workers": loader_rate(from_shards(root, resolution, batch_size, n), 4 * seconds)
                for name, root in forms.items()
                for n in workers
            }
    torch.set_num_threads(threads)
    return results | {"images": images, "batch_size": batch_size, "rounds": rounds}
