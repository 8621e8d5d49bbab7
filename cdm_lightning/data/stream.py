"""One sequence of images in batches of (image, label, index), dealt out to ranks and workers."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from cdm_lightning.data.damage import OnDamage, Reports, marked
from cdm_lightning.data.shards import Images, Manifest, OpenedImages, Shard, in_batches, open_images
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import downscale
from cdm_lightning.foundation.randomness import key


class ShardStream(IterableDataset):
    """Batches of (uint8 image (B, C, R, R), label (B,), index (B,)), this rank's and worker's part of one sequence.

    Place p of the sequence is image p mod N of epoch p div N, and is a function of (seed, epoch) alone: the shards are
    permuted, and the images of every `window` neighbouring shards among themselves (the shards already hold one global
    random order). Rank r of W takes the places p = start + r (mod W), worker w of n every n-th batch of those, so any
    number of ranks and workers walks the same sequence, and a run goes on at any place by reading one window.

    start: first place. end: place to stop before, None for no end. flip: mirror images by a coin keyed by their place.
    index is the place: it names an image of the run and keys its random draws.
    on_damage: refuse raises InputError; skip leaves damaged images and shards out of their batch, whose index then has
    ~p for place p (`damage.unmarked`), longer than its images. A batch of damage alone holds the first intact image of
    its window, else of the folder.
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
        on_damage: OnDamage = "refuse",
    ) -> None:
        self.folder, self.manifest, self.resolution, self.batch_size = folder, manifest, resolution, batch_size
        self.rank, self.world_size, self.seed, self.window = rank, world_size, seed, window
        self.flip, self.shuffle, self.start, self.end, self.length = flip, shuffle, start, end, length
        self.report = Reports() if on_damage == "skip" else None
        self.reading: list[Shard] = []  # the window

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for places, images in in_batches(self.opened(), self.batch_size):
            yield self.collate(places, images)

    def stand_in(self) -> Images:
        """The first intact image of the window, else of the folder: a function of what is damaged alone."""
        for shard in [*self.reading, *self.manifest.shards]:
            opened = open_images(self.folder, self.manifest, [shard], range(shard.count), self.report)
            for item in range(shard.count):
                if len((found := opened.read([item])).image):
                    opened.close()
                    return found
            opened.close()
        raise InputError(f"{self.folder} holds no intact image")

    def names(self) -> Iterator[tuple[int, str]]:
        """(place, key of its image) of this rank and worker, in the sequence's order; "" for one of a damaged shard."""
        for places, opened in self.opened():
            keys = ["" if opened.lost(item) else opened.key(item) for item in range(len(places))]
            yield from zip(places.tolist(), keys, strict=True)
            opened.close()

    def opened(self) -> Iterator[tuple[np.ndarray, OpenedImages]]:
        """This rank's and worker's places of each window in the sequence's order, and their images, opened."""
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
                self.reading = shards
                wanted = order[places - first].tolist()
                yield places, open_images(self.folder, self.manifest, shards, wanted, self.report)
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

    def collate(self, places: np.ndarray, images: Images) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        index = marked(places.tolist(), (~images.intact).tolist())
        shown = places[images.intact].tolist()
        if not shown:  # Lightning takes no batch of nothing, and the other processes wait for one
            images, shown = self.stand_in(), places[:1].tolist()
        image = torch.from_numpy(images.image).permute(0, 3, 1, 2).contiguous()  # (B, C, H, W)
        if self.flip:
            mirrored = np.array([key(self.seed, "flip", place) % 2 == 1 for place in shown])
            image.numpy()[mirrored] = image.flip(-1).numpy()[mirrored]  # several times faster than torch's masks
        return downscale(image, self.resolution).contiguous(), torch.from_numpy(images.label), index


def leave_signals_to_the_parent(worker: int) -> None:
    """What a reading process does first: a signal to the whole group is for the training process, which saves first.

    A reader ends when its parent is done or gone. One that was told to end by SIGTERM has five minutes to be needed no
    more; a second SIGTERM, as a parent sends to one that is stuck, ends it at once.
    """

    def once(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        signal.alarm(300)

    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, once)
