"""The shards of a sampling run: a manifest of (index, class), drawn block by block on any number of processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader, Dataset

from cdm_lightning import InputError
from cdm_lightning.cascade import CascadeModule
from cdm_lightning.images import encode_png
from cdm_lightning.shards import (
    Manifest,
    Shard,
    decode_sample,
    digest_of,
    read_manifest,
    read_places,
    write_atomically,
    write_manifest,
    write_shard,
)

NO_CLASSES = ["0"]  # as shards name the one class of samples of a cascade without classes
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


@dataclass(frozen=True)
class SampleManifest:
    """What `count` samples are: image i has class classes[i mod len(classes)] and is drawn from (seed, i).

    The network runs on blocks of block_size indices, the last one padded, so that no image depends on how blocks are
    shared out. A folder begun with one manifest is continued with no other.
    """

    bundle: str  # SHA-256 of the stages of the bundle
    count: int
    classes: list[int]
    seed: int
    block_size: int
    levels: list[int]
    truncated: bool
    samplers: list[str]
    sampling_steps: list[int]
    precision: str = "32-true"  # of the networks, in Lightning's words
    start: str | None = None  # of the stored images the cascade went on from: one hash over all shards

    def block(self, number: int) -> dict[str, torch.Tensor]:
        """The padded indices and labels of one block, and its number."""
        first = number * self.block_size
        index = torch.arange(first, first + self.block_size).clamp(max=self.count - 1)
        return {"index": index, "label": self.labels()[index], "number": torch.tensor(number)}

    def labels(self) -> torch.Tensor:
        return torch.tensor(self.classes)[torch.arange(self.count) % len(self.classes)]

    def size(self, number: int) -> int:
        return min(self.block_size, self.count - number * self.block_size)

    @property
    def blocks(self) -> int:
        return -(-self.count // self.block_size)


def plan(
    cascade: CascadeModule,
    bundle: str,
    count: int,
    classes: Sequence[int] | None = None,
    block_size: int = 64,
    start: Path | None = None,
    precision: Precision = "32-true",
) -> SampleManifest:
    """The manifest of `count` samples of a cascade as it is set; refuses what makes no sense."""
    chosen = list(range(cascade.num_classes or 1)) if classes is None else list(classes)
    if not chosen:
        raise InputError("classes [] names no class")
    cascade.check_labels(torch.tensor(chosen))
    if cascade.num_classes is None and set(chosen) != {0}:
        raise InputError(f"classes {chosen} given to a cascade without classes, which calls its one class 0")
    for name, value in (("count", count), ("block_size", block_size)):
        if value < 1:
            raise InputError(f"{name} {value} is less than 1")
    diffusions = [stage.diffusion for stage in cascade.stages]
    manifest = SampleManifest(
        bundle, count, chosen, cascade.seed, block_size, cascade.levels, cascade.truncated,
        [d.sampler for d in diffusions], [d.sampling_steps or d.timesteps for d in diffusions],
        precision, digest_of(read_manifest(start).shards) if start is not None else None,
    )  # fmt: skip
    if start is not None:
        check_start(cascade, manifest, start)
    return manifest


def check_start(cascade: CascadeModule, manifest: SampleManifest, start: Path) -> None:
    """Refuse stored images that the cascade cannot go on from."""
    given, resolutions = read_manifest(start), [stage.resolution for stage in cascade.stages]
    if given.resolution not in resolutions[:-1]:
        raise InputError(f"{start} holds images of {given.resolution}: the cascade goes on from {resolutions[:-1]}")
    if given.channels != cascade.image_channels:
        raise InputError(f"{start} has {given.channels} channels, and the cascade makes {cascade.image_channels}")
    if given.count < manifest.count:
        raise InputError(f"{start} holds {given.count} images, and {manifest.count} are to be drawn from them")


def draw(
    cascade: CascadeModule,
    manifest: SampleManifest,
    out: Path,
    start: Path | None = None,
    devices: int = 1,
    accelerator: str = "auto",
    about: dict[str, Any] | None = None,
) -> list[Path]:
    """Draw what a manifest says into out/train/<resolution>/, a folder of shards per resolution that the cascade makes.

    Only blocks that are not there yet are drawn. start: a folder of stored images of a lower resolution, of which image
    i is where sample i goes on. about: more for the folders' manifests: classes, crop, filter. Truncated sampling keeps
    finished images alone. Returns in every process when the last one is done.
    """
    begin(out, manifest)
    resolutions = [stage.resolution for stage in cascade.stages]
    if start is not None:
        resolutions = [r for r in resolutions if r > read_manifest(start).resolution]
    kept = resolutions[-1:] if cascade.truncated and any(cascade.levels) else resolutions  # z_s is no 8-bit image
    folders = [Path(out) / "train" / str(resolution) for resolution in kept]
    todo = [n for n in range(manifest.blocks) if not all((f / shard_name(n)).is_file() for f in folders)]
    if todo:
        trainer = L.Trainer(
            accelerator=accelerator, devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
            callbacks=[BlockWriter(folders, manifest)], enable_model_summary=False, default_root_dir=out,
            precision=manifest.precision,  # type: ignore[arg-type]  # a word that plan() took
            use_distributed_sampler=False,  # whole blocks are shared out below
        )  # fmt: skip
        trainer.predict(cascade, datamodule=Blocks(manifest, todo, start), return_predictions=False)
        wait_for_all()  # for the slowest process: what follows reads the shards of all
    for folder in folders:
        if first_process() and not (folder / "manifest.json").is_file():
            finish(folder, manifest, cascade, about or {})
    wait_for_all()
    return folders


def first_process() -> bool:
    """Whether this process is the one that writes and speaks; Lightning sets the rank when processes start."""
    return not getattr(rank_zero_only, "rank", 0)


def wait_for_all() -> None:
    """Wait for the other processes, where there are any: what follows reads what one of them wrote."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


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


