"""The search over s: its points (settings of a cascade), their stored samples, and their figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cdm_lightning.cascade import CascadeModule
from cdm_lightning.data.shards import find_folder, read_manifest, shards_digest, write_images
from cdm_lightning.diffusion import Sampler
from cdm_lightning.evaluation.detectors import Detector, check_channels
from cdm_lightning.evaluation.metrics.distance import FrechetDistanceTo
from cdm_lightning.evaluation.metrics.features import extract_features, read_features
from cdm_lightning.evaluation.metrics.measure import measure
from cdm_lightning.evaluation.metrics.measurements import Figure
from cdm_lightning.evaluation.real_images import first_images, real_images_for_labels
from cdm_lightning.evaluation.references.cards import ReferenceCard, read_card
from cdm_lightning.evaluation.references.reference import make_card
from cdm_lightning.foundation.class_names import NO_CLASSES, check_same_classes
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import begin_folder
from cdm_lightning.foundation.process_group import first_process, wait_for_all
from cdm_lightning.foundation.progress_bar import ProgressBar
from cdm_lightning.sampling.draw_blocks import draw
from cdm_lightning.sampling.manifest import Precision, make_sample_manifest


@dataclass(frozen=True)
class Point:
    """A setting of the stages 0 ... `number` of a cascade. sampler, steps: of stage `number`; None keeps its own.

    kind: the low-resolution input of stage `number`. truncated: samples of a reverse process stopped at s.
    non-truncated: finished samples with noise of level s. generated: finished samples at s = 0, where both are equal.
    real low-res: real images, reduced, with noise of level s.
    """

    number: int
    levels: list[int]
    kind: str
    sampler: Sampler | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Row:
    """The figures of a point. calls: network calls per image, over all stages that ran."""

    stage: str
    resolution: int
    s: int
    levels: list[int]
    kind: str
    sampler: str
    steps: int
    calls: int
    figures: list[Figure]
    folders: list[str]  # of the samples, one per seed
    compared: bool = False  # part of the comparison of samplers and steps, not of the search over s


class LevelSearch:
    """One search: draws and measures its points in the folder `out`, and holds the settings that they share.

    metadata: of the bundle. split, input_split: of the real images to compare with, and to use as input.
    detector_source: the name or path of the detector.
    """

    def __init__(
        self,
        cascade: CascadeModule,
        metadata: dict[str, Any],
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
        self.cascade, self.metadata, self.out, self.shards = cascade, metadata, out, shards
        self.split, self.input_split = split, input_split
        self.detector, self.detector_source = detector, detector_source
        self.n, self.seeds, self.block_size = n, seeds, block_size
        self.precision, self.devices, self.accelerator = precision, devices, accelerator
        self.cards: dict[int, ReferenceCard] = {}

    def begin(self) -> None:
        """Write the settings of the search into a new folder. Refuses a folder that was begun with other settings.

        The points are not settings: further levels, kinds, samplers or steps can be added later.
        """
        stages = self.cascade.stages
        folders = {find_folder(self.shards, s, st.resolution) for s in (self.split, self.input_split) for st in stages}
        settings = {
            "bundle": self.metadata["stages_sha256"], "shards": str(self.shards), "split": self.split,
            "input_split": self.input_split, "detector": self.detector.name,
            "detector_sha256": self.detector.sha256, "n": self.n, "seeds": self.seeds, "precision": self.precision,
            "shards_sha256": sorted(shards_digest(read_manifest(folder).shards) for folder in folders),
            "samplers": [stage.diffusion.sampler for stage in stages],
            "sampling_steps": [network_calls(stage) for stage in stages],
        }  # fmt: skip
        begun = any(self.out.rglob("*.tar")) or any(self.out.rglob("*.safetensors"))  # samples, cards or features
        begin_folder(self.out, settings, begun, "search.json")
        wait_for_all()

    def check_images(self) -> None:
        """Refuse a detector or real images that do not suit the stages, before hours are spent."""
        channels, classes = self.cascade.image_channels, self.cascade.num_classes
        needed = make_sample_manifest(self.cascade, "", self.n).labels().bincount(minlength=classes or 1).tolist()
        if not all(needed):
            raise InputError(f"n = {self.n} leaves out some of the {classes} classes that the real images have")
        for stage in list(self.cascade.stages)[1:]:
            for split in dict.fromkeys((self.split, self.input_split)):
                folder = find_folder(self.shards, split, stage.resolution)
                manifest = read_manifest(folder)
                if manifest.channels != channels:
                    raise InputError(
                        f"{folder} holds images of {manifest.channels} channels, and the cascade makes {channels}"
                    )
                if classes is not None and len(manifest.classes) != classes:
                    raise InputError(f"{folder} has {len(manifest.classes)} classes, and the cascade makes {classes}")
                check_same_classes(self.cascade.origin["classes"], manifest.classes, "the cascade", folder)
            available = [manifest.count] if classes is None else manifest.counts  # of the last split, the input
            for c, (number, held) in enumerate(zip(needed, available, strict=True)):
                if number > held:
                    raise InputError(
                        f"n = {self.n} asks for {number} real images of class {c}, and {folder} has {held}"
                    )
        check_channels(self.detector, channels)

    def card(self, resolution: int) -> ReferenceCard:
        """The reference card at one resolution; measures the real images if it does not exist yet."""
        if resolution not in self.cards:
            self.cards[resolution] = self.stored_card(f"{self.split}-{resolution}", resolution, self.split)
        return self.cards[resolution]

    def stored_card(self, name: str, resolution: int, split: str, count: int | None = None) -> ReferenceCard:
        """A card in the folder of the search, of the first `count` real images of a split; None for all."""
        path = self.out / "references" / f"{name}.safetensors"
        if not path.is_file():
            make_card(
                self.shards, path, resolution, split, self.detector_source, count=count, devices=self.devices,
                accelerator=self.accelerator, trust_detector=True,  # it was loaded before, and checked then
            )  # fmt: skip
        wait_for_all()
        return read_card(path)

    def floor(self, resolution: int) -> float | None:
        """The Fréchet distance of n real images of the input split: about the least that n samples can reach.

        None if they are compared with their own split, of which they would be a part.
        """
        if self.input_split == self.split:
            return None
        real = self.stored_card(f"{self.input_split}-{resolution}-first{self.n}", resolution, self.input_split, self.n)
        return FrechetDistanceTo(self.card(resolution).moments)(real.moments)

    def measure(self, point: Point, compared: bool = False) -> Row:
        """Draw the samples of a point, one set per seed, and measure them. Stored results are used again."""
        stage = self.cascade.stages[point.number]
        card = self.card(stage.resolution)
        original = (stage.diffusion.sampler, stage.diffusion.sampling_steps)
        stage.diffusion.sampler = point.sampler or original[0]
        stage.diffusion.sampling_steps = point.steps or original[1]
        try:
            folders = [self.samples(point, seed) for seed in self.seeds]
            sets = [self.features(folder) for folder in folders]
            stops = [*point.levels, 0] if point.kind == "truncated" else [0] * (point.number + 1)
            first = point.number if point.kind == "real low-res" else 0
            ran = zip(list(self.cascade.stages)[first : point.number + 1], stops[first:], strict=True)
            calls = sum(len(other.diffusion.sampling_grid(stop)[1]) for other, stop in ran)
            return Row(
                stage.name, stage.resolution, point.levels[-1], point.levels, point.kind, stage.diffusion.sampler,
                network_calls(stage), calls, measure(sets, card, self.detector, self.seeds[0], quick=True),
                [str(folder.parents[1]) for folder in folders], compared,
            )  # fmt: skip
        finally:
            stage.diffusion.sampler, stage.diffusion.sampling_steps = original

    def samples(self, point: Point, seed: int) -> Path:
        """The folder of shards with the samples of a point for one seed, drawn if needed."""
        part = CascadeModule.from_stages(list(self.cascade.stages)[: point.number + 1], seed)
        part.set_levels(point.levels, point.kind == "truncated")
        stage = self.cascade.stages[point.number]
        start = None
        if point.kind == "real low-res":
            start = self.real_images(point)
        elif point.kind != "truncated":
            start = self.low_res_samples(point, seed)
        name = "-".join(
            [stage.name, point.kind.replace(" ", "-"), *(f"s{s}" for s in point.levels), stage.diffusion.sampler,
             str(network_calls(stage)), f"seed{seed}"]
        )  # fmt: skip
        return self.draw(part, self.out / "points" / name, start)

    def low_res_samples(self, point: Point, seed: int) -> Path:
        """The finished low-resolution samples for one seed, which all levels s of a stage share."""
        part = CascadeModule.from_stages(list(self.cascade.stages)[: point.number], seed)
        part.set_levels(point.levels[:-1], False)
        name = "-".join([part.stages[-1].name, *(f"s{s}" for s in point.levels[:-1]), f"seed{seed}"])
        return self.draw(part, self.out / "low_res" / name, None)

    def real_images(self, point: Point) -> Path:
        """A folder of real images at the stage's low resolution; image i has the class of sample i."""
        resolution = self.cascade.stages[point.number].low_resolution
        folder = self.out / "real" / "train" / str(resolution)
        if first_process() and not (folder / "manifest.json").is_file():
            label, where = (
                make_sample_manifest(self.cascade, "", self.n).labels(),
                (self.shards, self.input_split, resolution),
            )
            if self.cascade.num_classes is None:
                images, classes = first_images(self.n, *where), NO_CLASSES
            else:
                images, classes = real_images_for_labels(label, *where), read_manifest(find_folder(*where)).classes
            arrays, source = images.permute(0, 2, 3, 1).numpy(), f"{self.shards}/{self.input_split}"
            write_images(folder, arrays, label.numpy(), range(self.n), classes, None, source=source)
        wait_for_all()
        return folder

    def stage_folders(self, row: Row) -> list[Path]:
        """The shard folders of a row's samples, low to high; only the last resolution in truncated sampling."""
        point = Point(len(row.levels), row.levels, row.kind)
        last = Path(row.folders[0]) / "train" / str(row.resolution)
        if row.kind in ("truncated", "real low-res"):
            return [last]
        lower = self.low_res_samples(point, self.seeds[0]).parent
        return [*sorted(lower.iterdir(), key=lambda folder: int(folder.name)), last]

    def draw(self, part: CascadeModule, out: Path, start: Path | None) -> Path:
        """Draw n samples of a part of the cascade; gives the folder of their highest resolution."""
        part.origin = self.cascade.origin
        manifest = make_sample_manifest(
            part, self.metadata["stages_sha256"], self.n, None, self.block_size, start, self.precision
        )
        return draw(part, manifest, out, start, self.devices, self.accelerator)[-1]

    def features(self, folder: Path) -> torch.Tensor:
        """The detector's features of a folder of samples, float32 (n, d)."""
        place = folder.parents[1] / f"features-{self.detector.sha256[:8]}"
        manifest = extract_features(
            folder.parents[1], "train", int(folder.name), self.detector, place, self.devices, self.accelerator
        )
        return torch.cat([features for features, _ in read_features(place, manifest)])


