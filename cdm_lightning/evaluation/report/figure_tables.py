"""Tables on a page: measured figures, comparison with the paper, classification accuracy scores; numbers as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from cdm_lightning.evaluation.metrics.measurements import Accuracy, Figure, against, spreads
from cdm_lightning.evaluation.report import paper_results as paper
from cdm_lightning.evaluation.report.page import Block, Folded, Table

CANONICAL = ("FID", "KID", "Inception Score")  # names used only with the canonical Inception network
BETTER = {"fd": "lower", "kd": "lower", "precision": "higher", "recall": "higher", "is": "higher"}


def decimal_places(value: float, spread: float | None = None) -> int:
    """Decimal places to print: two significant digits of the spread, or three of a value without one; at least 2."""
    digits, size = (1, spread) if spread else (2, value)
    if not size or not math.isfinite(size):
        return 2
    return min(max(2, digits - math.floor(math.log10(abs(size)))), 9)


def format_number(value: float, spread: float | None = None, decimals: int | None = None) -> str:
    """`value` or `value ± spread` as text. decimals: None for `decimal_places`."""
    places = decimal_places(value, spread) if decimals is None else decimals
    text = f"{value:,.{places}f}" if spread is None else f"{value:,.{places}f} ± {spread:,.{places}f}"
    return text.replace("-", "−")


def unique_notes(figures: Iterable[Figure]) -> list[Block]:
    """The notes of the figures, each one once."""
    return list(dict.fromkeys(figure.note for figure in figures))


def figures_table(figures: Sequence[Figure], caption: str = "Measured figures") -> list[Block]:
    """A table of figures with their spreads and references, and their notes; [] without figures."""
    if not figures:
        return []
    heads = ["measure", "value", "± one standard deviation over", "against", "better", "n generated", "n real"]
    rows = [
        [f.name, format_number(f.value, f.spread) + ("" if f.is_result else " NOT A RESULT"),
         f.spread_of if f.spread is not None else "", against(f),
         BETTER.get(f.key, ""), f"{f.n:,}", f"{f.n_reference:,}" if f.n_reference else ""]
        for f in figures
    ]  # fmt: skip
    return [Table(caption, heads, rows, numeric=(1, 5, 6)), *unique_notes(figures)]


def paper_table(resolution: int, figures: Sequence[Figure]) -> list[Block]:
    """The measured FID and Inception Score next to those of the paper and its baselines, for ImageNet.

    A figure from another detector gets its own column, and a note says that it cannot be compared. For a resolution
    that the paper does not report, the result is one sentence that says so.
    """
    if resolution not in paper.TABLE_1A:
        return [f"The paper reports no figures at {resolution} × {resolution}."]
    columns = {"FID, training set": "fid_train", "FID, validation set": "fid_val", "Inception Score": "is"}
    measured_figures = [f for f in figures if f.key in ("fd", "is")]
    measured: dict[str, list[str]] = {}
    for f in measured_figures:
        column = f"{f.name}, {against(f)}" if f.key == "fd" and f.against else f.name
        measured.setdefault(column, []).append(format_number(f.value, f.spread))
    heads = ["model", *columns, *(name for name in measured if name not in columns)]
    rows = [["measured here", *(", ".join(measured.get(name, [])) for name in heads[1:])]]
    for model, reported in reversed(paper.TABLE_1A[resolution].items()):
        rows.append([f"paper: {model}", *(reported.get(columns.get(name, ""), "") for name in heads[1:])])
    caption = f"Class-conditional ImageNet at {resolution} × {resolution}"
    blocks: list[Block] = [Table(caption, heads, rows, numeric=range(1, len(heads)), marked=[0])]
    blocks.append(" ".join(comparison_notes(measured_figures)))
    ablations = [
        Table(f"In the paper: {title}", ["setting", "FID, training set"], list(ablation.items()), [1])
        for title, ablation in paper.ABLATIONS.get(resolution, {}).items()
    ]
    blocks += [Folded("The paper's ablations", ablations)] if ablations else []
    return [*blocks, f"Source: {paper.SOURCE}. Its ± is over 10 splits."]


def comparison_notes(figures: Sequence[Figure]) -> list[str]:
    """Sentences on how the measured figures differ from the paper's: detector, number of images, meaning of ±."""
    sentences, spread_of = [], spreads(figures)
    foreign = dict.fromkeys(f.name for f in figures if f.name not in CANONICAL)
    if foreign:
        sentences.append(
            f"{', '.join(foreign)}: not measured with the canonical Inception, so the columns do not compare."
        )
    counts = ", ".join(f"{n:,}" for n in sorted({f.n for f in figures if f.name in CANONICAL and f.n != paper.N}))
    if counts:
        sentences.append(
            f"Measured here on {counts} generated images, in the paper on {paper.N:,}: the figures depend on it."
        )
    return [*sentences, f"± here: one standard deviation over {spread_of}."] if spread_of else sentences


def cas_table(rows: Sequence[Accuracy], classifier: str, resolution: int | None = None) -> list[Block]:
    """A table of classification accuracy scores; [] without rows.

    classifier: the trained network, such as "ResNet-50". resolution: for ImageNet, to add the paper's scores.
    """
    if not rows:
        return []
    heads = ["trained on", "n", "top-1, %", "top-5, %", "± one standard deviation over"]
    lines = [
        [row.trained_on, f"{row.n:,}", format_number(row.top1, row.spread),
         "" if row.top5 is None else format_number(row.top5), row.spread_of if row.spread is not None else ""]
        for row in rows
    ]  # fmt: skip
    reported = paper.TABLE_1B.get(resolution, {}) if resolution else {}
    lines += [[f"paper: {name}", "", cas["top1"], cas["top5"], ""] for name, cas in reported.items()]
    caption = f"Accuracy on real validation images of a {classifier} trained on each set"
    blocks: list[Block] = [Table(caption, heads, lines, numeric=(1, 2, 3), marked=range(len(rows)) if reported else ())]
    if reported and classifier != paper.CLASSIFIER:
        blocks.append(f"The paper trains a {paper.CLASSIFIER}: its scores do not compare with those of a {classifier}.")
    return [*blocks, f"Source: {paper.SOURCE}."] if reported else blocks
