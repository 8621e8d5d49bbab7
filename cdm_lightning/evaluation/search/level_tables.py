"""Charts and tables of a search: distance over the level s, the cascade gap, and distance over network calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cdm_lightning.evaluation.metrics.measurements import Figure, full_name, spreads
from cdm_lightning.evaluation.report.figure_tables import decimal_places, format_number, unique_notes
from cdm_lightning.evaluation.report.line_chart import Point, line_chart
from cdm_lightning.evaluation.report.page import Block, Chosen, Drawing, Folded, Table
from cdm_lightning.evaluation.search.level_search import Row

REAL = "real low-res"
BOTH = "generated"  # the kind at s = 0, where truncated and non-truncated sampling are the same
LINES = {BOTH: "generated input", REAL: "real input"}  # names in a chart; the other kinds are of generated input too
Floor = tuple[str, float] | None  # what as many real images measure, with a name
Measured = Sequence[tuple[Row, Figure]]  # one kind of figure, at every level


def level_curves(rows: Sequence[Row], chosen: Row | None = None, floor: Floor = None) -> list[Block]:
    """For each stage and sampler, a chart of the distance over s and tables of all figures, with `chosen` marked.

    A single level gets no chart. Only the tables of distances are not folded. floor: a line in the charts. [] without
    rows.
    """
    blocks: list[Block] = []
    for title, same in group_by_sampler(rows).items():
        figures = group_by_figure(same)
        if len({row.s for row in same}) > 1:
            distances = {name: found for name, found in figures.items() if found[0][1].key == "fd"}
            blocks += [distance_curve(f"{title}: {name}", found, chosen, floor) for name, found in distances.items()]
        tables = {name: level_table(f"{title}: {name}", found, chosen) for name, found in figures.items()}
        blocks += [table for name, table in tables.items() if figures[name][0][1].key == "fd"]
        folded = [table for name, table in tables.items() if figures[name][0][1].key != "fd"]
        blocks.append(Folded(f"{title}: more figures", [*folded, calls_table(title, same)]))
        blocks += unique_notes(f for row in same for f in row.figures)
    return blocks


def group_by_sampler(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows grouped by stage, sampler and number of steps, under a title: a group shares a chart."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.stage}, {row.sampler} with {row.steps} steps", []).append(row)
    return groups


def group_by_figure(rows: Sequence[Row]) -> dict[str, list[tuple[Row, Figure]]]:
    """The figures of the rows grouped by their full names, each with its row."""
    found: dict[str, list[tuple[Row, Figure]]] = {}
    for row in rows:
        for figure in row.figures:
            found.setdefault(full_name(figure), []).append((row, figure))
    return found


def columns(rows: Sequence[Row]) -> dict[str, tuple[str, ...]]:
    """The columns of a table over s, real input last, and the kinds of the rows in each: BOTH counts for each kind."""
    kinds = dict.fromkeys(row.kind for row in rows)
    found: dict[str, tuple[str, ...]] = {kind: (kind, BOTH) for kind in kinds if kind not in (REAL, BOTH)}
    return (found or {BOTH: (BOTH,)}) | ({REAL: (REAL,)} if REAL in kinds else {})


def distance_curve(title: str, found: Measured, chosen: Row | None, floor: Floor) -> Drawing:
    """The chart of one distance over s. The point at s = 0 belongs to both kinds of sampling, and so to both lines."""
    rows = [row for row, _ in found]
    lines: dict[str, list[Point]] = {}
    ringed = None
    for column, kinds in columns(rows).items():
        name = LINES.get(column, f"generated input, {column}")
        lines[name] = [(row.s, f.value, f.spread) for row, f in found if row.kind in kinds]
        if ringed is None and chosen is not None and chosen in rows and chosen.kind in kinds:
            ringed = (name, chosen.s)
    spread_of = spreads(f for _, f in found)
    bars = f" Error bars: one standard deviation over {spread_of}." if spread_of else ""
    bars += f" Dotted: {floor[0]}, {format_number(floor[1])}." if floor else ""
    heading = f"{rows[0].stage}: distance to real images, lower is better"
    name = found[0][1].name
    return line_chart(lines, ringed, name, f"{title}, over s.{bars}", title=heading, floor=floor)


def level_table(title: str, found: Measured, chosen: Row | None) -> Table:
    """A table of one figure: one row per level, one column per kind of low-resolution input."""
    kinds = columns([row for row, _ in found])
    decimals = max(decimal_places(f.value, f.spread) for _, f in found)
    lines: list[list[Any]] = []
    for s in sorted({row.s for row, _ in found}):
        here = [(row, f, format_number(f.value, f.spread, decimals)) for row, f in found if row.s == s]
        cells = [[Chosen(t) if row == chosen else t for row, _, t in here if row.kind in of] for of in kinds.values()]
        counts = ", ".join(f"{n:,}" for n in dict.fromkeys(f.n for _, f, _ in here))
        lines.append([s, *cells, spreads(f for _, f, _ in here), counts])
    heads = ["s", *kinds, "± one standard deviation over", "n generated"]
    return Table(title, heads, lines, [*range(1 + len(kinds)), len(heads) - 1])


def calls_table(title: str, rows: Sequence[Row]) -> Table:
    """A table of network calls per image over all stages, for each level and kind of input."""
    kinds = columns(rows)
    calls = {(row.s, k): f"{row.calls:,g}" for row in rows for k, of in kinds.items() if row.kind in of}
    lines = [[s, *(calls.get((s, kind)) for kind in kinds)] for s in sorted({row.s for row in rows})]
    return Table(f"{title}: network calls per image", ["s", *kinds], lines, range(1 + len(kinds)))


def cost_curve(rows: Sequence[Row]) -> list[Block]:
    """Quality over cost: a chart of the distance over network calls, and a table of every sampler and number of steps.

    [] without rows.
    """
    if not rows:
        return []
    names, stage = list(group_by_figure(rows)), rows[0].stage
    lines: dict[str, list[Point]] = {}
    for row in rows:
        first = row.figures[0]
        lines.setdefault(row.sampler, []).append((row.calls, first.value, first.spread))
    calls_axis = "network calls per image, of all stages"
    chart = line_chart(lines, None, rows[0].figures[0].name, f"{stage}: {names[0]}, over {calls_axis}.", calls_axis)
    cells = [
        [row.sampler, row.steps, f"{row.calls:,g}", *(format_number(f.value, f.spread) for f in row.figures)]
        for row in rows
    ]
    heads = ["sampler", "steps", "calls", *names]
    table = Table(f"{stage} at s = {rows[0].s}, {rows[0].kind}", heads, cells, range(1, len(heads)))
    spread_of = spreads(f for row in rows for f in row.figures)
    return [chart, table, f"± is one standard deviation over {spread_of}." if spread_of else ""]


def gap_table(rows: Sequence[Row]) -> list[Block]:
    """Tables of the cascade gap: the distance on generated minus that on real low-resolution input, per stage and s.

    A gap has a spread, sqrt(a^2 + b^2), if both distances have spreads of the same kind. [] without a pair to compare.
    """
    blocks: list[Block] = []
    folded: list[Table] = []
    heads = ["s", "generated input", "on generated", "on real", "gap", "± one standard deviation over"]
    spread = False
    for title, same in group_by_sampler(rows).items():
        for name, found in group_by_figure(same).items():
            real = {row.s: f for row, f in found if row.kind == REAL and f.key in ("fd", "kd")}
            pairs = [(row, f, real[row.s]) for row, f in found if row.kind != REAL and row.s in real]
            if pairs:
                decimals = max(decimal_places(f.value, f.spread) for _, f in found)
                lines = [gap_line(*pair, decimals) for pair in sorted(pairs, key=lambda pair: pair[0].s)]
                spread = spread or any(line[-1] for line in lines)
                table = Table(f"{title}: {name}, on generated minus on real input", heads, lines, (0, 2, 3, 4))
                (blocks if found[0][1].key == "fd" else folded).append(table)
    blocks += [Folded("The gap by the kernel distance", folded)] if folded else []
    return [*blocks, "The ± of a gap is the root of the summed squares of the two ±."] if spread else blocks


def gap_line(row: Row, generated: Figure, real: Figure, decimals: int) -> list[Any]:
    """One row of a gap table."""
    same_kind = generated.spread is not None and real.spread is not None and generated.spread_of == real.spread_of
    spread = math.hypot(generated.spread or 0, real.spread or 0) if same_kind else None
    distances = [format_number(f.value, f.spread, decimals) for f in (generated, real)]
    gap = format_number(generated.value - real.value, spread, decimals)
    return [row.s, row.kind, *distances, gap, spreads([generated, real])]