def network_calls(stage: Any) -> int:
    """Network calls per image of a full reverse process."""
    return stage.diffusion.sampling_steps or stage.diffusion.timesteps


def search_levels(
    run: LevelSearch, grids: list[list[int]], kinds: list[str], real: bool = True
) -> tuple[list[Row], dict[str, list[int]]]:
    """Search stage by stage: the rows of all stages, low to high, and for each kind the levels of least distance.

    real: also measure real low-resolution input.
    """
    best: dict[str, list[int]] = {kind: [] for kind in kinds}
    rows: list[Row] = []
    for number, grid in enumerate(grids, 1):
        points, name = stage_points(number, grid, best, real), run.cascade.stages[number].name
        stage_rows = [run.measure(point) for point in ProgressBar(points, f"points of {name}", unit="point")]
        for kind in kinds:
            best[kind] = [*best[kind], best_row(stage_rows, kind).s]
        rows += stage_rows
    return rows, best


def level_grids(cascade: CascadeModule, levels: list[int] | None, searched: list[str] | None) -> list[list[int]]:
    """The levels to measure for each super-resolution stage, in rising order, from its least level, 0, on.

    A stage without Gaussian augmentation has the level 0 alone, and one that is not searched the cascade's own level.
    levels: None for a default grid of up to 7/8 of T. searched: names of stages; None for all.
    """
    stages = list(cascade.stages)[1:]
    names = [stage.name for stage in stages]
    if wrong := [name for name in searched or [] if name not in names]:
        raise InputError(
            f"stages {wrong[0]} is no super-resolution stage of this cascade, which has {', '.join(names)}"
        )
    if levels and not any(s.augmentation.takes_level for s in stages if searched is None or s.name in searched):
        raise InputError(f"levels {levels} are for stages with Gaussian augmentation, and none is searched")
    return [
        level_grid(stage, levels) if searched is None or stage.name in searched else [own]
        for stage, own in zip(stages, cascade.levels, strict=True)
    ]


