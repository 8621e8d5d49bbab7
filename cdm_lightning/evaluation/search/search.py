"""`cdm search`: choose the level s, truncation, sampler and number of steps of a trained cascade."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from cdm_lightning.diffusion import Sampler
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import check_output_folder
from cdm_lightning.foundation.process_group import Accelerator, first_process
from cdm_lightning.sampling.manifest import Precision


def search(
    bundle: Path,
    out: Path,
    shards: Path = Path("data/fashion"),
    split: str = "val",
    input_split: str = "train",
    detector: str = "fashion-cnn-64",
    n: int = 2000,
    repeats: int = 1,
    levels: list[int] | None = None,
    stages: list[str] | None = None,
    truncated: bool | None = None,
    real: bool = True,
    sampler: Sampler | None = None,
    sampling_steps: list[int] | None = None,
    samplers: list[Sampler] | None = None,
    steps: list[int] | None = None,
    store: bool = False,
    trust_detector: bool = False,
    block_size: PositiveInt = 100,
    precision: Precision = "32-true",
    seed: int = 0,
    devices: PositiveInt = 1,
    accelerator: Accelerator = "auto",
) -> dict[str, Any]:
    """Measure each super-resolution stage over s, on generated and on real low-resolution images, and choose s.

    Where there is no s to choose, as with blur, this measures the gap between generated and real input alone. Without
    truncation, all levels s use one stored set of low-resolution samples. At the chosen s, the last stage is
    then measured over `samplers` and `steps`, if given. Every point of the search is a folder of samples, which
    `cdm evaluate` can measure again with another detector. Prints a table and, in a sentence, what the augmentation
    did; writes results.json, report.html, curve.png (distance over s) and levels.png (the same samples at s = 0 and at
    the chosen s). If it is stopped, the same command continues.

    Args:
        bundle: A folder written by `cdm bundle`.
        out: Folder for the samples, results.json, report.html, curve.png and levels.png.
        shards: Root of the real images.
        split: Split of the real images that samples are compared with.
        input_split: Split of the real images used as low-resolution input. It should not be `split`: samples made from
            the reference images have too small distances.
        detector: Name of a detector, or the path of its file.
        n: Samples per point, spread evenly over the classes.
        repeats: Sets of n samples per point, with different seeds; three or more give error bars.
        levels: The levels s to measure, such as [1001,2001]; the least of the training, 0, is always included, and []
            measures it alone. null for 1/16, 1/8, 1/4, 1/2, 3/4 and 7/8 of T.
        stages: The stages whose level is searched, such as [sr32]; the others keep the bundle's. null for all.
        truncated: true measures only truncated sampling, false only non-truncated; null for both.
        real: Measure real low-resolution images as input too, for the cascade gap.
        sampler: ddpm, ddim or dpm++ in all stages during the search over s; null for each stage's own.
        sampling_steps: Network calls of each stage during the search over s; null for each stage's own.
        samplers: Samplers to compare at the chosen s.
        steps: Numbers of steps to compare at the chosen s.
        store: Write the chosen levels and their figures into the bundle.
        trust_detector: Allow a TorchScript that is not the canonical Inception; it is run as a program.
        block_size: Images per network call.
        precision: Of the networks while sampling: 32-true, bf16-mixed or 16-mixed.
        seed: The first seed of the samples.
        devices: Number of processes.
        accelerator: cpu, gpu or auto.
    """
    if n < 4 or repeats < 1:
        raise InputError(f"n = {n}, repeats = {repeats}: a point takes 4 images or more, of 1 seed or more")
    from cdm_lightning.cascade import CascadeModule
    from cdm_lightning.cascade.bundle import read_bundle
    from cdm_lightning.evaluation.detectors import load_detector
    from cdm_lightning.evaluation.search.finding import rows_side_by_side
    from cdm_lightning.evaluation.search.level_search import (
        LevelSearch,
        best_row,
        check_comparison,
        check_levels,
        comparison_points,
        level_grids,
        search_levels,
    )
    from cdm_lightning.evaluation.search.report import print_rows, store_in_bundle, write_search
    from cdm_lightning.sampling.shared_work import make_trainer

    check_output_folder(out)
    make_trainer(devices, accelerator)  # refuses a device that is not there, before anything is written
    network = load_detector(detector, trust_detector)
    parts, metadata = read_bundle(bundle)
    cascade = CascadeModule.from_stages(parts, seed)
    cascade.take_origin(metadata)
    cascade.set_levels(metadata.get("levels") or cascade.levels, False)
    cascade.set_sampler(sampler, sampling_steps)
    run = LevelSearch(
        cascade, metadata, Path(out), Path(shards), split, input_split, network, detector, n,
        list(range(seed, seed + repeats)), block_size, precision, devices, accelerator,
    )  # fmt: skip
    kinds = [kind for kind, wanted in (("truncated", True), ("non-truncated", False)) if truncated in (None, wanted)]
    grids = level_grids(cascade, levels, stages)
    check_levels(cascade, grids, kinds)
    check_comparison(parts[-1].diffusion, samplers, steps)
    run.check_images()
    run.begin()
    rows, best = search_levels(run, grids, kinds, real)
    kind = min(kinds, key=lambda k: best_row([r for r in rows if r.stage == parts[-1].name], k).figures[0].value)
    # The last stage with a choice of s; the last stage, if none has one.
    last_choice = max((number for number, grid in enumerate(grids) if len(grid) > 1), default=len(grids) - 1)
    chosen = best_row(
        [r for r in rows if r.stage == parts[last_choice + 1].name and r.s == best[kind][last_choice]], kind
    )
    rows += [
        run.measure(point, compared=True) for point in comparison_points(cascade, best[kind], kind, samplers, steps)
    ]
    last = next(r for r in rows if not r.compared and r.levels == best[kind] and r.kind in (kind, "generated"))
    # These may draw samples or measure images, so every process must call them.
    shown = run.stage_folders(last)
    low_res = run.stage_folders(rows_side_by_side(rows, chosen)[-1])[:-1][-1:]
    floor = run.floor(chosen.resolution)
    if not first_process():
        return {}
    print_rows(rows, chosen)
    results = write_search(run, rows, chosen, last, best[kind], kind, shown, low_res, floor)
    if store:
        store_in_bundle(bundle, results)
    return results
