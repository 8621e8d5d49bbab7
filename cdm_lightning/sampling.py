"""`cdm sample`: a manifest of (index, class), blocks of images drawn from it, shards out, resumable block by block."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch.utils.data import DataLoader

from cdm_lightning import InputError
from cdm_lightning.bundle import read_about
from cdm_lightning.cascade import CascadeModule
from cdm_lightning.diffusion import Sampler
from cdm_lightning.images import decode_png, encode_png, save_grid
from cdm_lightning.shards import Manifest, Shard, read_shard, write_atomically, write_manifest, write_shard


@dataclass(frozen=True)
class SampleManifest:
    """What `count` samples are: image i has class classes[i mod len(classes)] and is drawn from (seed, i).

    The network runs on blocks of block_size indices, the last one padded, so that no image depends on how blocks are
    shared out. A folder begun with one manifest is continued with no other.
    """

    bundle: str  # SHA-256 of bundle.json
    count: int
    classes: list[int]
    seed: int
    block_size: int
    levels: list[int]
    truncated: bool
    samplers: list[str]
    sampling_steps: list[int]

    def block(self, number: int) -> dict[str, torch.Tensor]:
        """The padded indices and labels of one block, and how many of them count."""
        first = number * self.block_size
        index = torch.arange(first, first + self.block_size).clamp(max=self.count - 1)
        label = torch.tensor(self.classes)[index % len(self.classes)]
        return {"index": index, "label": label, "number": torch.tensor(number)}

    def size(self, number: int) -> int:
        return min(self.block_size, self.count - number * self.block_size)

    @property
    def blocks(self) -> int:
        return -(-self.count // self.block_size)


def shard_name(number: int) -> str:
    return f"{number:06d}.tar"


class BlockWriter(BasePredictionWriter):
    """Writes a block's images as one shard per resolution; a block is done when all of its shards are there."""

    def __init__(self, folders: Sequence[Path], manifest: SampleManifest) -> None:
        super().__init__("batch")
        self.folders, self.manifest = folders, manifest

    def write_on_batch_end(
        self, trainer: L.Trainer, pl_module: Any, prediction: Any, batch_indices: Any, batch: Any, *rest: int
    ) -> None:
        """Write one block: the images of every resolution kept, without the padding of the last block."""
        number = int(batch["number"])
        images = prediction[-len(self.folders) :]
        for folder, block in zip(self.folders, images, strict=True):
            arrays = block.permute(0, 2, 3, 1).cpu().numpy()[: self.manifest.size(number)]
            keys = [f"{i:08d}" for i in batch["index"].tolist()]
            labels = batch["label"].tolist()
            samples = [(k, encode_png(a), c) for k, a, c in zip(keys, arrays, labels, strict=False)]
            write_shard(folder / shard_name(number), samples)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait for the slowest process: what follows reads the shards of all."""
        trainer.strategy.barrier()


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
    block_size: int = 64,
    devices: int = 1,
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
        block_size: Images the network works on at a time, per process.
        devices: Processes to share the work.
        accelerator: cpu, gpu or auto.
    """
    cascade = CascadeModule(bundle, None, levels, truncated, sampler, sampling_steps, seed)
    manifest = plan(cascade, bundle, count, per_class, classes, block_size)
    begin(out, manifest)
    resolutions = [stage.resolution for stage in cascade.stages]
    kept = resolutions[-1:] if cascade.truncated and any(cascade.levels) else resolutions  # z_s is no 8-bit image
    folders = [Path(out) / "train" / str(resolution) for resolution in kept]
    todo = [n for n in range(manifest.blocks) if not all((f / shard_name(n)).is_file() for f in folders)]
    if todo:
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            logger=False,
            callbacks=[BlockWriter(folders, manifest)],
            use_distributed_sampler=False,  # whole blocks are shared out below
            enable_model_summary=False,
            default_root_dir=out,
        )
        mine = Blocks(manifest, todo)
        trainer.predict(cascade, datamodule=mine, return_predictions=False)
        if not trainer.is_global_zero:
            return
    finish(folders, manifest, read_about(bundle), cascade)


