"""What a page says of the levels s: the distance over s, the gap that the cascade's own input leaves, and the cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cdm_lightning.evaluation.metrics.figures import Figure, full_name, spreads
from cdm_lightning.evaluation.report.figure_tables import notes, number, places
from cdm_lightning.evaluation.report.line_chart import Point, line_chart
from cdm_lightning.evaluation.report.page import Block, Chosen, Drawing, Table
from cdm_lightning.evaluation.search.level_search import Row

REAL = "real low-res"
BOTH = "generated"  # at s = 0, where truncated and non-truncated sampling are one
Measured = Sequence[tuple[Row, Figure]]  # one figure at every level


def curves(rows: Sequence[Row], chosen: Row | None = None) -> list[Block]:
    """FID(s): per stage and sampler a plot of the distance over s and every number in tables; the chosen one marked.

    A plot takes two levels or more. Nothing where there are no rows.
    """
    blocks: list[Block] = []
    for title, same in ways(rows).items():
        figures = figures_of(same)
        if len({row.s for row in same}) > 1:
            distances = {name: found for name, found in figures.items() if found[0][1].key == "fd"}
            blocks += [distance_curve(f"{title}: {name}", found, chosen) for name, found in distances.items()]
        blocks += [level_table(f"{title}: {name}", found, chosen) for name, found in figures.items()]
        blocks += [calls_table(title, same), *notes(f for row in same for f in row.figures)]
    return blocks


def ways(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows that may share a plot: those of one stage, one sampler and one number of steps."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.stage}, {row.sampler} with {row.steps} steps", []).append(row)
    return groups


def figures_of(rows: Sequence[Row]) -> dict[str, list[tuple[Row, Figure]]]:
    """The figures of these rows by their full names, each with its row."""
    found: dict[str, list[tuple[Row, Figure]]] = {}
    for row in rows:
        for figure in row.figures:
            found.setdefault(full_name(figure), []).append((row, figure))
    return found


def distance_curve(title: str, found: Measured, chosen: Row | None) -> Drawing:
    """The plot of one distance over s; the point where both kinds of sampling are one belongs to both lines."""
    rows = [row for row, _ in found]
    kinds = list(dict.fromkeys(row.kind for row in rows if row.kind not in (REAL, BOTH))) or [BOTH]
    lines: dict[str, list[Point]] = {kind: [] for kind in kinds}
    for row, f in found:
        for kind in kinds if row.kind == BOTH else [row.kind]:
            lines.setdefault(kind, []).append((row.s, f.value, f.spread))
    mark = None
    if chosen is not None and chosen in rows:
        mark = (kinds[0] if chosen.kind == BOTH else chosen.kind, chosen.s)
    over = spreads(f for _, f in found)
    bars = f" Error bars: one standard deviation over {over}." if over else ""
    return line_chart(lines, mark, found[0][1].name, f"{title}, over s.{bars}")


def level_table(title: str, found: Measured, chosen: Row | None) -> Table:
    """The numbers of one figure: a level each row, a kind of low-resolution input each column."""
    kinds = list(dict.fromkeys(row.kind for row, _ in found))
    decimals = max(places(f.value, f.spread) for _, f in found)
    lines: list[list[Any]] = []
    for s in sorted({row.s for row, _ in found}):
        here = [(row, f, number(f.value, f.spread, decimals)) for row, f in found if row.s == s]
        cells = [[Chosen(text) if row == chosen else text for row, _, text in here if row.kind == k] for k in kinds]
        counts = ", ".join(f"{n:,}" for n in dict.fromkeys(f.n for _, f, _ in here))
        lines.append([s, *cells, spreads(f for _, f, _ in here), counts])
    heads = ["s", *kinds, "± one standard deviation over", "n generated"]
    return Table(title, heads, lines, [*range(1 + len(kinds)), len(heads) - 1])


def calls_table(title: str, rows: Sequence[Row]) -> Table:
    """What each level costs: network calls per image, over all the stages that ran."""
    kinds = list(dict.fromkeys(row.kind for row in rows))
    calls = {(row.s, row.kind): f"{row.calls:,g}" for row in rows}
    lines = [[s, *(calls.get((s, kind)) for kind in kinds)] for s in sorted({row.s for row in rows})]
    return Table(f"{title}: network calls per image", ["s", *kinds], lines, range(1 + len(kinds)))


def costs(rows: Sequence[Row]) -> list[Block]:
    """Quality against cost: every figure of each sampler and number of steps, and a plot of the distance over calls.

    Nothing where there are no rows.
    """
    if not rows:
        return []
    names, stage = list(figures_of(rows)), rows[0].stage
    lines: dict[str, list[Point]] = {}
    for row in rows:
        first = row.figures[0]
        lines.setdefault(row.sampler, []).append((row.calls, first.value, first.spread))
    across = "network calls per image, of all stages"
    drawn = line_chart(lines, None, rows[0].figures[0].name, f"{stage}: {names[0]}, over {across}.", across)
    cells = [
        [row.sampler, row.steps, f"{row.calls:,g}", *(number(f.value, f.spread) for f in row.figures)] for row in rows
    ]
    heads = ["sampler", "steps", "calls", *names]
    table = Table(f"{stage} at s = {rows[0].s}, {rows[0].kind}", heads, cells, range(1, len(heads)))
    over = spreads(f for row in rows for f in row.figures)
    return [drawn, table, f"± is one standard deviation over {over}." if over else ""]


def gap_table(rows: Sequence[Row]) -> list[Block]:
    """The cascade gap: the distance on generated minus that on real low-resolution input, per stage and s.

    A gap has a spread where both distances have one of the same kind: sqrt(a^2 + b^2). Nothing where no pair is found.
    """
    blocks: list[Block] = []
    heads = ["s", "generated input", "on generated", "on real", "gap", "± one standard deviation over"]
    spread = False
    for title, same in ways(rows).items():
        for name, found in figures_of(same).items():
            real = {row.s: f for row, f in found if row.kind == REAL and f.key in ("fd", "kd")}
            pairs = [(row, f, real[row.s]) for row, f in found if row.kind != REAL and row.s in real]
            if pairs:
                decimals = max(places(f.value, f.spread) for _, f in found)
                lines = [gap_line(*pair, decimals) for pair in sorted(pairs, key=lambda pair: pair[0].s)]
                spread = spread or any(line[-1] for line in lines)
                blocks.append(Table(f"{title}: {name}, on generated minus on real input", heads, lines, (0, 2, 3, 4)))
    return [*blocks, "The ± of a gap is the root of the sum of the squares of both."] if spread else blocks


def gap_line(row: Row, generated: Figure, real: Figure, decimals: int) -> list[Any]:
    """A level's row of the gap table."""
    alike = generated.spread is not None and real.spread is not None and generated.spread_of == real.spread_of
    spread = math.hypot(generated.spread or 0, real.spread or 0) if alike else None
    distances = [number(f.value, f.spread, decimals) for f in (generated, real)]
    gap = number(generated.value - real.value, spread, decimals)
    return [row.s, row.kind, *distances, gap, spreads([generated, real])]