def level_grid(stage: Any, levels: list[int] | None) -> list[int]:
    """The levels to measure for one stage, as `level_grids` gives them."""
    if not stage.augmentation.takes_level:
        return [0]
    if levels is None:
        timesteps, highest = stage.augmentation.diffusion.timesteps, stage.augmentation.max_level
        levels = [round(timesteps * share) for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8)]
        levels = [min(max(level, stage.least_level), highest) for level in levels]
    return sorted({stage.least_level, *levels})


def check_levels(cascade: CascadeModule, grids: list[list[int]], kinds: list[str]) -> None:
    """Refuse levels that a stage was not trained for, or that its sampler cannot stop at, before hours are spent."""
    if not grids:
        raise InputError(
            "a cascade of one stage takes no low-resolution input: `cdm sample` and `cdm evaluate` measure it"
        )
    own = cascade.levels
    for number, grid in enumerate(grids):
        for level in grid:
            cascade.set_levels([*own[:number], level, *own[number + 1 :]], "truncated" in kinds)
            cascade.set_sampler(None, None)  # checks that the reverse process can stop there
    cascade.set_levels(own, False)


def check_comparison(diffusion: Any, samplers: list[Sampler] | None, steps: list[int] | None) -> None:
    """Refuse samplers and numbers of steps for which the last stage has no time grid."""
    original = (diffusion.sampler, diffusion.sampling_steps)
    for sampler in samplers or [original[0]]:
        for count in steps or [original[1]]:
            diffusion.sampler, diffusion.sampling_steps = sampler, count
            diffusion.sampling_grid(0)
    diffusion.sampler, diffusion.sampling_steps = original