class Blocks(L.LightningDataModule):
    """The blocks that are still to do, every n-th one for each process."""

    trainer: L.Trainer  # type: ignore[assignment]  # Lightning attaches it before it calls anything here

    def __init__(self, manifest: SampleManifest, todo: list[int]) -> None:
        super().__init__()
        self.manifest, self.todo = manifest, todo

    def predict_dataloader(self) -> DataLoader:
        own = self.todo[self.trainer.global_rank :: self.trainer.world_size]
        blocks: Any = [self.manifest.block(number) for number in own]
        return DataLoader(blocks, batch_size=None)


def plan(
    cascade: CascadeModule,
    bundle: Path,
    count: int | None,
    per_class: int | None,
    classes: list[int] | None,
    block_size: int,
) -> SampleManifest:
    """The manifest that a call's options ask for; refuses what makes no sense."""
    chosen = list(range(cascade.num_classes or 1)) if classes is None else list(classes)
    if not chosen:
        raise InputError("classes [] names no class")
    cascade.check_labels(torch.tensor(chosen))
    if cascade.num_classes is None and set(chosen) != {0}:
        raise InputError(f"classes {chosen} given to a cascade without classes, which calls its one class 0")
    if (count is None) == (per_class is None):
        raise InputError("give one of count and per_class: how many images to draw")
    total = count if count is not None else len(chosen) * (per_class or 0)
    for name, value in (("count", total), ("block_size", block_size)):
        if value < 1:
            raise InputError(f"{name} {value} is less than 1")
    diffusions = [stage.diffusion for stage in cascade.stages]
    return SampleManifest(
        hashlib.sha256((Path(bundle) / "bundle.json").read_bytes()).hexdigest(),
        total,
        chosen,
        cascade.seed,
        block_size,
        cascade.levels,
        cascade.truncated,
        [d.sampler for d in diffusions],
        [d.sampling_steps or d.timesteps for d in diffusions],
    )


def begin(out: Path, manifest: Any) -> None:
    """Write the manifest, a dataclass, into a new folder; in one begun before, refuse to go on with another."""
    path = Path(out) / "manifest.json"
    if path.is_file():
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"{path} is not JSON: {error}") from error
        differing = [name for name, value in asdict(manifest).items() if before.get(name) != value]
        if differing:
            name = differing[0]
            raise InputError(
                f"{out} was begun with {name} {before.get(name)}, not {getattr(manifest, name)}: choose another folder"
            )
        return
    write_atomically(path, (json.dumps(asdict(manifest), indent=1) + "\n").encode())


def finish(folders: Sequence[Path], manifest: SampleManifest, about: dict[str, Any], cascade: CascadeModule) -> None:
    """Write each folder's manifest, then the picture, and say what was made."""
    classes = about.get("classes") or [str(c) for c in range(cascade.num_classes or 1)]
    labels = np.array(manifest.classes)[np.arange(manifest.count) % len(manifest.classes)]
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    for folder in folders:
        shards = []
        for number in range(manifest.blocks):
            data = (folder / shard_name(number)).read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            shards.append(Shard(shard_name(number), manifest.size(number), len(data), digest))
        resolution, channels = int(folder.name), cascade.image_channels
        extra = {"samples": asdict(manifest)}
        write_manifest(
            folder,
            Manifest(
                resolution, channels, "train", classes, counts, shards, manifest.seed, source="samples", extra=extra
            ),
        )
        print(f"{folder}: {manifest.count} images, SHA-256 of all shards {digest_of(shards)[:16]}")
    picture = Path(folders[0]).parents[1] / "samples.png"
    draw(folders, manifest, picture)
    print(f"{picture}: classes by rows, resolutions {[int(f.name) for f in folders]} side by side")


def digest_of(shards: Sequence[Shard]) -> str:
    """One hash that says whether two sets of samples are the same."""
    return hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()


def draw(folders: Sequence[Path], manifest: SampleManifest, path: Path, rows: int = 20, columns: int = 4) -> None:
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
