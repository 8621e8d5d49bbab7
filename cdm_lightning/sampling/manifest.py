"""What samples a run draws: which images of which classes, by which settings, in which blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from cdm_lightning.data.shards import read_manifest, shards_digest
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.network import CompileMode

if TYPE_CHECKING:
    from cdm_lightning.cascade import CascadeModule

NO_CLASSES = ["0"]  # as shards name the one class of samples of a cascade without classes
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


@dataclass(frozen=True)
class SampleManifest:
    """What `count` samples are: image i has class classes[i mod len(classes)] and is drawn from (seed, i).

    The network runs on blocks of block_size indices, the last one padded, so that no image depends on how blocks are
    shared out. A folder begun with one manifest is continued with no other.
    """

    bundle: str  # SHA-256 of the stages of the bundle
    count: int
    classes: list[int]
    seed: int
    block_size: int
    levels: list[int]
    truncated: bool
    samplers: list[str]
    sampling_steps: list[int]
    precision: str = "32-true"  # of the networks, in Lightning's words
    start: str | None = None  # of the stored images the cascade went on from: one hash over all shards
    compile: str | None = None  # how torch compiled the networks
    batch_sizes: list[int] | None = None  # images of a block that each stage's network works on at a time; None: all

    def block(self, number: int) -> dict[str, torch.Tensor]:
        """The padded indices and labels of one block, and its number."""
        first = number * self.block_size
        index = torch.arange(first, first + self.block_size).clamp(max=self.count - 1)
        return {"index": index, "label": self.label(index), "number": torch.tensor(number)}

    def label(self, index: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.classes)[index % len(self.classes)]

    def labels(self) -> torch.Tensor:
        return self.label(torch.arange(self.count))

    def size(self, number: int) -> int:
        return min(self.block_size, self.count - number * self.block_size)

    @property
    def blocks(self) -> int:
        return -(-self.count // self.block_size)


def shard_name(number: int) -> str:
    return f"{number:06d}.tar"


def plan(
    cascade: CascadeModule,
    bundle: str,
    count: int,
    classes: Sequence[int] | None = None,
    block_size: int = 64,
    start: Path | None = None,
    precision: Precision = "32-true",
    compile: CompileMode | None = None,
) -> SampleManifest:
    """The manifest of `count` samples of a cascade as it is set; refuses what makes no sense."""
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
        bundle, count, chosen, cascade.seed, block_size, cascade.levels, cascade.truncated,
        [d.sampler for d in diffusions], [d.sampling_steps or d.timesteps for d in diffusions],
        precision, shards_digest(read_manifest(start).shards) if start is not None else None, compile,
        cascade.batch_sizes,
    )  # fmt: skip
    if start is not None:
        check_start(cascade, manifest, start)
    return manifest


def check_start(cascade: CascadeModule, manifest: SampleManifest, start: Path) -> None:
    """Refuse stored images that the cascade cannot go on from."""
    given, resolutions = read_manifest(start), [stage.resolution for stage in cascade.stages]
    if given.resolution not in resolutions[:-1]:
        raise InputError(f"{start} holds images of {given.resolution}: the cascade goes on from {resolutions[:-1]}")
    if given.channels != cascade.image_channels:
        raise InputError(f"{start} has {given.channels} channels, and the cascade makes {cascade.image_channels}")
    if given.count < manifest.count:
        raise InputError(f"{start} holds {given.count} images, and {manifest.count} are to be drawn from them")
