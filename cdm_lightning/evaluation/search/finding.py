"""What the augmentation did to one stage: a sentence, and the same samples at s = 0 and at another s side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from cdm_lightning.data.shards import read_manifest
from cdm_lightning.evaluation.metrics.measurements import Figure
from cdm_lightning.evaluation.real_images import first_images, real_images_for_labels
from cdm_lightning.evaluation.report.figure_tables import decimal_places, format_number
from cdm_lightning.evaluation.report.stored_samples import stage_rows
from cdm_lightning.evaluation.search.level_search import Row
from cdm_lightning.evaluation.search.level_tables import BOTH, REAL
from cdm_lightning.foundation.class_names import NO_CLASSES
from cdm_lightning.foundation.images import save_grid

NON_TRUNCATED = "non-truncated"
ONE_SEED = 0.05  # share of the distance at s = 0 that counts as a difference where there are no error bars
MOST_ROWS, LEAST_CELL = 10, 96  # of a picture: classes, and pixels of an image
TERMS = {
    "s": "level of the Gaussian noise on the low-resolution input of a super-resolution stage; 0 is none",
    "truncated, non-truncated": "how a sample of the stage before gets this noise: its reverse process stops at s, or "
    "it is finished and noise is added; at s = 0 both are the same",
    "cascade gap": "the distance on generated minus that on real low-resolution input; noise closes the share of the "
    "gap at s = 0 by which it lowers the distance on generated input",
}


def stage_of(rows: Sequence[Row], chosen: Row) -> list[Row]:
    """The rows of the search over s of the stage of `chosen`, without the comparison of samplers."""
    return [row for row in rows if row.stage == chosen.stage and not row.compared]


def finding(rows: Sequence[Row], chosen: Row, kind: str) -> str:
    """What noise on the input did to the distance of a stage, in one sentence.

    chosen: the row of the chosen s. kind: the chosen kind of sampling, truncated or non-truncated.
    """
    stage = stage_of(rows, chosen)
    generated = [row for row in stage if row.kind in (kind, BOTH)]
    real = {row.s: row.figures[0] for row in stage if row.kind == REAL}
    if len({row.s for row in generated}) == 1:
        return gap_alone(generated[0], real)
    best = min((row for row in generated if row.s), key=lambda row: row.figures[0].value)
    zero = next((row for row in generated if not row.s), None)
    shown = [row.figures[0] for row in (best, zero) if row is not None]
    places = max(decimal_places(f.value, f.spread) for f in shown)

    def text(figure: Figure) -> str:
        return format_number(figure.value, figure.spread, places)

    f, at = best.figures[0], f"s = {best.s}"
    trust = how_sure(best)
    if zero is None:
        beside = f" ({text(real[best.s])} on real input)" if best.s in real else ""
        return (
            f"What conditioning augmentation did to {best.stage} is not known, as s = 0 was not measured: on generated "
            f"input the {f.name} is least at {at}, {text(f)}{beside}; {trust}."
        )
    f0 = zero.figures[0]
    drop, noise = difference(f0, f)
    gap, gap_noise = difference(f0, real[0]) if 0 in real else (0.0, None)
    doubt = ONE_SEED * f0.value if noise is None else 2 * noise  # the best s is the luckiest of several
    helped = drop > doubt
    if abs(drop) <= doubt:
        verdict = f"No clear gain from conditioning augmentation in {best.stage}"
        reason = f"less than {100 * ONE_SEED:.0f} %" if noise is None else "within twice the spread over seeds"
        change = (
            f"is {text(f)} at {at} ({best.kind}) and {text(f0)} at s = 0, a difference of "
            f"{format_number(abs(drop), noise, places)}, {reason}"
        )
    elif helped:
        verdict = f"Conditioning augmentation helped {best.stage}"
        change = f"falls from {text(f0)} at s = 0 to {text(f)} at {at} ({best.kind})"
    else:
        verdict = f"Conditioning augmentation did not help {best.stage}"
        change = f"is least at s = 0, {text(f0)}; the best s > 0, {best.s} ({best.kind}), gives {text(f)}"
    ends = ""
    if 0 in real:
        reals = f"{text(real[0])} at s = 0" + (f", {text(real[best.s])} at {at}" if best.s in real else "")
        size = format_number(gap, gap_noise, places)
        if gap <= (ONE_SEED * f0.value if gap_noise is None else 2 * gap_noise):
            ends = f"; there is no clear cascade gap to close, as real input gives {reals}"
        elif helped:
            ends = f", which closes {100 * min(drop / gap, 1):.0f} % of the cascade gap of {size} (real input: {reals})"
        else:
            ends = f"; the cascade gap at s = 0 is {size} (real input: {reals})"
    return f"{verdict}: on generated input the {f.name} {change}{ends}; {trust}."


def gap_alone(row: Row, real: dict[int, Figure]) -> str:
    """What `finding` says of a stage measured at one level, that of `row`. real: the figure of each s."""
    f = row.figures[0]
    places = decimal_places(f.value, f.spread)
    given = "" if row.kind == BOTH else f" ({row.kind})"
    distance = format_number(f.value, f.spread, places)
    sentence = f"The {f.name} of {row.stage} at s = {row.s} is {distance} on generated input{given}"
    if row.s in real:
        on_real = format_number(real[row.s].value, real[row.s].spread, places)
        gap = format_number(*difference(f, real[row.s]), places)
        sentence += f" and {on_real} on real input, a cascade gap of {gap}"
    return f"{sentence}; {how_sure(row)}."


def difference(a: Figure, b: Figure) -> tuple[float, float | None]:
    """a - b, and its standard deviation if both have one."""
    known = a.spread is not None and b.spread is not None
    return a.value - b.value, math.hypot(a.spread or 0, b.spread or 0) if known else None


def how_sure(row: Row) -> str:
    """What the error bars of a row are over, or why it has none."""
    f, seeds = row.figures[0], len(row.folders)
    if f.spread is not None:
        return f"± is one standard deviation over {f.spread_of} of {f.n:,} images"
    return f"{'one seed' if seeds == 1 else f'{seeds} seeds'} of {f.n:,} images, so no error bars"


def rows_side_by_side(rows: Sequence[Row], chosen: Row) -> list[Row]:
    """The rows to show: that of the least s and, of several levels, a second one.

    The second is that of the chosen s or, where this is the least, of the best s above it. Non-truncated if that was
    measured, as these samples share their finished low-resolution images.
    """
    stage = stage_of(rows, chosen)
    kind = NON_TRUNCATED if any(row.kind == NON_TRUNCATED for row in stage) else "truncated"
    least, *others = sorted((row for row in stage if row.kind in (kind, BOTH)), key=lambda row: row.s)
    same = [row for row in others if row.s == chosen.s] or sorted(others, key=lambda row: row.figures[0].value)
    return [least, *same[:1]]


def draw_side_by_side(
    path: Path, pair: Sequence[Row], chosen: Row, low_res: Sequence[Path], shards: Path, split: str
) -> None:
    """Save a picture of one sample per class: its low-resolution input, the stage's output at two s, and a real image.

    pair: from `rows_side_by_side`. low_res: the folder of the low-resolution samples; [] if they were not finished.
    shards, split: of the real images.
    """
    resolution = chosen.resolution
    outputs = [Path(row.folders[0]) / "train" / str(resolution) for row in pair]
    rows = stage_rows([*low_res, *outputs])[:MOST_ROWS]
    classes = read_manifest(outputs[0]).classes
    if classes == NO_CLASSES:
        real = first_images(len(rows), shards, split, resolution)
    else:
        label = torch.tensor([classes.index(name) for name, _ in rows])
        real = real_images_for_labels(label, shards, split, resolution)
    heads = [f"generated\n{folder.name} × {folder.name}" for folder in low_res]
    for row in pair:
        role = "chosen s" if row.s == chosen.s else f"best s > {pair[0].s}" if row is not pair[0] else ""
        figure = f"distance {format_number(row.figures[0].value)}"
        heads.append("\n".join(filter(None, (role, "" if row.kind == BOTH else row.kind, f"s = {row.s}", figure))))
    images = [[*samples, image] for (_, samples), image in zip(rows, real, strict=True)]
    cell = resolution * math.ceil(LEAST_CELL / resolution)
    save_grid(images, path, cell, heads=[*heads, "real image"], names=[name for name, _ in rows])
