"""Shards in, batches of (image, label, index) out, for every process of a run, which goes on at any place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader

from cdm_lightning.data.damage import Damage, OnDamage, unmarked
from cdm_lightning.data.shards import Manifest, find_folder, read_manifest
from cdm_lightning.data.stream import ShardStream, leave_signals_to_the_parent
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import to_float


class ContinuingLoader(DataLoader):
    """A DataLoader that starts every pass where the run stands, rather than where the first pass began."""

    where: Callable[[], int] | None = None

    def __iter__(self) -> Any:
        if self.where is not None:
            self.dataset.start = self.where()  # type: ignore[attr-defined]  # a ShardStream
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module saves the place. To have both methods tells Lightning that a run can be resumed."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class ShardDataModule(L.LightningDataModule):
    """Training and validation images from `<root>/train` and `<root>/val`, at the resolution of the module in training.

    A folder of a larger resolution serves where the wanted one is not stored: halving is exact.

    Args:
        root: Folder of shards, as `cdm prepare` leaves it.
        batch_size: Images per optimizer step, over all processes and accumulated batches, as a paper states it.
        num_workers: Processes that read and decode, per training process.
        flip: Mirror half of the training images.
        window: Neighbouring shards whose images are shuffled among themselves.
        seed: Keys order and flips.
        val_root: Folder whose `val` split validates and tests; null for root. With it a folder that `cdm sample` wrote,
            which has no such split, can be trained on and tested on real images.
        on_damage: refuse ends the run with one sentence at the first image or shard that is missing, torn, foreign or
            does not fit its manifest. skip leaves it out, and logs how many were left out (data/skipped_images).
    """

    trainer: L.Trainer  # type: ignore[assignment]  # Lightning attaches it before it calls anything here

    def __init__(
        self,
        root: Path,
        batch_size: int = 64,
        num_workers: int = 2,
        flip: bool = False,
        window: int = 4,
        seed: int = 0,
        val_root: Path | None = None,
        on_damage: OnDamage = "refuse",
    ) -> None:
        super().__init__()
        if window < 1 or num_workers < 0:
            raise InputError(f"window {window} must be at least 1, and num_workers {num_workers} at least 0")
        self.roots = {"train": Path(root), "val": Path(root if val_root is None else val_root)}
        self.batch_size, self.num_workers = batch_size, num_workers
        self.flip, self.window, self.seed = flip, window, seed
        self.seen, self.batches_before, self.on_damage = 0, 0, on_damage
        self.found: dict[str, tuple[Path, Manifest]] = {}
        self.skipped = torch.zeros(2, dtype=torch.int64)  # images left out of training, and stand-ins, by all processes
        self.unsummed = torch.zeros(2, dtype=torch.int64)  # the same of this process since they were last added up
        self.left_out: dict[str, torch.Tensor] = {}  # the same of batches that are not done

    def setup(self, stage: str) -> None:
        if not self.batches():  # a new run, be it after another one with the same data module
            self.seen, self.batches_before, self.skipped = 0, 0, torch.zeros(2, dtype=torch.int64)
        self.found, self.left_out, self.unsummed = {}, {}, torch.zeros(2, dtype=torch.int64)
        if self.on_damage == "skip":
            callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
            if not any(isinstance(callback, Damage) for callback in callbacks):
                callbacks.insert(0, Damage())  # before the one that saves: its sum goes into checkpoints
        for split in ["train", "val"] if stage == "fit" else ["val"]:
            self.manifest(split)

    def manifest(self, split: str) -> tuple[Path, Manifest]:
        """The folder and manifest of a split as the run found them, checked against the module that will be fed."""
        if split not in self.found:
            self.found[split] = self.find(split)
        return self.found[split]

    def find(self, split: str) -> tuple[Path, Manifest]:
        module: Any = self.trainer.lightning_module
        folder = find_folder(self.roots[split], split, module.resolution)
        manifest = read_manifest(folder, whole=self.on_damage == "refuse")
        if manifest.resolution != int(folder.name):
            raise InputError(f"{folder} holds images of resolution {manifest.resolution}, its name says {folder.name}")
        if manifest.channels != module.image_channels:
            raise InputError(f"{folder} has {manifest.channels} channels, the model takes {module.image_channels}")
        if module.num_classes is not None and len(manifest.classes) != module.num_classes:
            raise InputError(f"{folder} has {len(manifest.classes)} classes, the model takes {module.num_classes}")
        processes = self.trainer.world_size
        if manifest.count < processes:
            raise InputError(f"{folder} holds {manifest.count} images for {processes} processes: each needs one")
        return folder, manifest

    def micro_batch(self) -> int:
        """Images per process and forward pass."""
        parts = self.trainer.world_size * self.trainer.accumulate_grad_batches
        if self.batch_size < parts or self.batch_size % parts:
            raise InputError(
                f"batch_size {self.batch_size} cannot be shared by {self.trainer.world_size} processes with "
                f"{self.trainer.accumulate_grad_batches} accumulated batches: it must be a multiple of {parts}"
            )
        return self.batch_size // parts

    def loader(self, split: str, batch_size: int, **options: Any) -> ContinuingLoader:
        """The loader of a split's stream, for this process."""
        folder, manifest = self.manifest(split)
        module: Any = self.trainer.lightning_module
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        stream = ShardStream(
            folder, manifest, module.resolution, batch_size, rank, world_size, self.seed, self.window,
            on_damage=self.on_damage, **options,
        )  # fmt: skip
        return ContinuingLoader(
            stream,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=8 if self.num_workers else None,  # rides out the reading of the next window
            worker_init_fn=leave_signals_to_the_parent,
        )

    def train_dataloader(self) -> ContinuingLoader:
        """An endless stream; its length, for the progress bar, is the run where max_steps is given, else a pass."""
        _, manifest = self.manifest("train")
        steps = self.trainer.max_steps * self.trainer.accumulate_grad_batches
        if steps < 0:
            steps = manifest.count // self.batch_size * self.trainer.accumulate_grad_batches
            if not steps:
                raise InputError(f"batch_size {self.batch_size} is larger than the {manifest.count} training images")
        loader = self.loader("train", self.micro_batch(), flip=self.flip, length=steps)
        loader.where = self.images_seen
        return loader

    def val_dataloader(self) -> ContinuingLoader:
        """Every image once. Processes differ by one image at most, and where possible not in their number of batches.

        DDP brings a module's buffers into line at every forward pass, so unequal numbers would leave it waiting.
        """
        _, manifest = self.manifest("val")
        world_size, largest = self.trainer.world_size, self.micro_batch()
        least, most = manifest.count // world_size, -(-manifest.count // world_size)
        batch_size = next((b for b in range(largest, 1, -1) if -(-least // b) == -(-most // b)), largest)
        own = len(range(self.trainer.global_rank, manifest.count, world_size))
        return self.loader("val", batch_size, shuffle=False, end=manifest.count, length=-(-own // batch_size))

    test_dataloader = predict_dataloader = val_dataloader

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Take the marks of damaged images off, while the batch is on the CPU, and count them."""
        if self.on_damage == "refuse":
            return batch
        image, label, index = batch
        index, counts = unmarked(index, len(image))
        split = "train" if self.trainer.training else "val"
        self.left_out[split] = self.left_out.get(split, 0) + counts
        return image, label, index

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        image, label, index = batch
        return to_float(image), label, index

    def over_all(self, counts: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, which must ask at once."""
        strategy: Any = self.trainer.strategy
        return strategy.reduce(counts.to(strategy.root_device), reduce_op="sum").cpu()

    def add_up(self) -> None:
        """Bring `skipped` up to date."""
        self.skipped += self.over_all(self.unsummed)
        self.unsummed.zero_()

    # -- the place in the sequence, saved with every checkpoint beside what the images are

    def batches(self) -> int:
        """Batches of this run whose training step has ended; one that an exception cut short is repeated on resume."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]  # untyped there

    def images_seen(self) -> int:
        """Places of the sequence that all processes together have trained on."""
        since = max(0, self.batches() - self.batches_before)  # asked before the loops have their counts back: none
        return self.seen + since * self.micro_batch() * self.trainer.world_size

    def state_dict(self) -> dict[str, Any]:
        _, manifest = self.manifest("train")
        if self.on_damage == "skip":
            self.add_up()
        origin = {"classes": manifest.classes, "crop": manifest.crop, "filter": manifest.filter}
        counts = {"images_seen": self.images_seen(), "batches": self.batches(), "skipped": self.skipped.tolist()}
        return {**counts, "accumulated": self.trainer.accumulate_grad_batches, **origin}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen, self.batches_before = state_dict["images_seen"], state_dict["batches"]
        self.skipped = torch.tensor(state_dict.get("skipped", [0, 0]))