class BlockData(Dataset):
    """The blocks still to do, with the stored images they go on from where there are some."""

    def __init__(self, manifest: SampleManifest, numbers: list[int], start: Path | None) -> None:
        self.manifest, self.numbers, self.start = manifest, numbers, start
        self.given = read_manifest(start) if start is not None else None

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        block = self.manifest.block(self.numbers[item])
        if self.start is None or self.given is None:
            return block
        images = []
        samples = read_places(self.start, self.given.shards, block["index"].tolist())
        for index, label, sample in zip(block["index"].tolist(), block["label"].tolist(), samples, strict=True):
            image, stored = decode_sample(sample, self.given)
            if stored != label:
                raise InputError(f"image {index} of {self.start} has class {stored}, and sample {index} has {label}")
            images.append(image)
        return {**block, "image": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)}


class Blocks(L.LightningDataModule):
    """The blocks that are still to do, every n-th one for each process."""

    trainer: L.Trainer  # type: ignore[assignment]  # Lightning attaches it before it calls anything here

    def __init__(self, manifest: SampleManifest, todo: list[int], start: Path | None = None) -> None:
        super().__init__()
        self.manifest, self.todo, self.start = manifest, todo, start
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer blocks to do than processes

    def predict_dataloader(self) -> DataLoader:
        own = self.todo[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(BlockData(self.manifest, own, self.start), batch_size=None)


def begin(out: Path, manifest: Any) -> None:
    """Write the manifest, a dataclass, into a new folder; in one begun before, refuse to go on with another."""
    path = Path(out) / "manifest.json"
    if first_process() and not path.is_file():
        write_atomically(path, (json.dumps(asdict(manifest), indent=1) + "\n").encode())
    wait_for_all()
    try:
        before = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    differing = [name for name, value in asdict(manifest).items() if before.get(name) != value]
    if differing:
        name = differing[0]
        raise InputError(
            f"{out} was begun with {name} {before.get(name)}, not {getattr(manifest, name)}: choose another folder"
        )


def finish(folder: Path, manifest: SampleManifest, cascade: CascadeModule, about: dict[str, Any]) -> None:
    """Write the manifest of one folder of samples, its last file."""
    classes = about.get("classes") or [str(c) for c in range(cascade.num_classes or 1)]
    shards = []
    for number in range(manifest.blocks):
        data = (folder / shard_name(number)).read_bytes()
        shards.append(Shard(shard_name(number), manifest.size(number), len(data), hashlib.sha256(data).hexdigest()))
    counts = np.bincount(manifest.labels().numpy(), minlength=len(classes)).tolist()
    made = Manifest(
        int(folder.name), cascade.image_channels, "train", classes, counts, shards, manifest.seed,
        about.get("crop") or "none", about.get("filter") or "none", "samples", extra={"samples": asdict(manifest)},
    )  # fmt: skip
    write_manifest(folder, made)
