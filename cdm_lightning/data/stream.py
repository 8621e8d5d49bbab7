"""The stream of images: one sequence in batches of (image, label, index), split over ranks and workers."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from cdm_lightning.data.damaged_images import DamageReporter, OnDamage, encode_damage
from cdm_lightning.data.shards import (
    Folder,
    Images,
    Manifest,
    OpenedImages,
    Shard,
    fetching_ahead,
    in_batches,
    open_images,
)
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import downscale
from cdm_lightning.foundation.randomness import key


class ShardStream(IterableDataset):
    """Batches of (uint8 image (B, C, R, R), label (B,), index (B,)): the part of one rank and worker of one sequence.

    Place p of the sequence is image p mod N of epoch p div N. The order of an epoch depends on (seed, epoch) only: the
    shards are permuted, and then the images within every `window` consecutive shards (the shards already hold one
    global random order). Rank r of W takes the places p = start + r (mod W), and worker w of n takes every n-th batch
    of those. Any number of ranks and workers thus gives the same sequence, and a run can resume at any place by reading
    one window.

    start: first place. end: place to stop before, or None. flip: mirror half of the images, by a random bit seeded by
    the place. index: the place; it identifies the image in the run and seeds its random draws.
    on_damage: "refuse" raises InputError. "skip" leaves damaged images out of their batch; its index then holds ~p for
    a damaged place p (see `decode_damage`), and is longer than the batch. If all images of a batch are damaged,
    it holds the first intact image of the window, or else of the folder.
    """

    def __init__(
        self,
        folder: Folder,
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
        self.report = DamageReporter() if on_damage == "skip" else None
        self.current_shards: list[Shard] = []  # of the current window

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for places, images in in_batches(self.open_windows(), self.batch_size):
            batch = self.collate(places, images)
            yield share(batch) if torch.utils.data.get_worker_info() else batch

    def shards_of(self, batch: int) -> list[Folder]:
        """The files of the window that holds the first image of a batch of this rank, counted from `start`."""
        place = self.start + self.rank + batch * self.batch_size * self.world_size
        for first, shards, order in self.windows():
            if place < first + len(order):
                return [self.folder / shard.name for shard in shards]
        raise AssertionError("the sequence has no end")

    def stand_in(self) -> Images:
        """The first intact image of the window, or else of the folder. It depends only on which images are damaged."""
        for shard in [*self.current_shards, *self.manifest.shards]:
            opened = open_images(self.folder, self.manifest, [shard], range(shard.count), self.report)
            for item in range(shard.count):
                if len((images := opened.read([item])).image):
                    opened.close()
                    return images
            opened.close()
        raise InputError(f"{self.folder} holds no intact image")

    def names(self) -> Iterator[tuple[int, str]]:
        """(place, key) of the images of this rank and worker, in order; the key is "" in a damaged shard."""
        for places, opened in self.open_windows():
            keys = ["" if opened.lost(item) else opened.key(item) for item in range(len(places))]
            yield from zip(places.tolist(), keys, strict=True)
            opened.close()

    def open_windows(self) -> Iterator[tuple[np.ndarray, OpenedImages]]:
        """The places of this rank and worker in each window, in order, and their opened images."""
        worker = torch.utils.data.get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        windows = self.windows()
        if number == 0:  # the others find the shards in the cache
            windows = fetching_ahead(self.folder, windows)
        for first, shards, order in windows:
            stop = first + len(order) if self.end is None else min(first + len(order), self.end)
            begin = self.start + self.rank
            begin += max(0, -(-(first - begin) // self.world_size)) * self.world_size  # this rank's first in the window
            places = np.arange(begin, stop, self.world_size)
            batch = (places - self.start) // self.world_size // self.batch_size
            places = places[batch % workers == number]
            if len(places):
                self.current_shards = shards
                wanted = order[places - first].tolist()
                yield places, open_images(self.folder, self.manifest, shards, wanted, self.report)
            if self.end is not None and stop == self.end:
                return

    def windows(self) -> Iterator[tuple[int, list[Shard], np.ndarray]]:
        """(first place, shards, permutation of their images) of each window, from the one that holds `start` on."""
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
        """A batch: uint8 (B, C, R, R), reduced to R and mirrored where `flip`; label (B,); index, see the class."""
        index = encode_damage(places.tolist(), (~images.intact).tolist())
        intact = places[images.intact].tolist()
        if not intact:  # Lightning needs a batch that is not empty, and the other processes wait for it
            images, intact = self.stand_in(), places[:1].tolist()
        image = torch.from_numpy(images.image).permute(0, 3, 1, 2).contiguous()  # (B, C, H, W)
        if self.flip:
            mirrored = np.array([key(self.seed, "flip", place) % 2 == 1 for place in intact])
            # Numpy masks are several times faster than torch's.
            image.numpy()[mirrored] = image.flip(-1).numpy()[mirrored]
        return downscale(image, self.resolution).contiguous(), torch.from_numpy(images.label), index


def share(batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Move a batch to shared memory, from which the parent takes it.

    torch would do so in a thread, whose error it prints while the parent waits for the lost batch. Raises InputError
    where there is no room.
    """
    try:
        for tensor in batch:
            tensor.share_memory_()
        return batch
    except RuntimeError as error:
        size = sum(tensor.nbytes for tensor in batch)
        raise InputError(
            f"a reading process has no room for a batch of {size / 1e6:.3g} MB in shared memory, /dev/shm on Linux "
            f"({' '.join(str(error).split())}): give fewer data.num_workers, or a larger /dev/shm (docker run "
            "--shm-size), and the same command goes on"
        ) from error


def leave_signals_to_the_parent(worker: int) -> None:
    """Let a reading process outlive signals that are sent to the whole group, so that the training process can save.

    A reader ends when its parent ends. It ignores SIGUSR1 and Ctrl-C. After a first SIGTERM it goes on reading for at
    most five minutes; a second one, which a parent sends to a reader that is stuck, ends it at once.
    """

    def once(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        signal.alarm(300)

    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, once)
