"""The sample manifest: which images of which classes a run draws, with which settings, in which blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from cdm_lightning.foundation.class_names import numbers_in
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.network import CompileMode

if TYPE_CHECKING:
    from cdm_lightning.cascade import CascadeModule
    from cdm_lightning.data.shards import Manifest

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


@dataclass(frozen=True)
class SampleManifest:
    """Defines `count` samples: image i has class classes[i mod len(classes)] and is drawn with seed (seed, i).

    The networks run on blocks of block_size images, the last one smaller, so that no image depends on the number of
    processes. A folder of samples can only be continued with the manifest that it was begun with.
    """

    bundle: str  # SHA-256 of the stages in the bundle
    count: int
    classes: list[int]
    seed: int
    block_size: int
    levels: list[int]
    truncated: bool
    samplers: list[str]
    sampling_steps: list[int]
    precision: str = "32-true"  # of the networks: a name that Lightning takes
    start: str | None = None  # shards_digest of the stored images that the cascade continues from
    compile: str | None = None  # the torch.compile mode of the networks
    batch_sizes: list[int] | None = None  # images per network call of each stage; None: a whole block

    def block(self, number: int) -> dict[str, torch.Tensor]:
        """One block: `index` and `label`, int64 (B,), and `number`.

        Compiled networks take one size of batch alone, so there the last block is padded by its last image.
        """
        first, size = number * self.block_size, self.block_size if self.compile else self.size(number)
        index = torch.arange(first, first + size).clamp(max=self.count - 1)
        return {"index": index, "label": self.label(index), "number": torch.tensor(number)}

    def label(self, index: torch.Tensor) -> torch.Tensor:
        """The classes of the images of these indices."""
        return torch.tensor(self.classes)[index % len(self.classes)]

    def labels(self) -> torch.Tensor:
        """The classes of all images, int64 (count,)."""
        return self.label(torch.arange(self.count))

    def size(self, number: int) -> int:
        """How many images block `number` has, without padding."""
        return min(self.block_size, self.count - number * self.block_size)

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return -(-self.count // self.block_size)


def shard_name(number: int) -> str:
    """File name of the shard of one block."""
    return f"{number:06d}.tar"


def make_sample_manifest(
    cascade: CascadeModule,
    bundle: str,
    count: int,
    classes: Sequence[int] | None = None,
    block_size: int = 64,
    start: Path | None = None,
    precision: Precision = "32-true",
    compile: CompileMode | None = None,
) -> SampleManifest:
    """The manifest of `count` samples of a cascade with its current settings. Refuses arguments out of range.

    classes: None for all. A block holds `count` images at most, so that a few images cost a few.
    """
    from cdm_lightning.data.shards import read_manifest, shards_digest

    chosen = list(range(cascade.num_classes or 1)) if classes is None else list(classes)
    if not chosen:
        raise InputError("classes [] names no class")
    cascade.check_labels(torch.tensor(chosen))
    if cascade.num_classes is None and set(chosen) != {0}:
        raise InputError(f"classes {chosen} given to a cascade without classes, which calls its one class 0")
    for name, value in (("count", count), ("block_size", block_size)):
        if value < 1:
            raise InputError(f"{name} {value} is less than 1")
    diffusions = [stage.diffusion for stage in cascade.stages]
    manifest = SampleManifest(
        bundle, count, chosen, cascade.seed, min(block_size, count), cascade.levels, cascade.truncated,
        [d.sampler for d in diffusions], [d.sampling_steps or d.timesteps for d in diffusions],
        precision, shards_digest(read_manifest(start).shards) if start is not None else None, compile,
        cascade.batch_sizes,
    )  # fmt: skip
    if start is not None:
        check_start(cascade, manifest, start)
    return manifest


def check_start(cascade: CascadeModule, manifest: SampleManifest, start: Path) -> None:
    """Refuse stored images that the cascade cannot continue from: resolution, channels, classes, or too few."""
    from cdm_lightning.data.shards import read_manifest

    given, resolutions = read_manifest(start), [stage.resolution for stage in cascade.stages]
    if given.resolution not in resolutions[:-1]:
        raise InputError(f"{start} holds images of {given.resolution}: the cascade goes on from {resolutions[:-1]}")
    if given.channels != cascade.image_channels:
        raise InputError(f"{start} has {given.channels} channels, and the cascade makes {cascade.image_channels}")
    if given.count < manifest.count:
        raise InputError(f"{start} holds {given.count} images, and {manifest.count} are to be drawn from them")
    start_labels(cascade, given, start)


def start_labels(cascade: CascadeModule, given: Manifest, start: Path) -> list[int]:
    """The cascade's number of each class of stored images: by name, or by number where one side knows no names.

    A cascade without classes calls all of them 0. Raises InputError for images of a class that the cascade lacks.
    """
    if cascade.num_classes is None:
        return [0] * len(given.classes)
    names = cascade.origin["classes"]
    if names is not None and given.class_names is not None:
        return numbers_in(names, given.class_names, given.counts, start, "the cascade's classes")
    if len(given.classes) != cascade.num_classes:
        raise InputError(f"{start} has {len(given.classes)} classes, and the cascade {cascade.num_classes}")
    return list(range(cascade.num_classes))
