"""Making the shards in parallel: one task per shard, recorded when finished, so that a killed run can continue."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cdm_lightning.data.preparation.raw_images import Crop, RawImage, cut_square, decode
from cdm_lightning.data.shards import write_packed, write_shard
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import read_table, write_atomically
from cdm_lightning.foundation.images import downscale, encode_photo
from cdm_lightning.foundation.progress_bar import ProgressBar
from cdm_lightning.foundation.terminal import printable

PROGRESS = ".progress"  # a subfolder of the split while the preparation runs
CHUNK = 8  # images reduced together: few enough to stay in the cache


@dataclass(frozen=True)
class Task:
    """One shard to make, at every resolution: consecutive images of the global order, the first at `start`."""

    number: int
    start: int
    images: list[RawImage]
    folder: Path
    resolutions: list[int]
    crop: Crop
    grey: bool
    packed: list[int]  # the resolutions that are stored packed

    @property
    def record(self) -> Path:
        """The file that records this task as finished; it is written after the shard's tars."""
        return self.folder / PROGRESS / f"{self.number:06d}.json"

    def finished(self) -> dict[str, Any] | None:
        """The record of an earlier run, or None if there is none or one of its tars is missing."""
        if not self.record.is_file():
            return None
        try:
            record = read_table(self.record, "number", "labels", "skipped")
            tars = {self.folder / r / s["name"]: s["bytes"] for r, s in record["shards"].items()}
        except (InputError, KeyError, TypeError, AttributeError):
            return None  # a damaged record: the shard is made again
        if len(tars) < len(self.resolutions) or any(not t.is_file() or t.stat().st_size != n for t, n in tars.items()):
            return None
        return record


def make_shards(tasks: list[Task], workers: int, max_corrupt: float) -> list[dict[str, Any]]:
    """Make the missing shards. Returns the records of all shards, in order."""
    earlier = [task.finished() for task in tasks]
    todo = [task for task, record in zip(tasks, earlier, strict=True) if record is None]
    records = {record["number"]: record for record in earlier if record is not None}
    total, count = sum(len(task.images) for task in tasks), sum(len(task.images) for task in todo)
    check_skipped(records, total, max_corrupt)
    started = time.monotonic()
    with (
        ProgressBar(total=total, initial=total - count, desc="preparing", unit="image") as bar,
        closing(run_tasks(todo, workers)) as finished,
    ):
        for record in finished:
            records[record["number"]] = record
            bar.update(len(tasks[record["number"]].images))
            for entry in record["skipped"]:
                bar.write(f"skipped {printable(entry['name'])}: {printable(entry['reason'])}", file=sys.stderr)
            check_skipped(records, total, max_corrupt)
    seconds = time.monotonic() - started
    print(f"{count:,} images read in {seconds:.0f} s by {workers} workers: {count / seconds:.0f} images/s")
    if small := [name for task in tasks for name in records[task.number].get("small", [])]:
        size = tasks[0].resolutions[0]
        print(f"{len(small):,} images are smaller than {size}x{size} and were enlarged, first {printable(small[0])}")
    return [records[task.number] for task in tasks]


def check_skipped(records: dict[int, dict[str, Any]], total: int, max_corrupt: float) -> None:
    """Refuse a source with a larger share of unreadable images than `max_corrupt`."""
    skipped = [entry for record in records.values() for entry in record["skipped"]]
    if len(skipped) > max_corrupt * total:
        first = f"{printable(skipped[0]['name'])} ({printable(skipped[0]['reason'])})"
        raise InputError(
            f"{len(skipped)} of {total} images ({len(skipped) / total:.2%}) cannot be read, the first is {first}: more "
            f"than max_corrupt = {max_corrupt:.2%} is an error"
        )


