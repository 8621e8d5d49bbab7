"""Shards in, batches of (image, label, index) out: one sequence of images, dealt out to ranks and workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from cdm_lightning import InputError
from cdm_lightning.images import downscale, to_float
from cdm_lightning.randomness import key
from cdm_lightning.shards import Manifest, Shard, decode_sample, find_folder, read_manifest, read_places


class ShardStream(IterableDataset):
    """Batches of (uint8 image (B, C, R, R), label (B,), index (B,)), this rank's and worker's part of one sequence.

    Place p of the sequence is image p mod N of epoch p div N, and is a function of (seed, epoch) alone: the shards are
    permuted, and the images of every `window` neighbouring shards among themselves (the shards already hold one global
    random order). Rank r of W takes the places p = start + r (mod W), worker w of n every n-th batch of those, so any
    number of ranks and workers walks the same sequence, and a run goes on at any place by reading one window.

    start: first place. end: place to stop before, None for no end. flip: mirror images by a coin keyed by their place.
    index is the place: it names an image of the run and keys its random draws.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        resolution: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        window: int = 4,
        flip: bool = False,
        shuffle: bool = True,
        start: int = 0,
        end: int | None = None,
        length: int = 0,
    ) -> None:
        self.folder, self.manifest, self.resolution, self.batch_size = folder, manifest, resolution, batch_size
        self.rank, self.world_size, self.seed, self.window = rank, world_size, seed, window
        self.flip, self.shuffle, self.start, self.end, self.length = flip, shuffle, start, end, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        batch = []
        for place, sample in self.samples():
            image, label = decode_sample(sample, self.manifest)
            if self.flip and key(self.seed, "flip", place) % 2:
                image = image[:, ::-1]
            batch.append((place, image, label))
            if len(batch) == self.batch_size:
                yield self.collate(batch)
                batch = []
        if batch:
            yield self.collate(batch)

    def samples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(place, undecoded sample) of this rank and worker, in the sequence's order."""
        worker = torch.utils.data.get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        for first, shards, order in self.windows():
            stop = first + len(order) if self.end is None else min(first + len(order), self.end)
            begin = self.start + self.rank
            begin += max(0, -(-(first - begin) // self.world_size)) * self.world_size  # first own place in the window
            places = np.arange(begin, stop, self.world_size)
            batch = (places - self.start) // self.world_size // self.batch_size
            places = places[batch % workers == number]
            if len(places):
                samples = read_places(self.folder, shards, order[places - first].tolist())
                yield from zip(places.tolist(), samples, strict=True)
            if self.end is not None and stop == self.end:
                return

    def windows(self) -> Iterator[tuple[int, list[Shard], np.ndarray]]:
        """(first place, shards, permutation of all their images) from the window that holds `start` on."""
        counts = np.array([shard.count for shard in self.manifest.shards])
        epoch = self.start // self.manifest.count
        first = epoch * self.manifest.count
        while True:
            shards = np.arange(len(counts))
            if self.shuffle:
                shards = np.random.default_rng(key(self.seed, "shards", epoch)).permutation(shards)
            for number in range(0, len(shards), self.window):
                group = shards[number : number + self.window]
                size = int(counts[group].sum())
                if first + size > self.start:
                    random = np.random.default_rng(key(self.seed, "window", epoch, number))
                    order = random.permutation(size) if self.shuffle else np.arange(size)
                    yield first, [self.manifest.shards[shard] for shard in group], order
                first += size
            epoch += 1

    def collate(self, batch: list[tuple[int, np.ndarray, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        places, images, labels = zip(*batch, strict=True)
        image = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # (B, C, H, W)
        return downscale(image.contiguous(), self.resolution), torch.tensor(labels), torch.tensor(places)


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
    ) -> None:
        super().__init__()
        if window < 1 or num_workers < 0:
            raise InputError(f"window {window} must be at least 1, and num_workers {num_workers} at least 0")
        self.roots = {"train": Path(root), "val": Path(root if val_root is None else val_root)}
        self.batch_size, self.num_workers = batch_size, num_workers
        self.flip, self.window, self.seed = flip, window, seed
        self.seen, self.batches_before = 0, 0

    def setup(self, stage: str) -> None:
        if not self.batches():  # a new run, be it after another one with the same data module
            self.seen, self.batches_before = 0, 0
        for split in ["train", "val"] if stage == "fit" else ["val"]:
            self.manifest(split)

    def manifest(self, split: str) -> tuple[Path, Manifest]:
        """The folder and manifest of a split, checked against the module that will be fed."""
        module: Any = self.trainer.lightning_module
        folder = find_folder(self.roots[split], split, module.resolution)
        manifest = read_manifest(folder)
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
            folder, manifest, module.resolution, batch_size, rank, world_size, self.seed, self.window, **options
        )
        return ContinuingLoader(
            stream,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=8 if self.num_workers else None,  # rides out the reading of the next window
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

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        image, label, index = batch
        return to_float(image), label, index

    # -- the place in the sequence, saved with every checkpoint beside what the images are

    def batches(self) -> int:
        """Batches of this run whose training step has ended; one that an exception cut short is repeated on resume."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]  # untyped there

    def images_seen(self) -> int:
        """Places of the sequence that all processes together have trained on."""
        return self.seen + (self.batches() - self.batches_before) * self.micro_batch() * self.trainer.world_size

    def state_dict(self) -> dict[str, Any]:
        _, manifest = self.manifest("train")
        origin = {"classes": manifest.classes, "crop": manifest.crop, "filter": manifest.filter}
        return {"images_seen": self.images_seen(), "batches": self.batches(), **origin}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen, self.batches_before = state_dict["images_seen"], state_dict["batches"]