def stage_points(number: int, grid: list[int], best: dict[str, list[int]], real: bool) -> list[Point]:
    """The points of one stage: for each level, every kind of generated input, and real input if `real`."""
    points = []
    for s in grid:
        lower = next(iter(best.values()))
        if not s and all(levels == lower for levels in best.values()) and not any(lower):
            points.append(Point(number, [*lower, 0], "generated"))  # at s = 0 both kinds are the same distribution
        else:
            points += [Point(number, [*levels, s], kind) for kind, levels in best.items()]
        if real:
            points.append(Point(number, [*lower, s], "real low-res"))
    return points


def best_row(rows: list[Row], kind: str) -> Row:
    """The row of least distance among those with generated input of this kind; rows at s = 0 count for both kinds."""
    return min((row for row in rows if row.kind in (kind, "generated")), key=lambda row: row.figures[0].value)


def comparison_points(
    cascade: CascadeModule, levels: list[int], kind: str, samplers: list[Sampler] | None, steps: list[int] | None
) -> list[Point]:
    """The points that compare samplers and numbers of steps in the last stage, at the chosen levels."""
    if samplers is None and steps is None:
        return []
    last = cascade.stages[-1].diffusion
    pairs = [(a, b) for a in samplers or [last.sampler] for b in steps or [last.sampling_steps or last.timesteps]]
    return [Point(len(levels), levels, kind if any(levels) else "generated", a, b) for a, b in pairs]
