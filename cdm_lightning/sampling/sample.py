"""`cdm sample`: images of a trained cascade, as shards that training reads, and a picture to look at."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt

from cdm_lightning.data.shards import read_manifest, read_shard, shards_digest
from cdm_lightning.diffusion import Sampler
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import decode_png, save_grid
from cdm_lightning.foundation.process_group import first_process
from cdm_lightning.network import CompileMode
from cdm_lightning.sampling.manifest import Precision, SampleManifest, plan, shard_name


def sample(
    bundle: Path,
    out: Path,
    count: int | None = None,
    per_class: int | None = None,
    classes: list[int] | None = None,
    seed: int = 0,
    levels: list[int] | None = None,
    truncated: bool | None = None,
    sampler: Sampler | None = None,
    sampling_steps: list[int] | None = None,
    start: Path | None = None,
    block_size: int = 64,
    batch_sizes: list[int] | None = None,
    precision: Precision = "32-true",
    compile: CompileMode | None = None,
    devices: PositiveInt = 1,
    accelerator: str = "auto",
) -> None:
    """Draw images from a trained cascade: shards of samples that training can read, and a picture to look at.

    Stopped and called again with the same options, it goes on where it was. The images do not depend on the number of
    processes.

    Args:
        bundle: A folder written by `cdm bundle`, such as data/fashion-cascade.
        out: Folder for the samples: out/train/<resolution>/ holds shards, out/samples.png a picture.
        count: Images in all, spread evenly over the classes.
        per_class: Instead of count: images of each class.
        classes: Class numbers, such as [1,7]; null for all.
        seed: Another seed, other images.
        levels: The level s of each super-resolution stage, such as [501,0]; null for the bundle's choice.
        truncated: Stop each reverse process at s, not finish it and add noise; null for the bundle's choice.
        sampler: ddpm, ddim or dpm++; null for each stage's own.
        sampling_steps: Network calls of each stage, such as [50,50,25]; null for each stage's own.
        start: Stored images to go on from, a finished folder of a lower resolution such as OUT/train/32 of another call
            with the same classes; null to start from noise.
        block_size: Images that a process draws at a time, a shard; another size, other images within a grey level.
        batch_sizes: Of a block, how many each stage works on at a time, such as [256,64,16]; null for all of it.
        precision: Of the networks: 32-true, or bf16-mixed or 16-mixed, which are faster and other images.
        compile: Compile the networks, which takes minutes and makes other images within float error: default, or
            reduce-overhead (CUDA graphs, on a GPU); null for not.
        devices: Processes to share the work.
        accelerator: cpu, gpu or auto.
    """
    if (count is None) == (per_class is None):
        raise InputError("give one of count and per_class: how many images to draw")
    from cdm_lightning.cascade import CascadeModule
    from cdm_lightning.cascade.bundle import origin, read_bundle_metadata
    from cdm_lightning.sampling.draw import draw

    cascade = CascadeModule(bundle, None, levels, truncated, sampler, sampling_steps, seed)
    cascade.set_batch_sizes(batch_sizes)
    about = read_bundle_metadata(bundle)
    each = len(classes) if classes is not None else cascade.num_classes or 1
    total = count if count is not None else each * (per_class or 0)
    manifest = plan(cascade, about["stages_sha256"], total, classes, block_size, start, precision, compile)
    if compile is not None:
        cascade.compile_networks(compile)
    folders = draw(cascade, manifest, out, start, devices, accelerator, origin(about))
    if first_process():
        say(folders, manifest, Path(out) / "samples.png")


def say(folders: Sequence[Path], manifest: SampleManifest, picture: Path) -> None:
    """Print what was made and draw it."""
    for folder in folders:
        digest = shards_digest(read_manifest(folder).shards)
        print(f"{folder}: {manifest.count} images, SHA-256 of all shards {digest[:16]}")
    draw_picture(folders, manifest, picture)
    print(f"{picture}: classes by rows, resolutions {[int(f.name) for f in folders]} side by side")


def draw_picture(
    folders: Sequence[Path], manifest: SampleManifest, path: Path, rows: int = 20, columns: int = 4
) -> None:
    """A row per class with its first samples, each at every resolution kept."""
    shown = manifest.classes[:rows]
    per_class = min(columns, -(-manifest.count // len(manifest.classes)))
    pictures: list[list[torch.Tensor]] = [[] for _ in shown]
    streams = [stream(folder, manifest.blocks) for folder in folders]
    together = islice(zip(*streams, strict=True), per_class * len(manifest.classes))
    for index, samples in enumerate(together):
        row = index % len(manifest.classes)
        if row < len(shown):
            pictures[row] += [torch.from_numpy(decode_png(s["png"])).permute(2, 0, 1) for s in samples]
    save_grid([row for row in pictures if row], path, cell=max(64, int(folders[-1].name)))


def stream(folder: Path, blocks: int) -> Any:
    """The samples of a folder, one after another."""
    for number in range(blocks):
        yield from read_shard(folder / shard_name(number))
