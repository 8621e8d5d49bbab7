"""Feature extraction: runs a detector over a folder of shards, on any number of processes, resumable."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from torch.utils.data import DataLoader

from cdm_lightning.data.shards import Manifest, find_folder, read_manifest
from cdm_lightning.evaluation.detectors import Detector, features_of
from cdm_lightning.evaluation.real_images import stream_shards
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import read_table, write_atomically
from cdm_lightning.foundation.process_group import first_process, wait_for_all
from cdm_lightning.foundation.progress_bar import ProgressBar
from cdm_lightning.sampling.shared_work import EndOnSigterm, join_processes, make_trainer


def extract_features(
    root: Path,
    split: str,
    resolution: int,
    detector: Detector,
    out: Path,
    devices: int = 1,
    accelerator: str = "auto",
    batch_size: int = 50,
    count: int | None = None,
) -> Manifest:
    """Write the detector's features of the images of <root>/<split>, reduced to `resolution`: one file per shard.

    Each process takes whole shards, and no batch crosses a shard, so that the features are the same bits for any number
    of processes. If it is stopped, the same call continues. Another batch size changes features by float error only.
    Refuses an `out` with features of other images or of another detector. With several devices, every process
    returns when the last one is done.

    count: how many images to measure, from the first; None for all. The returned manifest lists their shards.
    """
    for name, number in (("batch_size", batch_size), ("devices", devices)):
        if number < 1:
            raise InputError(f"{name} is {number}: it must be at least 1")
    join_processes()
    folder = find_folder(root, split, resolution)
    manifest = read_manifest(folder)
    sizes = shares(manifest, manifest.count if count is None else count)
    manifest = replace(manifest, shards=manifest.shards[: len(sizes)])
    settings = {"detector": detector.sha256, "resolution": resolution, "shards": [s.sha256 for s in manifest.shards]}
    settings |= {"count": sum(sizes)}
    trainer = make_trainer(devices, accelerator, callbacks=[EndOnSigterm()], default_root_dir=out)
    settings_file, begun = Path(out) / "about.json", any(Path(out).glob("*.safetensors"))
    if first_process() and not (begun and settings_file.is_file()):
        write_atomically(settings_file, json.dumps(settings).encode())
    wait_for_all()
    if {"count": sum(sizes), **read_table(settings_file)} != settings:
        raise InputError(
            f"{out} holds features of other images or of another detector: give another folder, or remove it"
        )
    todo = [n for n, size in enumerate(sizes) if not finished(feature_file(out, n), size)]
    wait_for_all()  # all processes must list the missing shards before one of them writes
    if todo:
        extractor = FeatureExtractor(folder, manifest, sizes, resolution, detector, out, batch_size)
        trainer.predict(extractor, datamodule=ShardNumbers(todo), return_predictions=False)
        wait_for_all()  # the caller reads the features of all processes
    return manifest


def shares(manifest: Manifest, count: int) -> list[int]:
    """How many of the first `count` images lie in each shard; shards without one are left out."""
    ends = accumulate(shard.count for shard in manifest.shards)
    sizes = [shard.count - max(0, end - count) for shard, end in zip(manifest.shards, ends, strict=True)]
    return [size for size in sizes if size > 0]


def feature_file(out: Path, number: int) -> Path:
    """The file with the features of one shard."""
    return Path(out) / f"{number:06d}.safetensors"


def finished(path: Path, count: int) -> bool:
    """Whether a file of features is complete, with `count` images. Prints a message for a damaged one."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as stored:  # checks the length that the header states
            shapes = [stored.get_slice(name).get_shape() for name in ("features", "label")]
        whole = len(shapes[0]) == 2 and shapes[0][0] == count and shapes[1] == [count]
    except (SafetensorError, OSError):
        whole = False
    if not whole and first_process():
        print(f"{path} is damaged or foreign, and is made again")
    return whole


def read_features(out: Path, manifest: Manifest) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(features, float32 (n, d), labels, int64 (n,)) of each shard, in the order of the manifest."""
    for number in range(len(manifest.shards)):
        with safe_open(feature_file(out, number), "pt") as stored:
            yield stored.get_tensor("features"), stored.get_tensor("label")


class ShardNumbers(L.LightningDataModule):
    """The numbers of the shards to measure; each of n processes takes every n-th."""

    trainer: L.Trainer  # type: ignore[assignment]  # Lightning attaches it before it calls anything here

    def __init__(self, todo: list[int]) -> None:
        super().__init__()
        self.todo = todo
        self.allow_zero_length_dataloader_with_multiple_devices = True  # there may be fewer shards than processes

    def predict_dataloader(self) -> DataLoader:
        numbers: Any = self.todo[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(numbers, batch_size=None)


class FeatureExtractor(L.LightningModule):
    """Runs the detector over one shard per step, and writes its features. sizes: images to measure of each shard."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        sizes: list[int],
        resolution: int,
        detector: Detector,
        out: Path,
        batch_size: int,
    ) -> None:
        super().__init__()
        self.folder, self.manifest, self.sizes, self.resolution = folder, manifest, sizes, resolution
        self.detector, self.out, self.batch_size = detector, out, batch_size
        self.bar: Any = None

    def on_predict_start(self) -> None:
        total = sum(self.sizes[n] for n in self.trainer.datamodule.todo)  # type: ignore[attr-defined]  # untyped there
        self.bar = ProgressBar(
            total=total, desc=f"{self.detector.name}", unit="image", disable=not self.trainer.is_global_zero
        )

    def predict_step(self, number: torch.Tensor | int, batch_idx: int) -> None:
        """Write the features of one shard."""
        shards, size = [self.manifest.shards[int(number)]], self.sizes[int(number)]
        features, labels = [], []
        for image, label in stream_shards(self.folder, self.manifest, shards, self.resolution, self.batch_size, size):
            features.append(features_of(self.detector, image.to(self.device)).cpu())
            labels.append(label)
            self.bar.update(len(image) * self.trainer.world_size)
        tensors = {"features": torch.cat(features), "label": torch.cat(labels)}
        write_atomically(feature_file(self.out, int(number)), save_safetensors(tensors))

    def on_predict_end(self) -> None:
        self.bar.close()
