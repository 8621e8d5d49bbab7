"""`cdm sample`: draw images from a trained cascade, as shards that training can read, and an overview picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt

from cdm_lightning.data.shards import read_manifest, read_shard, shards_digest
from cdm_lightning.diffusion import Sampler
from cdm_lightning.foundation.class_names import class_number
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import check_output_folder
from cdm_lightning.foundation.images import decode_png, save_grid
from cdm_lightning.foundation.process_group import Accelerator, first_process
from cdm_lightning.network import CompileMode
from cdm_lightning.sampling.manifest import Precision, SampleManifest, make_sample_manifest, shard_name


def sample(
    bundle: Path,
    out: Path,
    count: int | None = None,
    per_class: int | None = None,
    classes: list[int | str] | None = None,
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
    accelerator: Accelerator = "auto",
) -> None:
    """Draw images from a trained cascade: shards of samples that training can read, and a picture to look at.

    If it is stopped, the same command continues. The images do not depend on the number of processes.

    Args:
        bundle: A folder written by `cdm bundle`, such as data/fashion-cascade.
        out: Folder for the samples: shards in out/train/<resolution>/, and a picture, out/samples.png.
        count: Total number of images, spread evenly over the classes.
        per_class: Number of images of each class, instead of count.
        classes: Names or numbers of classes, such as [bag,7]; null for all. A name goes before a number.
        seed: Seed of the images.
        levels: The level s of each super-resolution stage, such as [501,0]; null for the bundle's choice.
        truncated: true stops each reverse process at s; false runs it to the end and adds noise up to s; null for the
            bundle's choice.
        sampler: ddpm, ddim or dpm++; null for each stage's own.
        sampling_steps: Network calls of each stage, such as [50,50,25]; null for each stage's own.
        start: Stored images to continue from: a finished folder of a lower resolution, such as OUT/train/32 of another
            call with the same classes; null to start from noise.
        block_size: Images per shard at most, drawn together by one process. Another size changes pixels by one grey
            level at most.
        batch_sizes: Images per network call of each stage, such as [256,64,16]; null for a whole block.
        precision: Of the networks: 32-true, bf16-mixed or 16-mixed. The mixed ones are faster, and change the images.
        compile: torch.compile mode of the networks: default, or reduce-overhead (CUDA graphs, on a GPU). It takes
            minutes, and changes the images by float error. null does not compile.
        devices: Number of processes.
        accelerator: cpu, gpu or auto.
    """
    if (count is None) == (per_class is None):
        raise InputError("give one of count and per_class: how many images to draw")
    from cdm_lightning.cascade import CascadeModule
    from cdm_lightning.cascade.metadata import read_bundle_metadata
    from cdm_lightning.sampling.draw_blocks import draw

    check_output_folder(out)
    cascade = CascadeModule(bundle, None, levels, truncated, sampler, sampling_steps, seed)
    cascade.set_batch_sizes(batch_sizes)
    metadata = read_bundle_metadata(bundle)
    names = cascade.origin["classes"]
    chosen = None if classes is None else [class_number(str(word), names) for word in classes]
    class_count = len(chosen) if chosen is not None else cascade.num_classes or 1
    total = count if count is not None else class_count * (per_class or 0)
    manifest = make_sample_manifest(
        cascade, metadata["stages_sha256"], total, chosen, block_size, start, precision, compile
    )
    if compile is not None:
        cascade.compile_networks(compile)
    folders = draw(cascade, manifest, out, start, devices, accelerator)
    if first_process():
        print_result(folders, manifest, Path(out) / "samples.png")


def print_result(folders: Sequence[Path], manifest: SampleManifest, picture: Path) -> None:
    """Print the folders of samples and their hashes, and save the picture."""
    for folder in folders:
        digest = shards_digest(read_manifest(folder).shards)
        print(f"{folder}: {manifest.count} images, SHA-256 of all shards {digest[:16]}")
    draw_picture(folders, manifest, picture)
    print(f"{picture}: classes by rows, resolutions {[int(f.name) for f in folders]} side by side")


def draw_picture(
    folders: Sequence[Path], manifest: SampleManifest, path: Path, rows: int = 20, columns: int = 4
) -> None:
    """Save a picture with a row per class: its first samples, each at every stored resolution."""
    shown = manifest.classes[:rows]
    per_class = min(columns, -(-manifest.count // len(manifest.classes)))
    pictures: list[list[torch.Tensor]] = [[] for _ in shown]
    streams = [read_samples(folder, manifest.blocks) for folder in folders]
    together = islice(zip(*streams, strict=True), per_class * len(manifest.classes))
    for index, samples in enumerate(together):
        row = index % len(manifest.classes)
        if row < len(shown):
            pictures[row] += [torch.from_numpy(decode_png(s["png"])).permute(2, 0, 1) for s in samples]
    save_grid([row for row in pictures if row], path, cell=max(64, int(folders[-1].name)))


def read_samples(folder: Path, blocks: int) -> Any:
    """The samples of a folder, in order."""
    for number in range(blocks):
        yield from read_shard(folder / shard_name(number))
