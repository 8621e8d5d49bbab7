"""`cdm search`: which level s, kind of truncation, sampler and number of steps a trained cascade should use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from cdm_lightning.diffusion import Sampler
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.process_group import first_process
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
    truncated: bool | None = None,
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
    accelerator: str = "auto",
) -> dict[str, Any]:
    """Measure FID(s) of every super-resolution stage, on generated and on real low-resolution images, and choose s.

    One set of finished low-resolution samples is stored and serves every s without truncation. At the chosen s the
    stage is then measured over `samplers` and `steps`, where given. Every point is a folder of samples, which
    `cdm evaluate` can measure again with another detector. Writes results.json and report.html, and prints a table.
    Stopped and called again with the same options, it goes on where it was.

    Args:
        bundle: A folder written by `cdm bundle`.
        out: Folder for the samples, results.json and report.html.
        shards: Root of the real images.
        split: Of the real images, for reference.
        input_split: Of the real images that serve as low-resolution input; a reference that holds them flatters them.
        detector: Name of a detector, or the path of its file.
        n: Generated images of a point, spread evenly over the classes.
        repeats: Seeds of a point; three or more give the distances an error bar.
        levels: The levels s to measure, such as [251,501]; 0 is always among them; null for 1/40, 1/16, 1/8, 1/4 and
            3/8 of T.
        truncated: Measure truncated sampling alone, or non-truncated alone; null for both.
        sampler: ddpm, ddim or dpm++ in all stages during the search over s; null for each stage's own.
        sampling_steps: Network calls of each stage during the search over s; null for each stage's own.
        samplers: Samplers to compare at the chosen s.
        steps: Numbers of steps to compare at the chosen s.
        store: Write the chosen levels, and what was measured, into the bundle.
        trust_detector: Run a detector's TorchScript that this project does not know.
        block_size: Images the network works on at a time.
        precision: Of the networks while sampling: 32-true, bf16-mixed or 16-mixed.
        seed: The first of the seeds of the samples.
        devices: Processes to share the work.
        accelerator: cpu, gpu or auto.
    """
    if n < 4 or repeats < 1:
        raise InputError(f"n = {n}, repeats = {repeats}: a point takes 4 images or more, of 1 seed or more")
    from cdm_lightning.cascade import CascadeModule
    from cdm_lightning.cascade.bundle import read_bundle
    from cdm_lightning.evaluation.detectors import load_detector
    from cdm_lightning.evaluation.search.level_search import (
        LevelSearch,
        check_compared,
        check_levels,
        compared,
        level_grid,
        lowest,
        search_levels,
    )
    from cdm_lightning.evaluation.search.report import print_rows, store_in_bundle, write_search

    judge = load_detector(detector, trust_detector)
    stages, about = read_bundle(bundle)
    cascade = CascadeModule.of(stages, seed)
    cascade.set_sampler(sampler, sampling_steps)
    run = LevelSearch(
        cascade, about, Path(out), Path(shards), split, input_split, judge, detector, n,
        list(range(seed, seed + repeats)), block_size, precision, devices, accelerator,
    )  # fmt: skip
    kinds = [kind for kind, wanted in (("truncated", True), ("non-truncated", False)) if truncated in (None, wanted)]
    grids = [level_grid(stage, levels) for stage in stages[1:]]
    check_levels(cascade, grids, kinds)
    check_compared(stages[-1].diffusion, samplers, steps)
    run.check_real_images()
    run.begin()
    rows, best = search_levels(run, grids, kinds)
    kind = min(kinds, key=lambda k: lowest([r for r in rows if r.stage == stages[-1].name], k).figures[0].value)
    noisy = max(number for number, grid in enumerate(grids) if len(grid) > 1)  # the last stage with a choice of s
    chosen = lowest([r for r in rows if r.stage == stages[noisy + 1].name and r.s == best[kind][noisy]], kind)
    rows += [run.measure(point, compared=True) for point in compared(cascade, best[kind], kind, samplers, steps)]
    last = next(r for r in rows if not r.compared and r.levels == best[kind] and r.kind in (kind, "generated"))
    shown = run.stage_folders(last)  # which may draw, so that every process takes part
    if not first_process():
        return {}
    print_rows(rows, chosen)
    results = write_search(run, rows, chosen, last, best[kind], kind, shown)
    if store:
        store_in_bundle(bundle, results)
    return results
