"""The data module: shards in, batches of (image, label, index) out, for every process of a run that can be resumed."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from cdm_lightning.data.damaged_images import Damage, OnDamage, decode_damage
from cdm_lightning.data.shards import Folder, Manifest, RemoteFolder, find_folder, read_manifest, shards_root
from cdm_lightning.data.stream import ShardStream, leave_signals_to_the_parent
from cdm_lightning.foundation.class_names import check_same_classes
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import to_float
from cdm_lightning.foundation.process_group import exit_now, time_limit
from cdm_lightning.foundation.stopping import interruptible_wait

SHARED_MEMORY = Path("/dev/shm")  # where torch puts the batches of reading processes, on Linux
PREFETCHED = 8  # batches that each reading process holds ready: enough to bridge the reading of the next window


class ResumableLoader(DataLoader):
    """A DataLoader of a ShardStream: every pass starts at the current place of the run, and no wait is without an end.

    wait_limit: seconds to wait for a batch before InputError, which says what was to be read. torch has a limit too,
    but none while it takes a batch from a reading process, which may be stopped at that moment.
    """

    current_place: Callable[[], int] | None = None  # of a training; a signal may end its wait for a batch
    wait_limit = 0.0

    def __iter__(self) -> Any:
        stream: Any = self.dataset
        if self.current_place is not None:
            stream.start = self.current_place()
        late: list[str] = []  # the sentence of a wait that was too long
        batches, number, end = super().__iter__(), 0, object()
        give_up = partial(self.give_up, batches, late)
        while True:
            try:
                with (
                    interruptible_wait() if self.current_place else nullcontext(),
                    time_limit(self.wait_limit + (1 if self.num_workers else 0), partial(give_up, number)),
                ):
                    batch = next(batches, end)
            except BaseException as error:
                if str(error).startswith("DataLoader timed out"):
                    late.append(self.describe_wait(batches, number))
                end_readers(batches)  # torch would wait for one that hangs
                if late and isinstance(error, Exception):
                    raise InputError(late[0]) from error
                raise
            if batch is end:
                return
            yield batch
            number += 1

    def give_up(self, batches: Any, late: list[str], number: int) -> None:
        """In another thread: end the readers, which ends a wait for them, or else this process."""
        if late or not self.num_workers:
            exit_now(late[0] if late else self.describe_wait(batches, number))
        late.append(self.describe_wait(batches, number))
        for reader in readers(batches):
            reader.kill()

    def describe_wait(self, batches: Any, number: int) -> str:
        """A sentence about batch `number` of this pass, which has not come in time: who was to read what."""
        stream: Any = self.dataset
        reader = "this process has read no batch"
        if self.num_workers:
            reader = "a reading process gave no batch"
            with suppress(AttributeError, LookupError):  # torch's own tables
                worker = batches._task_info[batches._rcvd_idx][0]
                pid = batches._workers[worker].pid
                reader = f"reading process {worker + 1} of {self.num_workers} (pid {pid}{state_of(pid)}) gave no batch"
        shards = ", ".join(str(path) for path in stream.shards_of(number))
        return (
            f"{reader} for {self.wait_limit:g} s, which is data.timeout; it was to read from {shards}: once they "
            "can be read, the same command goes on"
        )

    def state_dict(self) -> dict[str, Any]:
        """Empty: the data module saves the place. Having both methods tells Lightning that the loader can resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class ShardDataModule(L.LightningDataModule):
    """Training and validation images from `<root>/train` and `<root>/val`, at the resolution of the trained module.

    If that resolution is not stored, images of a larger one are reduced to it, with the same result.

    Args:
        root: Folder of shards, written by `cdm prepare`, or its address (https://, s3://, gs://, hf:// ...), from which
            the shards are fetched in the order of the training.
        batch_size: Images per optimizer step, over all processes and accumulated batches: the batch size of a paper.
        num_workers: Processes that read and decode images, for each training process.
        flip: Mirror half of the training images.
        window: Number of consecutive shards whose images are shuffled together.
        seed: Seeds the order of the images and the flips.
        val_root: Folder whose `val` split is used to validate and test; null for root. Samples of `cdm sample` have no
            such split: with val_root, a model can train on them and be tested on real images.
        on_damage: refuse ends the run with an error at the first image or shard that is missing, damaged or does not
            match its manifest. skip leaves it out, and logs how many were left out (data/skipped_images).
        timeout: Seconds to wait for a batch. A run that has waited longer ends with an error: a reading process hangs,
            or the shards lie on a network disk that is gone.
        cache: Folder in which shards from an address are kept; null for $CDM_CACHE/shards, or else
            ~/.cache/cdm_lightning/shards. The processes of a machine share it.
        cache_gb: The most that it may hold, in units of 10^9 bytes. Shards that were used longest ago make room.
    """

    trainer: L.Trainer  # type: ignore[assignment]  # Lightning attaches it before it calls anything here

    def __init__(
        self,
        root: str | Path,
        batch_size: int = 64,
        num_workers: int = 2,
        flip: bool = False,
        window: int = 4,
        seed: int = 0,
        val_root: str | Path | None = None,
        on_damage: OnDamage = "refuse",
        timeout: float = 600,
        cache: Path | None = None,
        cache_gb: float = 50,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}: it must be at least 1")
        if window < 1 or num_workers < 0:
            raise InputError(f"window {window} must be at least 1, and num_workers {num_workers} at least 0")
        if not timeout > 0:
            raise InputError(f"timeout {timeout} of the data is not positive: it is the seconds to wait for a batch")
        if not cache_gb > 0:
            raise InputError(f"cache_gb {cache_gb} of the data is not positive: it is the most that the cache may hold")
        roots = {"train": root, "val": root if val_root is None else val_root}
        self.roots = {split: shards_root(each, cache, cache_gb) for split, each in roots.items()}
        self.batch_size, self.num_workers = batch_size, num_workers
        self.flip, self.window, self.seed = flip, window, seed
        self.seen, self.batches_before, self.on_damage = 0, 0, on_damage
        self.timeout, self.prefetched = timeout, PREFETCHED
        self.splits: dict[str, tuple[Folder, Manifest]] = {}
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
        self.check_own_classes(self.trainer.lightning_module)
        self.prefetched = self.fit_shared_memory()

    def manifest(self, split: str) -> tuple[Folder, Manifest]:
        """The folder and manifest of a split, read once per run and checked against the trained module."""
        if split not in self.splits:
            self.splits[split] = self.find(split, self.trainer.lightning_module)
        return self.splits[split]

    def check_before_start(self, trainer: L.Trainer, module: Any, data: Any, stage: str) -> None:
        """Refuse what does not fit the module or the trainer, before anything is opened."""
        self.trainer = trainer
        for split in ["train", "val"] if stage == "fit" else ["val"]:
            _, manifest = self.splits[split] = self.find(split, module)
            self.micro_batch()
            if split == "train" and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # untyped there
                self.check_pass(self.pass_length(manifest))
        self.check_own_classes(module)

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

    def find(self, split: str, module: Any) -> tuple[Folder, Manifest]:
        """Find and check the folder of a split: resolution, channels, classes, and an image for every process."""
        folder = find_folder(self.roots[split], split, module.resolution)
        manifest = read_manifest(folder, check_files=self.on_damage == "refuse")
        if manifest.resolution != int(folder.name):
            raise InputError(f"{folder} holds images of resolution {manifest.resolution}, its name says {folder.name}")
        if manifest.channels != module.image_channels:
            raise InputError(f"{folder} has {manifest.channels} channels, the model takes {module.image_channels}")
        if module.num_classes is not None and len(manifest.classes) != module.num_classes:
            raise InputError(f"{folder} has {len(manifest.classes)} classes, the model takes {module.num_classes}")
        if isinstance(folder, RemoteFolder):
            folder.cache.check_size(folder, manifest, self.window)
        processes = self.trainer.world_size
        if manifest.count < processes:
            raise InputError(f"{folder} holds {manifest.count} images for {processes} processes: each needs one")
        return folder, manifest

    def check_own_classes(self, module: Any) -> None:
        """Refuse splits whose classes differ from each other, or from those that a cascade was trained on."""
        for folder, manifest in self.splits.values():
            self.check_classes(manifest.class_names, folder, module)
        self.check_classes(getattr(module, "origin", {}).get("classes"), "the cascade", module)

    def check_classes(self, classes: list[str] | None, owner: object, module: Any) -> None:
        """Refuse splits whose classes differ from `classes` of `owner`, if the module is conditioned on classes.

        None is unknown.
        """
        for folder, manifest in self.splits.values() if module.num_classes is not None else ():
            check_same_classes(manifest.class_names, classes, folder, owner)

    def micro_batch(self) -> int:
        """Images per process and forward pass."""
        parts = self.trainer.world_size * self.trainer.accumulate_grad_batches
        if self.batch_size < parts or self.batch_size % parts:
            raise InputError(
                f"batch_size {self.batch_size} cannot be shared by {self.trainer.world_size} processes with "
                f"{self.trainer.accumulate_grad_batches} accumulated batches: it must be a multiple of {parts}"
            )
        return self.batch_size // parts

    def fit_shared_memory(self) -> int:
        """How many batches each reading process may hold ready. Raises InputError if not one of each fits.

        The batches lie in shared memory, which in a container often holds 64 MB. Two loaders share it, since the
        readers of the training keep theirs during a validation.
        """
        if not self.num_workers or not SHARED_MEMORY.is_dir():
            return PREFETCHED
        module: Any = self.trainer.lightning_module
        images, space = self.micro_batch(), os.statvfs(SHARED_MEMORY)
        batch = images * (module.image_channels * module.resolution**2 + 16) + 3 * space.f_frsize  # labels, indices
        free, loaders = space.f_bavail * space.f_frsize, 2 * self.trainer.num_devices
        ready = (free // loaders // batch - 2) // self.num_workers  # two more are in the hands of the training
        if ready < 1:
            least = loaders * batch * (self.num_workers + 2)
            raise InputError(
                f"{SHARED_MEMORY} has {free / 1e6:,.0f} MB free, and {self.num_workers} reading processes for each of "
                f"{self.trainer.num_devices} processes need {least / 1e6:,.0f} MB for batches of {images} images: give "
                f"fewer data.num_workers, a smaller micro-batch, or a larger {SHARED_MEMORY} (docker run --shm-size)"
            )
        if ready < PREFETCHED:
            rank_zero_warn(
                f"{SHARED_MEMORY} has {free / 1e6:,.0f} MB free: each reading process reads {ready} batches ahead, not "
                f"{PREFETCHED}"
            )
        return min(ready, PREFETCHED)

    def loader(self, split: str, batch_size: int, **options: Any) -> ResumableLoader:
        """The loader of a split's stream, for this process."""
        folder, manifest = self.manifest(split)
        module: Any = self.trainer.lightning_module
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        stream = ShardStream(
            folder, manifest, module.resolution, batch_size, rank, world_size, self.seed, self.window,
            on_damage=self.on_damage, **options,
        )  # fmt: skip
        loader = ResumableLoader(
            stream,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=self.prefetched if self.num_workers else None,
            timeout=self.timeout if self.num_workers else 0,
            worker_init_fn=leave_signals_to_the_parent,
        )
        loader.wait_limit = self.timeout
        return loader

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
        origin = {"classes": manifest.class_names, "crop": manifest.crop, "filter": manifest.filter}
        counts = {"images_seen": self.images_seen(), "batches": self.batches(), "skipped": self.skipped.tolist()}
        return {**counts, "accumulated": self.trainer.accumulate_grad_batches, **origin}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.check_classes(state_dict.get("classes"), "the checkpoint", self.trainer.lightning_module)
        self.seen, self.batches_before = state_dict["images_seen"], state_dict["batches"]
        self.skipped = torch.tensor(state_dict.get("skipped", [0, 0]))


def readers(batches: Any) -> list[Any]:
    """The reading processes of a loader's iterator."""
    return getattr(batches, "_workers", [])


def end_readers(batches: Any) -> None:
    """Kill the reading processes of a loader's iterator, also those that are stopped."""
    for act in (lambda reader: reader.kill(), lambda reader: reader.join(1)):
        for reader in readers(batches):
            with suppress(RuntimeError):  # torch reports that one was killed
                act(reader)


def state_of(pid: int) -> str:
    """What Linux says of a process that does not answer, as ", stopped"; empty where that says nothing."""
    with suppress(OSError):
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return {"T": ", stopped", "D": ", waiting for a disk or a network file", "Z": ", ended"}.get(letter, "")
    return ""
