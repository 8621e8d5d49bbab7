"""The blocks of a sampling run: loading their inputs, and writing their images as shards."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch.utils.data import DataLoader, Dataset

from cdm_lightning.data.shards import open_images, read_manifest, write_shard
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import check_settings
from cdm_lightning.foundation.images import encode_png, stored_to_tensor
from cdm_lightning.foundation.progress_bar import ProgressBar
from cdm_lightning.sampling.manifest import SampleManifest, shard_name


class BlockWriter(BasePredictionWriter):
    """Writes the images of a block as one shard per resolution. A block is finished when all its shards exist.

    The first process shows the progress of all: as a bar on a terminal, and otherwise as a line now and then.
    """

    def __init__(self, out: Path, folders: Sequence[Path], manifest: SampleManifest) -> None:
        super().__init__("batch")
        self.out, self.folders, self.manifest = out, folders, manifest
        self.bar: Any = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self.bar = ProgressBar(
                desc="sampling", unit="image", total=self.manifest.count, initial=self.done(), mininterval=1
            )
            if self.bar.prints_lines and self.bar.n:
                self.bar.print_line()  # says how much was done before

    def done(self) -> int:
        """How many images are stored at the last resolution, which is written last."""
        numbers = [int(path.stem) for path in self.folders[-1].glob("*.tar") if path.stem.isdecimal()]
        return sum(self.manifest.size(number) for number in numbers if number < self.manifest.blocks)

    def close(self) -> None:
        """Bring the bar up to date and close it, when all processes are done or this one has failed."""
        if self.bar is not None:
            self.bar.update(self.done() - self.bar.n)
            self.bar.close()

    def write_on_batch_end(
        self, trainer: L.Trainer, pl_module: Any, prediction: Any, batch_indices: Any, batch: Any, *rest: int
    ) -> None:
        """Write one block: its images at every resolution that is kept, without any padding of the last block."""
        number = int(batch["number"])
        check_settings(self.out / "manifest.json", asdict(self.manifest))  # another command may have taken the folder
        images = prediction[-len(self.folders) :]
        for folder, block in zip(self.folders, images, strict=True):
            arrays = block.permute(0, 2, 3, 1).cpu().numpy()[: self.manifest.size(number)]
            keys = [f"{i:08d}" for i in batch["index"].tolist()]
            labels = batch["label"].tolist()
            samples = [(k, encode_png(a), c) for k, a, c in zip(keys, arrays, labels, strict=False)]
            write_shard(folder / shard_name(number), samples)
        if self.bar is not None and time.time() - self.bar.last_print_t >= self.bar.mininterval:
            self.bar.update(self.done() - self.bar.n)  # not at every block, as this reads the folder


class BlockDataset(Dataset):
    """The blocks that remain to be drawn, with the stored images that they start from, if any.

    labels: the cascade's number of each class of the stored images.
    """

    def __init__(self, manifest: SampleManifest, numbers: list[int], start: Path | None, labels: Sequence[int]) -> None:
        self.manifest, self.numbers, self.start, self.labels = manifest, numbers, start, labels
        self.given = read_manifest(start) if start is not None else None

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        block = self.manifest.block(self.numbers[item])
        if self.start is None or self.given is None:
            return block
        opened = open_images(self.start, self.given, self.given.shards, block["index"].tolist())
        images = opened.read(range(len(block["index"])))
        opened.close()
        for index, label, stored in zip(block["index"].tolist(), block["label"].tolist(), images.label, strict=True):
            if self.labels[stored] != label:
                name = self.given.classes[stored]
                raise InputError(
                    f"image {index} of {self.start} has class {self.labels[stored]}, and sample {index} has {label}: "
                    f"its class is called {name!r}, and classes must be those of the stored images, in their order"
                )
        return {**block, "image": stored_to_tensor(images.image)}


class BlockDataModule(L.LightningDataModule):
    """The blocks that remain to be drawn, as the first process lists them; each of n processes takes every n-th.

    start: a folder of stored images to go on from. labels: the cascade's number of each class there.
    """

    trainer: L.Trainer  # type: ignore[assignment]  # Lightning attaches it before it calls anything here

    def __init__(
        self, manifest: SampleManifest, todo: list[int], start: Path | None = None, labels: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.manifest, self.todo, self.start, self.labels = manifest, todo, start, labels
        self.allow_zero_length_dataloader_with_multiple_devices = True  # there may be fewer blocks than processes

    def predict_dataloader(self) -> DataLoader:
        # Processes that start at different times could list different blocks.
        todo = self.trainer.strategy.broadcast(self.todo)
        numbers = todo[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(BlockDataset(self.manifest, numbers, self.start, self.labels), batch_size=None)