def run_tasks(tasks: list[Task], workers: int) -> Generator[dict[str, Any]]:
    """Run the tasks in this process or in several; gives their records in the order in which they finish."""
    if workers == 1 or len(tasks) < 2:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # for single images, threads cost more time than they save
        try:
            yield from map(make_shard, tasks)
        finally:
            torch.set_num_threads(threads)
        return
    pool, wait = ProcessPoolExecutor(min(workers, len(tasks)), get_context("spawn"), initializer=start_worker), True
    try:
        with without_interrupts():
            futures = [pool.submit(make_shard, task) for task in tasks]
        for future in as_completed(futures):
            yield future.result()
    except (KeyboardInterrupt, SystemExit):
        wait = False  # `cdm` ends the workers; what they leave unfinished is made again
        raise
    except BrokenProcessPool as error:
        raise InputError(
            f"one of {workers} workers was ended from outside, as happens when memory runs out: "
            "give the same command with fewer --workers, it goes on from here"
        ) from error
    finally:
        pool.shutdown(wait, cancel_futures=True)


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Processes and threads that are started within never hear a Ctrl-C, which is the parent's to answer."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def start_worker() -> None:
    """End this worker with its parent, even a killed one: it must not write beside the workers of the next run."""
    torch.set_num_threads(1)
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def make_shard(task: Task) -> dict[str, Any]:
    """Decode each image once, write the shard at every resolution, and then write and return the record."""
    skipped: list[dict[str, str]] = []
    small: list[str] = []
    keys: list[str] = []
    labels: list[int] = []
    channels = 1 if task.grey else 3
    arrays = {r: np.empty((len(task.images), r, r, channels), np.uint8) for r in task.packed}
    pngs: dict[int, list[bytes]] = {r: [] for r in task.resolutions if r not in task.packed}
    squares = read_squares(task, skipped, small)
    while chunk := list(islice(squares, CHUNK)):
        image = torch.from_numpy(np.stack([square for *_, square in chunk])).permute(0, 3, 1, 2)  # (N, C, R, R)
        for resolution in task.resolutions:
            image = downscale(image, resolution)
            pixels = image.permute(0, 2, 3, 1).numpy()
            if resolution in arrays:
                arrays[resolution][len(keys) : len(keys) + len(chunk)] = pixels
            else:
                pngs[resolution] += [encode_photo(one) for one in pixels]
        keys += [f"{position:08d}" for position, _, _ in chunk]
        labels += [label for _, label, _ in chunk]
    record: dict[str, Any] = {"number": task.number, "shards": {}, "labels": labels, "skipped": skipped, "small": small}
    for resolution in task.resolutions:
        path = task.folder / str(resolution) / f"{task.number:06d}.tar"
        if resolution in arrays:
            shard = write_packed(path, arrays.pop(resolution)[: len(keys)], labels, keys)
        else:
            shard = write_shard(path, zip(keys, pngs.pop(resolution), labels, strict=True))
        record["shards"][str(resolution)] = asdict(shard)
    write_atomically(task.record, json.dumps(record).encode())
    return record


def read_squares(task: Task, skipped: list[dict[str, str]], small: list[str]) -> Iterator[tuple[int, int, np.ndarray]]:
    """(position, label, uint8 (R, R, C)) of each image, R the largest resolution.

    skipped: gets unreadable ones. small: gets those that were enlarged, with their sizes.
    """
    for position, raw in enumerate(task.images, task.start):
        try:
            image = decode(raw.read(), task.grey)
            square = cut_square(image, task.resolutions[0], task.crop)
        except (ValueError, PermissionError) as error:
            reason = "permission denied" if isinstance(error, PermissionError) else str(error)
            skipped.append({"name": raw.name, "reason": reason})
            continue
        except OSError as error:
            raise InputError(f"{raw.file} can no longer be read: {error.strerror or error}") from error
        except MemoryError as error:
            raise InputError(
                f"{raw.name} of {raw.file} takes more memory than there is: use fewer --workers, or leave it out"
            ) from error
        if min(image.size) < task.resolutions[0]:
            small.append(f"{raw.name} of {image.width}x{image.height}")
        yield position, raw.label, square
