"""The points of a search: a setting of a cascade, its stored samples, and what was measured on them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cdm_lightning.cascade import CascadeModule
from cdm_lightning.cascade.bundle import origin
from cdm_lightning.data.shards import digest_of, find_folder, read_manifest, write_images
from cdm_lightning.diffusion import Sampler
from cdm_lightning.evaluation.detectors import Detector
from cdm_lightning.evaluation.metrics.features import extract, read_features
from cdm_lightning.evaluation.metrics.figures import Figure
from cdm_lightning.evaluation.metrics.measure import measure
from cdm_lightning.evaluation.real_images import first_images, real_images_of
from cdm_lightning.evaluation.references.cards import ReferenceCard, read_card
from cdm_lightning.evaluation.references.reference import make_card
from cdm_lightning.foundation.bars import Bar
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import write_atomically
from cdm_lightning.foundation.process_group import first_process, wait_for_all
from cdm_lightning.sampling.draw import draw
from cdm_lightning.sampling.manifest import NO_CLASSES, Precision, plan


@dataclass(frozen=True)
class Point:
    """A setting of the stages of a cascade up to `number`; a sampler and steps of None are the stage's own.

    kind: how its low-resolution input came about. truncated: the reverse process stopped at s. non-truncated: finished
    samples, noised to s. generated: either of the two where s = 0. real low-res: real images, reduced and noised to s.
    """

    number: int
    levels: list[int]
    kind: str
    sampler: Sampler | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Row:
    """What was measured at a point. calls: network calls an image, of all stages that ran, as far as they ran."""

    stage: str
    resolution: int
    s: int
    levels: list[int]
    kind: str
    sampler: str
    steps: int
    calls: int
    figures: list[Figure]
    folders: list[str]  # of the samples, one a seed
    compared: bool = False  # whether it belongs to the comparison of samplers and steps, not to the search over s


class LevelSearch:
    """Where the points of one search are drawn and measured; all that they share."""

    def __init__(
        self,
        cascade: CascadeModule,
        about: dict[str, Any],
        out: Path,
        shards: Path,
        split: str,
        input_split: str,
        detector: Detector,
        detector_source: str,
        n: int,
        seeds: list[int],
        block_size: int,
        precision: Precision,
        devices: int,
        accelerator: str,
    ) -> None:
        self.cascade, self.about, self.out, self.shards = cascade, about, out, shards
        self.split, self.input_split = split, input_split
        self.detector, self.detector_source = detector, detector_source
        self.n, self.seeds, self.block_size = n, seeds, min(block_size, n)
        self.precision, self.devices, self.accelerator = precision, devices, accelerator
        self.cards: dict[int, ReferenceCard] = {}

    def begin(self) -> None:
        """Write what is searched into a new folder; in one begun before, refuse to go on with another.

        The points may change: more levels, kinds, samplers or steps add points to those that are there.
        """
        stages = self.cascade.stages
        folders = {find_folder(self.shards, s, st.resolution) for s in (self.split, self.input_split) for st in stages}
        stated = {
            "bundle": self.about["stages_sha256"], "shards": str(self.shards), "split": self.split,
            "input_split": self.input_split, "detector": self.detector.name,
            "detector_sha256": self.detector.sha256, "n": self.n, "seeds": self.seeds, "precision": self.precision,
            "shards_sha256": sorted(digest_of(read_manifest(folder).shards) for folder in folders),
            "samplers": [stage.diffusion.sampler for stage in stages],
            "sampling_steps": [calls_of(stage) for stage in stages],
        }  # fmt: skip
        path = self.out / "search.json"
        if path.is_file():
            try:
                before = dict(json.loads(path.read_text()))
            except (ValueError, TypeError) as error:
                raise InputError(f"{path} is not what a search was begun with: {error}") from error
            for name, value in stated.items():
                if before.get(name) != value:
                    raise InputError(
                        f"{self.out} was begun with {name} {before.get(name)}, not {value}: choose another"
                    )
        elif first_process():
            write_atomically(path, (json.dumps(stated, indent=1) + "\n").encode())
        wait_for_all()

    def check_real_images(self) -> None:
        """Refuse real images that the points of a later stage could not be measured with, before hours are spent."""
        channels, classes = self.cascade.image_channels, self.cascade.num_classes
        asked = plan(self.cascade, "", self.n).labels().bincount(minlength=classes or 1).tolist()
        if not all(asked):
            raise InputError(f"n = {self.n} leaves out classes: a distance to images of {classes} would not be theirs")
        for stage in list(self.cascade.stages)[1:]:
            for split in dict.fromkeys((self.split, self.input_split)):
                folder = find_folder(self.shards, split, stage.resolution)
                has = read_manifest(folder)
                if has.channels != channels:
                    raise InputError(
                        f"{folder} holds images of {has.channels} channels, and the cascade makes {channels}"
                    )
                if classes is not None and len(has.classes) != classes:
                    raise InputError(f"{folder} has {len(has.classes)} classes, and the cascade makes {classes}")
            there = [has.count] if classes is None else has.counts  # of the last, the input
            for c, (number, held) in enumerate(zip(asked, there, strict=True)):
                if number > held:
                    raise InputError(
                        f"n = {self.n} asks for {number} real images of class {c}, and {folder} has {held}"
                    )

    def card(self, resolution: int) -> ReferenceCard:
        """The reference at one resolution, made where it is not there yet."""
        if resolution not in self.cards:
            path = self.out / "references" / f"{self.split}-{resolution}.safetensors"
            if not path.is_file():
                make_card(
                    self.shards, path, resolution, self.split, self.detector_source, devices=self.devices,
                    accelerator=self.accelerator, trust_detector=True,  # it was loaded before, and asked about then
                )  # fmt: skip
            wait_for_all()
            self.cards[resolution] = read_card(path)
        return self.cards[resolution]

    def measure(self, point: Point, compared: bool = False) -> Row:
        """Draw the samples of a point, one set a seed, and measure them; what is there already is not made again."""
        stage = self.cascade.stages[point.number]
        card = self.card(stage.resolution)
        own = (stage.diffusion.sampler, stage.diffusion.sampling_steps)
        stage.diffusion.sampler = point.sampler or own[0]
        stage.diffusion.sampling_steps = point.steps or own[1]
        try:
            folders = [self.samples(point, seed) for seed in self.seeds]
            sets = [self.features(folder) for folder in folders]
            stops = [*point.levels, 0] if point.kind == "truncated" else [0] * (point.number + 1)
            first = point.number if point.kind == "real low-res" else 0
            ran = zip(list(self.cascade.stages)[first : point.number + 1], stops[first:], strict=True)
            calls = sum(len(other.diffusion.sampling_grid(stop)[1]) for other, stop in ran)
            return Row(
                stage.name, stage.resolution, point.levels[-1], point.levels, point.kind, stage.diffusion.sampler,
                calls_of(stage), calls, measure(sets, card, self.detector, self.seeds[0], quick=True),
                [str(folder.parents[1]) for folder in folders], compared,
            )  # fmt: skip
        finally:
            stage.diffusion.sampler, stage.diffusion.sampling_steps = own

    def samples(self, point: Point, seed: int) -> Path:
        """The stored samples of a point for one seed: its folder of shards at the stage's resolution."""
        part = CascadeModule.of(list(self.cascade.stages)[: point.number + 1], seed)
        part.set_levels(point.levels, point.kind == "truncated")
        stage = self.cascade.stages[point.number]
        start = None
        if point.kind == "real low-res":
            start = self.real_images(point)
        elif point.kind != "truncated":
            start = self.finished(point, seed)
        name = "-".join(
            [stage.name, point.kind.replace(" ", "-"), *(f"s{s}" for s in point.levels), stage.diffusion.sampler,
             str(calls_of(stage)), f"seed{seed}"]
        )  # fmt: skip
        return self.draw(part, self.out / "points" / name, start)

    def finished(self, point: Point, seed: int) -> Path:
        """The one set of finished low-resolution samples that serves every s of a stage."""
        part = CascadeModule.of(list(self.cascade.stages)[: point.number], seed)
        part.set_levels(point.levels[:-1], False)
        name = "-".join([part.stages[-1].name, *(f"s{s}" for s in point.levels[:-1]), f"seed{seed}"])
        return self.draw(part, self.out / "low_res" / name, None)

    def real_images(self, point: Point) -> Path:
        """Real images at the stage's low resolution, of the classes of the samples, in their order."""
        resolution = self.cascade.stages[point.number].low_resolution
        folder = self.out / "real" / "train" / str(resolution)
        if first_process() and not (folder / "manifest.json").is_file():
            label, where = plan(self.cascade, "", self.n).labels(), (self.shards, self.input_split, resolution)
            if self.cascade.num_classes is None:
                images, classes = first_images(self.n, *where), NO_CLASSES
            else:
                images, classes = real_images_of(label, *where), read_manifest(find_folder(*where)).classes
            arrays, source = images.permute(0, 2, 3, 1).numpy(), f"{self.shards}/{self.input_split}"
            write_images(folder, arrays, label.numpy(), range(self.n), classes, None, source=source)
        wait_for_all()
        return folder

    def stage_folders(self, row: Row) -> list[Path]:
        """The folders of shards of a row's samples, low to high; truncated sampling keeps the last resolution alone."""
        point = Point(len(row.levels), row.levels, row.kind)
        last = Path(row.folders[0]) / "train" / str(row.resolution)
        if row.kind in ("truncated", "real low-res"):
            return [last]
        lower = self.finished(point, self.seeds[0]).parent
        return [*sorted(lower.iterdir(), key=lambda folder: int(folder.name)), last]

    def draw(self, part: CascadeModule, out: Path, start: Path | None) -> Path:
        manifest = plan(part, self.about["stages_sha256"], self.n, None, self.block_size, start, self.precision)
        return draw(part, manifest, out, start, self.devices, self.accelerator, origin(self.about))[-1]

    def features(self, folder: Path) -> torch.Tensor:
        """The detector's features of a folder of samples, (n, d)."""
        place = folder.parents[1] / f"features-{self.detector.sha256[:8]}"
        manifest = extract(
            folder.parents[1], "train", int(folder.name), self.detector, place, self.devices, self.accelerator
        )
        return torch.cat([features for features, _ in read_features(place, manifest)])


