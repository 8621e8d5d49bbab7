"""Tables of figures: numbers as text, the measured figures, the paper's beside them, and accuracy scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from cdm_lightning.evaluation.metrics.figures import Accuracy, Figure, against, spreads
from cdm_lightning.evaluation.report import paper
from cdm_lightning.evaluation.report.page import Block, Table

CANONICAL = ("FID", "KID", "Inception Score")  # names that belong to the canonical Inception alone
BETTER = {"fd": "lower", "kd": "lower", "precision": "higher", "recall": "higher", "is": "higher"}


def places(value: float, spread: float | None = None) -> int:
    """Decimals to print: two or more, enough for two digits of a spread, or for three of a value that has none."""
    digits, size = (1, spread) if spread else (2, value)
    if not size or not math.isfinite(size):
        return 2
    return min(max(2, digits - math.floor(math.log10(abs(size)))), 9)


def number(value: float, spread: float | None = None, decimals: int | None = None) -> str:
    """`value` or `value ± spread`, with so many decimals or as many as they ask for."""
    shown = places(value, spread) if decimals is None else decimals
    text = f"{value:,.{shown}f}" if spread is None else f"{value:,.{shown}f} ± {spread:,.{shown}f}"
    return text.replace("-", "−")


def notes(figures: Iterable[Figure]) -> list[Block]:
    """What a reader must know of the figures, each note once."""
    return list(dict.fromkeys(figure.note for figure in figures))


def figures_table(figures: Sequence[Figure], caption: str = "Measured figures") -> list[Block]:
    """Each figure with its spread, what the spread is over, and what was compared; nothing where there are none."""
    if not figures:
        return []
    heads = ["measure", "value", "± one standard deviation over", "against", "better", "n generated", "n real"]
    rows = [
        [f.name, number(f.value, f.spread), f.spread_of if f.spread is not None else "", against(f),
         BETTER.get(f.key, ""), f"{f.n:,}", f"{f.n_reference:,}" if f.n_reference else ""]
        for f in figures
    ]  # fmt: skip
    return [Table(caption, heads, rows, numeric=(1, 5, 6)), *notes(figures)]


def paper_table(resolution: int, figures: Sequence[Figure]) -> list[Block]:
    """The measured FID and Inception Score beside the paper's and its baselines'; for ImageNet at that resolution.

    A figure of another detector gets a column of its own under its own name, and the page says that it compares with
    none. Says so where the paper has no figures at this resolution.
    """
    if resolution not in paper.TABLE_1A:
        return [f"The paper has no figures at {resolution} × {resolution}."]
    columns = {"FID, training set": "fid_train", "FID, validation set": "fid_val", "Inception Score": "is"}
    compared = [f for f in figures if f.key in ("fd", "is")]
    measured: dict[str, list[str]] = {}
    for f in compared:
        place = f"{f.name}, {against(f)}" if f.key == "fd" and f.against else f.name
        measured.setdefault(place, []).append(number(f.value, f.spread))
    heads = ["model", *columns, *(name for name in measured if name not in columns)]
    rows = [["measured here", *(", ".join(measured.get(name, [])) for name in heads[1:])]]
    for model, known in reversed(paper.TABLE_1A[resolution].items()):
        rows.append([f"paper: {model}", *(known.get(columns.get(name, ""), "") for name in heads[1:])])
    caption = f"Class-conditional ImageNet at {resolution} × {resolution}"
    blocks: list[Block] = [Table(caption, heads, rows, numeric=range(1, len(heads)), marked=[0])]
    blocks.append(" ".join(cautions(compared)))
    for title, ablation in paper.ABLATIONS.get(resolution, {}).items():
        blocks.append(Table(f"In the paper: {title}", ["setting", "FID, training set"], list(ablation.items()), [1]))
    return [*blocks, f"Source: {paper.SOURCE}. Its ± is over 10 splits."]


def cautions(figures: Sequence[Figure]) -> list[str]:
    """What keeps measured figures from comparing with the paper's, and what their spread is."""
    said, over = [], spreads(figures)
    foreign = dict.fromkeys(f.name for f in figures if f.name not in CANONICAL)
    if foreign:
        said.append(f"{', '.join(foreign)}: not measured with the canonical Inception, so the columns do not compare.")
    few = ", ".join(f"{n:,}" for n in sorted({f.n for f in figures if f.name in CANONICAL and f.n != paper.N}))
    if few:
        said.append(
            f"Measured here on {few} generated images, in the paper on {paper.N:,}: another n moves the figures."
        )
    return [*said, f"± here: one standard deviation over {over}."] if over else said


def cas_table(rows: Sequence[Accuracy], classifier: str, resolution: int | None = None) -> list[Block]:
    """Classification accuracy scores; nothing where there are none.

    classifier: what was trained, such as "ResNet-50". resolution: for ImageNet, to show the paper's beside ours.
    """
    if not rows:
        return []
    heads = ["trained on", "n", "top-1, %", "top-5, %", "± one standard deviation over"]
    lines = [
        [row.trained_on, f"{row.n:,}", number(row.top1, row.spread), "" if row.top5 is None else number(row.top5),
         row.spread_of if row.spread is not None else ""]
        for row in rows
    ]  # fmt: skip
    known = paper.TABLE_1B.get(resolution, {}) if resolution else {}
    lines += [[f"paper: {name}", "", cas["top1"], cas["top5"], ""] for name, cas in known.items()]
    caption = f"Accuracy on real validation images of a {classifier} trained on each set"
    blocks: list[Block] = [Table(caption, heads, lines, numeric=(1, 2, 3), marked=range(len(rows)) if known else ())]
    if known and classifier != paper.CLASSIFIER:
        blocks.append(f"The paper trains a {paper.CLASSIFIER}: its rows do not compare with those of a {classifier}.")
    return [*blocks, f"Source: {paper.SOURCE}."] if known else blocks
