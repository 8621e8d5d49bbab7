"""`cdm evaluate`: which level s of conditioning augmentation a cascade should use, measured after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cdm_lightning import InputError
from cdm_lightning.bundle import read_bundle
from cdm_lightning.cascade import CascadeModule
from cdm_lightning.diffusion import Sampler
from cdm_lightning.evaluation.detectors import Detector, load_detector
from cdm_lightning.evaluation.old_distance import add_images, frechet_distance, frechet_metric
from cdm_lightning.evaluation.reference import read_images, real_images_of
from cdm_lightning.evaluation.report import (
    Kind,
    Row,
    choose,
    conclude,
    plot_levels,
    print_table,
    store_in_bundle,
    write_results,
)
from cdm_lightning.images import to_float, to_uint8
from cdm_lightning.shards import find_folder, read_manifest
from cdm_lightning.stages import DiffusionStage

SPLIT = "val"  # of the real images, for reference and as low-resolution input


def evaluate(
    bundle: Path,
    out: Path,
    shards: Path = Path("data/fashion"),
    detector: str = "fashion-cnn-64",
    n: int = 500,
    levels: list[int] | None = None,
    truncated: bool | None = None,
    sampler: Sampler | None = None,
    sampling_steps: list[int] | None = None,
    batch_size: int = 100,
    seed: int = 0,
    store: bool = False,
) -> dict[str, Any]:
    """Measure a cascade's Fréchet distance over the levels s of its first Gaussian stage, and choose the best s > 0.

    For every s the stage is given truncated samples z_s, finished samples noised to s (one stored set for all s), and
    real low-resolution images noised to s. The whole cascade is then measured once with the chosen s. Writes
    results.json and fd_levels.png, and prints a table. Small n gives larger distances: compare equal n only.

    Args:
        bundle: A folder written by `cdm bundle`.
        out: Folder for results.json and fd_levels.png.
        shards: Root of the real images, of which the val split is used.
        detector: Name of a detector, or the path of its .safetensors file.
        n: Generated images per distance, spread evenly over the classes.
        levels: The levels to measure, such as [0,251,501]; 0 is always among them; null for 1/16, 1/8 and 1/4 of T.
        truncated: Choose s among truncated or among non-truncated samples; null for the better of both.
        sampler: ddpm, ddim or dpm++; null for each stage's own.
        sampling_steps: Network calls of each stage, such as [25,25,25]; null for each stage's own.
        batch_size: Images the network works on at a time.
        seed: Keys every random draw.
        store: Write the chosen levels and the results into the bundle.
    """
    if n < 2 or batch_size < 1:
        raise InputError(f"n = {n}, batch_size = {batch_size}: a distance takes n >= 2 images in batches of 1 or more")
    judge = load_detector(detector)
    stages, about = read_bundle(bundle)
    cascade = CascadeModule.of(stages, seed)
    cascade.set_sampler(sampler, sampling_steps)
    search = LevelSearch(cascade, judge, shards, n, batch_size, levels, about.get("levels"))
    rows = search.rows()
    chosen = choose(rows, truncated)
    final = chosen if search.number == len(stages) - 1 else search.final(chosen)
    results = {
        "rows": [asdict(row) for row in (rows if final is chosen else [*rows, final])],
        "levels": search.all_levels(chosen.s),
        "truncated": chosen.kind == "truncated",
        "conclusion": conclude(rows, chosen),
        "warning": f"{n} images do not span {judge.num_features} features" if n <= judge.num_features else None,
    }
    write_results(out, results)
    plot_levels(rows, Path(out) / "fd_levels.png")
    if store:
        store_in_bundle(bundle, results)
    print_table(rows, final, chosen)
    print(results["conclusion"], *filter(None, [results["warning"]]), sep="\n")
    return results


class LevelSearch:
    """The distances of the first stage with Gaussian augmentation, number `number`, per level and kind of input."""

    def __init__(
        self,
        cascade: CascadeModule,
        detector: Detector,
        shards: Path,
        n: int,
        batch_size: int,
        levels: Sequence[int] | None = None,
        others: Sequence[int] | None = None,
    ) -> None:
        self.whole, self.detector, self.shards = cascade, detector, shards
        self.n, self.batch_size, self.seed = n, batch_size, cascade.seed
        self.stages: list[Any] = list(cascade.stages)
        self.number = next((i for i, s in enumerate(self.stages) if s.augmentation.takes_level), 0)
        if not self.number:
            raise InputError("the cascade has no stage with Gaussian augmentation: there is no level s to choose")
        self.others = list(others) if others else [0] * (len(self.stages) - 1)  # of the stages not searched
        here = read_manifest(find_folder(shards, SPLIT, cascade.resolution)).channels
        if here != cascade.image_channels:
            made = cascade.image_channels
            raise InputError(f"{shards}/{SPLIT} holds images of {here} channels, and the cascade makes {made}")
        self.part = CascadeModule.of(self.stages[: self.number + 1], self.seed)
        self.levels = self.grid(levels)
        self.images: dict[tuple[int, Kind], torch.Tensor] = {}  # what was measured, uint8 (n, C, R, R)
        self.label = torch.arange(n) % (cascade.num_classes or 1)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.whole.to(self.device)

    def grid(self, levels: Sequence[int] | None) -> list[int]:
        """The levels to measure in rising order, 0 among them; refuses what the stages cannot take, before any work."""
        augmentation = self.stages[self.number].augmentation
        if levels is None:
            timesteps = augmentation.diffusion.timesteps
            levels = [min(timesteps // part, augmentation.max_level) for part in (16, 8, 4)]
        chosen = sorted({0, *levels})
        if chosen[-1] == 0:
            raise InputError(f"levels {list(levels)} holds no s > 0 to choose")
        for level in chosen:
            self.whole.set_levels(self.all_levels(level), True)
            self.whole.set_sampler(None, None)  # checks that the reverse process can stop there
        return chosen

    def all_levels(self, level: int) -> list[int]:
        """The levels of the whole cascade: `level` for the stage searched, the given ones or 0 for the others."""
        return [*self.others[: self.number - 1], level, *self.others[self.number :]]

    def rows(self) -> list[Row]:
        """A row per level and kind of input, each against the real images at the stage's resolution."""
        stage = self.stages[self.number]
        real = real_images_of(self.label, self.shards, SPLIT, stage.low_resolution)
        self.read_reference(stage.resolution)
        below = CascadeModule.of(self.stages[: self.number], self.seed)
        rows = []
        sets = 3 * len(self.levels)  # z_0 once; at s = 0 the two generated kinds are one law, and are measured once
        with tqdm(total=sets * -(-self.n // self.batch_size), desc=f"levels of {stage.name}", unit="batch") as bar:
            generated = self.draw(below, None, bar)
            for level in self.levels:
                kinds: dict[Kind, torch.Tensor | None] = {"non-truncated": generated, "real low-res": real}
                for kind, image in ({**kinds, "truncated": None} if level else kinds).items():
                    self.part.set_levels(self.all_levels(level)[: self.number], kind == "truncated")
                    self.images[level, kind] = self.draw(self.part, image, bar)
                    rows.append(self.row(stage, level, kind, self.distance(self.images[level, kind])))
                if not level:
                    rows.append(self.row(stage, level, "truncated", rows[0].distance))
        return rows

    def final(self, chosen: Row) -> Row:
        """The row of the whole cascade at its last resolution, which goes on from the images of the chosen row."""
        truncated = chosen.kind == "truncated"
        self.whole.set_levels(self.all_levels(chosen.s), truncated)
        stops_again = truncated and any(self.whole.levels[self.number :])  # then the chosen row's are not what goes on
        image = None if stops_again else self.images[chosen.s, chosen.kind]
        self.read_reference(self.whole.resolution)
        with tqdm(total=-(-self.n // self.batch_size), desc="the whole cascade", unit="batch") as bar:
            distance = self.distance(self.draw(self.whole, image, bar))
        return self.row(self.stages[-1], chosen.s, chosen.kind, distance)

    def read_reference(self, resolution: int) -> None:
        """Fill the metric with the real images at this resolution."""
        self.metric = frechet_metric(self.detector).to(self.device)
        for image, _ in read_images(self.shards, SPLIT, resolution, 500):
            add_images(self.metric, image.to(self.device), real=True)

    def draw(self, cascade: CascadeModule, image: torch.Tensor | None, bar: Any) -> torch.Tensor:
        """uint8 (n, C, R, R): the cascade's images of its last resolution, from `image` (clean, uint8) on if given."""
        cascade.to(self.device)
        drawn = []
        for index in torch.arange(self.n).split(self.batch_size):
            given = None if image is None else to_float(image[index]).to(self.device)
            samples = cascade.sample(self.label[index].to(self.device), index, given)
            drawn.append(to_uint8(samples[-1]).cpu())
            bar.update()
        return torch.cat(drawn)

    def distance(self, image: torch.Tensor) -> float:
        """From the reference to uint8 (n, C, R, R)."""
        self.metric.reset()
        for batch in image.split(500):
            add_images(self.metric, batch.to(self.device), real=False)
        return frechet_distance(self.metric, int(self.metric.real_features_num_samples), self.n)

    def row(self, stage: DiffusionStage, s: int, kind: Kind, distance: float) -> Row:
        ran = [stage] if kind == "real low-res" else self.stages[: self.stages.index(stage) + 1]
        return Row(
            stage=stage.name,
            resolution=stage.resolution,
            s=s,
            kind=kind,
            distance=round(distance, 6),
            detector=self.detector.name,
            detector_sha256=self.detector.sha256,
            n=self.n,
            n_reference=int(self.metric.real_features_num_samples),
            seed=self.seed,
            sampler=[other.diffusion.sampler for other in ran],
            sampling_steps=[other.diffusion.sampling_steps or other.diffusion.timesteps for other in ran],
        )