def calls_of(stage: Any) -> int:
    return stage.diffusion.sampling_steps or stage.diffusion.timesteps


def search_levels(run: LevelSearch, grids: list[list[int]], kinds: list[str]) -> tuple[list[Row], dict[str, list[int]]]:
    """The rows of all stages, low to high, and the levels of least distance per kind of truncation."""
    best: dict[str, list[int]] = {kind: [] for kind in kinds}
    rows: list[Row] = []
    for number, grid in enumerate(grids, 1):
        points, name = points_of(number, grid, best), run.cascade.stages[number].name
        found = [run.measure(point) for point in Bar(points, f"points of {name}", unit="point")]
        for kind in kinds:
            best[kind] = [*best[kind], lowest(found, kind).s]
        rows += found
    return rows, best


def level_grid(stage: Any, levels: list[int] | None) -> list[int]:
    """The levels to measure of one stage in rising order, 0 among them; 0 alone where the stage has none."""
    if not stage.augmentation.takes_level:
        return [0]
    timesteps = stage.augmentation.diffusion.timesteps
    if levels is None:
        levels = [round(timesteps * share) for share in (1 / 40, 1 / 16, 1 / 8, 1 / 4, 3 / 8)]
        levels = [min(level, stage.augmentation.max_level) for level in levels]
    return sorted({0, *levels})


