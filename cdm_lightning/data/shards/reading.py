"""Reading the images of shards by their places, whether stored as PNG or packed. All readers of images use this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from cdm_lightning.data.shards.folders import Folder, local_file
from cdm_lightning.data.shards.manifest import Manifest, Shard
from cdm_lightning.data.shards.packed import PackedShard
from cdm_lightning.data.shards.tar import read_shard
from cdm_lightning.foundation.addresses import NoAnswer
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import decode_png, encode_png

Report = Callable[[InputError], None]


class Images(NamedTuple):
    """Intact images as stored, uint8 (n, H, W, C), and their labels, int64 (n,), out of N that were requested.

    intact: bool (N,), which of the requested images are intact; n of them are.
    """

    image: np.ndarray
    label: np.ndarray
    intact: np.ndarray


class OpenedImages(ABC):
    """The images at a list of places, whose shards are opened and checked: PackedImages or PngImages.

    `item` is an index into that list.
    """

    def __init__(self, manifest: Manifest, report: Report | None) -> None:
        self.manifest, self.report = manifest, report

    @abstractmethod
    def key(self, item: int) -> str:
        """The key of an image. Its shard must not be damaged."""

    @abstractmethod
    def label(self, item: int) -> int:
        """The label of an image. Its shard must not be damaged. Raises InputError if the manifest has no such class."""

    @abstractmethod
    def load(self, item: int) -> tuple[np.ndarray, int]:
        """uint8 image (H, W, C) as stored, and its label. Raises InputError if the image is damaged."""

    @abstractmethod
    def lost(self, item: int) -> bool:
        """Whether the shard of an image is damaged; it has been reported then."""

    def png(self, item: int) -> bytes:
        """An image as PNG. Raises InputError if it is damaged."""
        return encode_png(self.load(item)[0])

    @abstractmethod
    def close(self) -> None:
        """Close the files and free the memory."""

    def read(self, items: Sequence[int]) -> Images:
        """The images, checked against the manifest. Reports damaged ones, or raises InputError without `report`."""
        loaded, intact = [], np.zeros(len(items), bool)
        for position, item in enumerate(items):
            if self.lost(item):
                continue
            try:
                loaded.append(self.load(item))
            except InputError as error:
                if self.report is None:
                    raise
                self.report(error)
                continue
            intact[position] = True
        image = np.stack([image for image, _ in loaded]) if loaded else np.empty((0, *self.manifest.shape), np.uint8)
        return Images(image, np.array([label for _, label in loaded], np.int64), intact)


def open_images(
    folder: Folder, manifest: Manifest, shards: Sequence[Shard], wanted: Sequence[int], report: Report | None = None
) -> OpenedImages:
    """Open the images at the places `wanted` of the concatenated `shards`, which are some of the manifest's.

    report: called with the error of each damaged shard or image; without it, the error is raised.
    """
    return (PackedImages if manifest.packed else PngImages)(folder, manifest, shards, wanted, report)


def in_batches(windows: Iterable[tuple[np.ndarray, OpenedImages]], size: int) -> Iterator[tuple[np.ndarray, Images]]:
    """Batches (places, images) of `size` places, the last one smaller, from windows of places. Closes each window."""
    parts: list[tuple[np.ndarray, Images]] = []
    collected = 0
    for places, opened in windows:
        try:
            start = 0
            while start < len(places):
                stop = min(len(places), start + size - collected)
                parts.append((places[start:stop], opened.read(range(start, stop))))
                collected, start = collected + stop - start, stop
                if collected == size:
                    yield concatenate(parts)
                    parts, collected = [], 0
        finally:
            opened.close()
    if parts:
        yield concatenate(parts)


def concatenate(parts: list[tuple[np.ndarray, Images]]) -> tuple[np.ndarray, Images]:
    """Several (places, images) as one."""
    if len(parts) == 1:
        return parts[0]
    places, images = zip(*parts, strict=True)
    return np.concatenate(places), Images(*(np.concatenate(arrays) for arrays in zip(*images, strict=True)))


class PackedImages(OpenedImages):
    """Images of packed shards: opens every shard that is needed, and reads an image when it is requested."""

    def __init__(
        self, folder: Folder, manifest: Manifest, shards: Sequence[Shard], wanted: Sequence[int], report: Report | None
    ) -> None:
        super().__init__(manifest, report)
        starts = np.cumsum([0, *(shard.count for shard in shards)])
        number = np.searchsorted(starts, wanted, side="right") - 1
        row = np.asarray(wanted, np.int64) - starts[number]
        self.number, self.row = number.tolist(), row.tolist()
        self.opened: dict[int, PackedShard] = {}
        self.files = ExitStack()  # the cache keeps what is open
        try:
            for each in sorted(set(self.number)):
                self.open(each, folder, shards[each], row[number == each])
        except BaseException:
            self.close()
            raise

    def open(self, number: int, folder: Folder, shard: Shard, rows: np.ndarray) -> None:
        """Open shard `number` and prefetch its rows. A damaged shard is reported, or raises InputError."""
        try:
            path = self.files.enter_context(local_file(folder, shard))
            self.opened[number] = PackedShard(path, shard, self.manifest)
        except NoAnswer:  # a server that fails is no damage
            raise
        except InputError as error:
            if self.report is None:
                raise
            self.report(error)
            return
        self.opened[number].prefetch(rows)

    def lost(self, item: int) -> bool:
        return self.number[item] not in self.opened

    def key(self, item: int) -> str:
        return self.opened[self.number[item]].key(self.row[item])

    def label(self, item: int) -> int:
        label = self.opened[self.number[item]].label[self.row[item]]
        if not 0 <= label < len(self.manifest.classes):
            raise self.error(item, f"has label {label}, outside 0 ... {len(self.manifest.classes) - 1}")
        return label

    def load(self, item: int) -> tuple[np.ndarray, int]:
        image, label = np.empty(self.manifest.shape, np.uint8), self.label(item)
        if what := self.opened[self.number[item]].read(self.row[item], image):
            raise self.error(item, what)
        return image, label

    def error(self, item: int, what: str) -> InputError:
        return InputError(f"image {self.key(item)} of {self.opened[self.number[item]].path} {what}")

    def close(self) -> None:
        for shard in self.opened.values():
            shard.close()
        self.files.close()


class PngImages(OpenedImages):
    """Images of shards of PNGs: loads all wanted files at once, and decodes an image when it is requested."""

    def __init__(
        self, folder: Folder, manifest: Manifest, shards: Sequence[Shard], wanted: Sequence[int], report: Report | None
    ) -> None:
        super().__init__(manifest, report)
        self.samples = read_places(folder, shards, wanted, report)

    def lost(self, item: int) -> bool:
        return not self.samples[item]

    def key(self, item: int) -> str:
        return self.samples[item]["__key__"]

    def label(self, item: int) -> int:
        return decode_label(self.samples[item], self.manifest)

    def load(self, item: int) -> tuple[np.ndarray, int]:
        return decode_sample(self.samples[item], self.manifest)

    def png(self, item: int) -> bytes:
        self.load(item)
        return self.samples[item]["png"]

    def close(self) -> None:
        self.samples = []


def read_places(
    folder: Folder,
    shards: Sequence[Shard],
    wanted: Sequence[int],
    report: Callable[[InputError], None] | None = None,
) -> list[dict[str, Any]]:
    """The undecoded samples at the places `wanted` of the concatenated shards; keeps no others in memory.

    report: called with the error of a damaged shard, whose samples are then {}; without it, the error is raised.
    """
    samples_at: dict[int, dict[str, Any]] = {}
    needed, first = set(wanted), 0
    for shard in shards:
        if any(first <= place < first + shard.count for place in needed):
            try:
                with local_file(folder, shard) as path:
                    samples = enumerate(read_shard(path, shard.count, shard.sha256), first)
                    samples_at |= {place: sample for place, sample in samples if place in needed}
            except NoAnswer:  # a server that fails is no damage
                raise
            except InputError as error:
                if report is None:
                    raise
                report(error)
        first += shard.count
    return [samples_at.get(place, {}) for place in wanted]


def decode_sample(sample: dict[str, Any], manifest: Manifest) -> tuple[np.ndarray, int]:
    """uint8 image (H, W, C) and label of a sample, checked against the manifest. Raises InputError for damage."""
    try:
        image = decode_png(sample["png"], manifest.resolution)
    except Exception as error:  # Pillow raises many kinds of error for a corrupt file
        raise InputError(f"{name_of(sample)} cannot be decoded: {type(error).__name__}: {error}") from error
    if image.shape != manifest.shape:
        raise InputError(f"{name_of(sample)} has shape {image.shape} where its manifest says {manifest.shape}")
    return image, decode_label(sample, manifest)


def decode_label(sample: dict[str, Any], manifest: Manifest) -> int:
    """The label of a sample. Raises InputError if the manifest has no such class."""
    try:
        label = int(sample["cls"])
    except Exception as error:
        raise InputError(f"{name_of(sample)} cannot be decoded: {type(error).__name__}: {error}") from error
    if not 0 <= label < len(manifest.classes):
        raise InputError(f"{name_of(sample)} has label {label}, outside 0 ... {len(manifest.classes) - 1}")
    return label


def name_of(sample: dict[str, Any]) -> str:
    """How errors name a sample: its key and its shard."""
    return f"image {sample['__key__']} of {sample['__url__']}"
