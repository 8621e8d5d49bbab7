"""The data module: shards in, batches of (image, label, index) out, for every process of a run that can be resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader

from cdm_lightning.data.damaged_images import Damage, OnDamage, decode_damage
from cdm_lightning.data.shards import Manifest, find_folder, read_manifest
from cdm_lightning.data.stream import ShardStream, leave_signals_to_the_parent
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import to_float


class ResumableLoader(DataLoader):
    """A DataLoader whose every pass starts at the current place of the run, not at the first image."""

    current_place: Callable[[], int] | None = None

    def __iter__(self) -> Any:
        if self.current_place is not None:
            self.dataset.start = self.current_place()  # type: ignore[attr-defined]  # a ShardStream
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Empty: the data module saves the place. Having both methods tells Lightning that the loader can resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class ShardDataModule(L.LightningDataModule):
    """Training and validation images from `<root>/train` and `<root>/val`, at the resolution of the trained module.

    If that resolution is not stored, images of a larger one are reduced to it, with the same result.

    Args:
        root: Folder of shards, written by `cdm prepare`.
        batch_size: Images per optimizer step, over all processes and accumulated batches: the batch size of a paper.
        num_workers: Processes that read and decode images, for each training process.
        flip: Mirror half of the training images.
        window: Number of consecutive shards whose images are shuffled together.
        seed: Seeds the order of the images and the flips.
        val_root: Folder whose `val` split is used to validate and test; null for root. Samples of `cdm sample` have no
            such split: with val_root, a model can train on them and be tested on real images.
        on_damage: refuse ends the run with an error at the first image or shard that is missing, damaged or does not
            match its manifest. skip leaves it out, and logs how many were left out (data/skipped_images).
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
        self.splits: dict[str, tuple[Path, Manifest]] = {}
        self.skipped = torch.zeros(2, dtype=torch.int64)  # images left out of training, and stand-ins, of all processes
        self.unsummed = torch.zeros(2, dtype=torch.int64)  # the same, of this process since the last sum over processes
        self.left_out: dict[str, torch.Tensor] = {}  # the same, of batches that have not been processed yet

    def setup(self, stage: str) -> None:
        """Check the splits that the stage needs, before anything is read; a new run starts at the first image."""
        if not self.batches():  # a new run, perhaps after another one with the same data module
            self.seen, self.batches_before, self.skipped = 0, 0, torch.zeros(2, dtype=torch.int64)
        self.splits, self.left_out, self.unsummed = {}, {}, torch.zeros(2, dtype=torch.int64)
        if self.on_damage == "skip":
            callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
            if not any(isinstance(callback, Damage) for callback in callbacks):
                callbacks.insert(0, Damage())  # before the callback that saves, so that checkpoints hold the new sum
        for split in ["train", "val"] if stage == "fit" else ["val"]:
            self.manifest(split)

    def manifest(self, split: str) -> tuple[Path, Manifest]:
        """The folder and manifest of a split, read once per run and checked against the trained module."""
        if split not in self.splits:
            self.splits[split] = self.find(split, self.trainer.lightning_module)
        return self.splits[split]

    def check_before_start(self, trainer: L.Trainer, module: Any, data: Any, stage: str) -> None:
        """Refuse what does not fit the module or the trainer, before anything is opened."""
        self.trainer = trainer
        for split in ["train", "val"] if stage == "fit" else ["val"]:
            _, manifest = self.find(split, module)
            self.micro_batch()
            if split == "train" and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # untyped there
                self.check_pass(self.pass_length(manifest))

    def check_pass(self, batches: int) -> None:
        """Refuse a pass that ends amid the batches of a step, or before its validation. batches: of a whole pass."""
        trainer: Any = self.trainer
        limit, parts, every = trainer.limit_train_batches, trainer.accumulate_grad_batches, trainer.val_check_interval
        batches = min(limit, batches) if isinstance(limit, int) else int(limit * batches)
        if batches % parts:
            raise InputError(
                f"limit_train_batches {limit} makes passes of {batches} batches, which is no multiple of "
                f"accumulate_grad_batches {parts}: the last step of a pass would be of fewer images"
            )
        by_passes = trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches
        if by_passes and isinstance(every, int) and every > batches:
            raise InputError(
                f"val_check_interval {every} exceeds the {batches} batches of a pass: "
                "with check_val_every_n_epoch null it counts batches over all passes"
            )

    def find(self, split: str, module: Any) -> tuple[Path, Manifest]:
        """Find and check the folder of a split: resolution, channels, classes, and an image for every process."""
        folder = find_folder(self.roots[split], split, module.resolution)
        manifest = read_manifest(folder, check_files=self.on_damage == "refuse")
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

    def loader(self, split: str, batch_size: int, **options: Any) -> ResumableLoader:
        """The loader of a split's stream, for this process."""
        folder, manifest = self.manifest(split)
        module: Any = self.trainer.lightning_module
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        stream = ShardStream(
            folder, manifest, module.resolution, batch_size, rank, world_size, self.seed, self.window,
            on_damage=self.on_damage, **options,
        )  # fmt: skip
        return ResumableLoader(
            stream,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=8 if self.num_workers else None,  # enough batches to bridge the reading of the next window
            worker_init_fn=leave_signals_to_the_parent,
        )

    def pass_length(self, manifest: Manifest) -> int:
        """Batches of a pass, before any limit: to max_steps where given, else one epoch."""
        steps = self.trainer.max_steps if self.trainer.max_steps > -1 else manifest.count // self.batch_size
        if not steps:
            raise InputError(f"batch_size {self.batch_size} is larger than the {manifest.count} training images")
        return steps * self.trainer.accumulate_grad_batches

    def train_dataloader(self) -> ResumableLoader:
        """An endless stream. Its length, for the progress bar, is max_steps where given, else one epoch."""
        _, manifest = self.manifest("train")
        loader = self.loader("train", self.micro_batch(), flip=self.flip, length=self.pass_length(manifest))
        loader.current_place = self.images_seen
        return loader

    def val_dataloader(self) -> ResumableLoader:
        """Every image once. Where possible, all processes get equally many batches; their images differ by at most one.

        DDP synchronises buffers at every forward pass, and would wait forever for a process with fewer batches.
        """
        _, manifest = self.manifest("val")
        world_size, largest = self.trainer.world_size, self.micro_batch()
        least, most = manifest.count // world_size, -(-manifest.count // world_size)
        batch_size = next((b for b in range(largest, 1, -1) if -(-least // b) == -(-most // b)), largest)
        count = len(range(self.trainer.global_rank, manifest.count, world_size))
        return self.loader("val", batch_size, shuffle=False, end=manifest.count, length=-(-count // batch_size))

    test_dataloader = predict_dataloader = val_dataloader

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Decode which images are damaged, while the batch is on the CPU, and count them."""
        if self.on_damage == "refuse":
            return batch
        image, label, index = batch
        index, counts = decode_damage(index, len(image))
        split = "train" if self.trainer.training else "val"
        self.left_out[split] = self.left_out.get(split, 0) + counts
        return image, label, index

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        image, label, index = batch
        return to_float(image), label, index

    def sum_over_processes(self, counts: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, which must all call this."""
        strategy: Any = self.trainer.strategy
        return strategy.reduce(counts.to(strategy.root_device), reduce_op="sum").cpu()

    def sum_skipped(self) -> None:
        """Add the counts of all processes since the last call to `skipped`. All processes must call this."""
        self.skipped += self.sum_over_processes(self.unsummed)
        self.unsummed.zero_()

    # -- the place in the sequence of images, saved with every checkpoint

    def batches(self) -> int:
        """Batches of this run whose training step has ended. An interrupted step is repeated on resume."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]  # untyped there

    def images_seen(self) -> int:
        """How many images all processes together have trained on: the current place in the sequence."""
        # At the first call of a resumed run, Lightning has not restored its counters.
        since = max(0, self.batches() - self.batches_before)
        return self.seen + since * self.micro_batch() * self.trainer.world_size

    def state_dict(self) -> dict[str, Any]:
        _, manifest = self.manifest("train")
        if self.on_damage == "skip":
            self.sum_skipped()
        origin = {"classes": manifest.classes, "crop": manifest.crop, "filter": manifest.filter}
        counts = {"images_seen": self.images_seen(), "batches": self.batches(), "skipped": self.skipped.tolist()}
        return {**counts, "accumulated": self.trainer.accumulate_grad_batches, **origin}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen, self.batches_before = state_dict["images_seen"], state_dict["batches"]
        self.skipped = torch.tensor(state_dict.get("skipped", [0, 0]))