def check_levels(cascade: CascadeModule, grids: list[list[int]], kinds: list[str]) -> None:
    """Refuse levels that a stage was not trained for or cannot stop at, before hours are spent."""
    if all(grid == [0] for grid in grids):
        raise InputError("there is no level s > 0 to choose: give levels, to a cascade with Gaussian augmentation")
    for number, grid in enumerate(grids):
        for level in grid:
            chosen = [0] * len(grids)
            chosen[number] = level
            cascade.set_levels(chosen, "truncated" in kinds)
            cascade.set_sampler(None, None)  # checks that the reverse process can stop there
    cascade.set_levels([0] * len(grids), False)


def check_compared(diffusion: Any, samplers: list[Sampler] | None, steps: list[int] | None) -> None:
    """Refuse samplers and numbers of steps that the last stage has no grid for."""
    own = (diffusion.sampler, diffusion.sampling_steps)
    for sampler in samplers or [own[0]]:
        for count in steps or [own[1]]:
            diffusion.sampler, diffusion.sampling_steps = sampler, count
            diffusion.sampling_grid(0)
    diffusion.sampler, diffusion.sampling_steps = own


def points_of(number: int, grid: list[int], best: dict[str, list[int]]) -> list[Point]:
    """The points of one stage: per level, each kind of generated input, and real input."""
    points = []
    for s in grid:
        lower = next(iter(best.values()))
        if not s and all(levels == lower for levels in best.values()) and not any(lower):
            points.append(Point(number, [*lower, 0], "generated"))  # at s = 0 both kinds are one law
        else:
            points += [Point(number, [*levels, s], kind) for kind, levels in best.items()]
        points.append(Point(number, [*lower, s], "real low-res"))
    return points


def lowest(rows: list[Row], kind: str) -> Row:
    """The row of least distance on generated input of that kind; at s = 0 it may belong to both kinds."""
    return min((row for row in rows if row.kind in (kind, "generated")), key=lambda row: row.figures[0].value)


def compared(
    cascade: CascadeModule, levels: list[int], kind: str, samplers: list[Sampler] | None, steps: list[int] | None
) -> list[Point]:
    """The last stage at the chosen levels, over samplers and numbers of steps."""
    if samplers is None and steps is None:
        return []
    last = cascade.stages[-1].diffusion
    every = [(a, b) for a in samplers or [last.sampler] for b in steps or [last.sampling_steps or last.timesteps]]
    return [Point(len(levels), levels, kind if any(levels) else "generated", a, b) for a, b in every]
