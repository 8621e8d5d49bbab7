"""The blocks of a sampling run: which images they hold, what they are drawn from, and their way into shards."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch.utils.data import DataLoader, Dataset

from cdm_lightning.data.shards import open_images, read_manifest, write_shard
from cdm_lightning.foundation.bars import Bar
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import as_drawn, encode_png
from cdm_lightning.sampling.manifest import SampleManifest, shard_name


class BlockWriter(BasePredictionWriter):
    """Writes a block's images as one shard per resolution; a block is done when all of its shards are there.

    The first process shows what all processes have done: a bar on a terminal, now and then a line elsewhere.
    """

    def __init__(self, folders: Sequence[Path], manifest: SampleManifest) -> None:
        super().__init__("batch")
        self.folders, self.manifest = folders, manifest
        self.bar: Any = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self.bar = Bar(desc="sampling", unit="image", total=self.manifest.count, initial=self.done(), mininterval=1)
            if self.bar.in_lines and self.bar.n:
                self.bar.print_line()  # where it goes on

    def done(self) -> int:
        """How many images are stored at the last resolution, which each block writes last."""
        numbers = [int(path.stem) for path in self.folders[-1].glob("*.tar") if path.stem.isdecimal()]
        return sum(self.manifest.size(number) for number in numbers if number < self.manifest.blocks)

    def close(self) -> None:
        """The bar's last word, when all processes are done or this one has failed."""
        if self.bar is not None:
            self.bar.update(self.done() - self.bar.n)
            self.bar.close()

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
        if self.bar is not None and time.time() - self.bar.last_print_t >= self.bar.mininterval:
            self.bar.update(self.done() - self.bar.n)  # reads the folder: not at every block of many


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
        opened = open_images(self.start, self.given, self.given.shards, block["index"].tolist())
        images = opened.read(range(self.manifest.block_size))
        opened.close()
        for index, label, stored in zip(block["index"].tolist(), block["label"].tolist(), images.label, strict=True):
            if stored != label:
                raise InputError(f"image {index} of {self.start} has class {stored}, and sample {index} has {label}")
        return {**block, "image": as_drawn(images.image)}


class Blocks(L.LightningDataModule):
    """The blocks that are still to do by the first process's reckoning, every n-th one for each process."""

    trainer: L.Trainer  # type: ignore[assignment]  # Lightning attaches it before it calls anything here

    def __init__(self, manifest: SampleManifest, todo: list[int], start: Path | None = None) -> None:
        super().__init__()
        self.manifest, self.todo, self.start = manifest, todo, start
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer blocks to do than processes

    def predict_dataloader(self) -> DataLoader:
        todo = self.trainer.strategy.broadcast(self.todo)  # another run's leftovers may write while processes start
        own = todo[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(BlockData(self.manifest, own, self.start), batch_size=None)
