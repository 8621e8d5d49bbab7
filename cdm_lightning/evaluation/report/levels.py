"""What a page says of the levels s: the distance over s, and the gap that the cascade's own input leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from cdm_lightning.evaluation.metrics.figures import Figure, full_name, spreads
from cdm_lightning.evaluation.report.elements import Html, notes, number, paragraph, places, table
from cdm_lightning.evaluation.report.pictures import Point, curve

REAL = "real low-res"
BOTH = "generated"  # at s = 0, where truncated and non-truncated sampling are one


class Level(Protocol):
    """What a curve needs of a measured point; steps are those of the stage, calls the network calls per image."""

    @property
    def stage(self) -> str: ...
    @property
    def s(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def sampler(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def calls(self) -> float: ...
    @property
    def figures(self) -> Sequence[Figure]: ...


def curves(rows: Sequence[Level], chosen: Level | None = None) -> str:
    """FID(s): per stage and sampler a plot of the distance over s and every number in tables; the chosen one marked.

    A plot takes two levels or more. Nothing where there are no rows.
    """
    made = ""
    for title, same in ways(rows).items():
        names = dict.fromkeys(full_name(f) for row in same for f in row.figures if f.key == "fd")
        if len({row.s for row in same}) > 1:
            made += "".join(one_curve(title, name, same, chosen) for name in names)
        made += "".join(one_table(title, name, same, chosen) for name in figures_of(same))
        made += calls_table(title, same) + notes(f for row in same for f in row.figures)
    return made


def ways(rows: Sequence[Level]) -> dict[str, list[Level]]:
    """The rows that may share a plot: those of one stage, one sampler and one number of steps."""
    groups: dict[str, list[Level]] = {}
    for row in rows:
        groups.setdefault(f"{row.stage}, {row.sampler} with {row.steps} steps", []).append(row)
    return groups


def figures_of(rows: Sequence[Level]) -> dict[str, list[tuple[Level, Figure]]]:
    """The figures of these rows by their full names, each with its row."""
    found: dict[str, list[tuple[Level, Figure]]] = {}
    for row in rows:
        for figure in row.figures:
            found.setdefault(full_name(figure), []).append((row, figure))
    return found


def one_curve(title: str, name: str, rows: Sequence[Level], chosen: Level | None) -> str:
    """The plot of one distance."""
    found = figures_of(rows)[name]
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
    return curve(lines, mark, found[0][1].name, f"{title}: {name}, over s.{bars}")


def one_table(title: str, name: str, rows: Sequence[Level], chosen: Level | None) -> str:
    """The numbers of one figure: a level each row, a kind of low-resolution input each column."""
    found = figures_of(rows)[name]
    kinds = list(dict.fromkeys(row.kind for row in rows))
    decimals = max(places(f.value, f.spread) for _, f in found)
    lines: list[list[object]] = []
    for s in sorted({row.s for row, _ in found}):
        here = [(row, f) for row, f in found if row.s == s]
        cells = [[(r, number(f.value, f.spread, decimals)) for r, f in here if r.kind == kind] for kind in kinds]
        counts = ", ".join(f"{n:,}" for n in dict.fromkeys(f.n for _, f in here))
        lines.append([s, *(marked(cell, chosen) for cell in cells), spreads(f for _, f in here), counts])
    heads = ["s", *kinds, "± one standard deviation over", "n generated"]
    return table(f"{title}: {name}", heads, lines, [*range(1 + len(kinds)), len(heads) - 1])


def marked(cell: Sequence[tuple[Level, str]], chosen: Level | None) -> Html:
    """The numbers of a cell, with the chosen row's called so."""
    shown = [f"<mark><small>chosen</small> {text}</mark>" if row == chosen else text for row, text in cell]
    return Html(", ".join(shown))


def calls_table(title: str, rows: Sequence[Level]) -> str:
    """What each level costs: network calls per image, over all the stages that ran."""
    kinds = list(dict.fromkeys(row.kind for row in rows))
    calls = {(row.s, row.kind): f"{row.calls:,g}" for row in rows}
    lines = [[s, *(calls.get((s, kind), "") for kind in kinds)] for s in sorted({row.s for row in rows})]
    return table(f"{title}: network calls per image", ["s", *kinds], lines, range(1 + len(kinds)))


def costs(rows: Sequence[Level]) -> str:
    """Quality against cost: every figure of each sampler and number of steps, and a plot of the distance over calls.

    Nothing where there are no rows.
    """
    if not rows:
        return ""
    names = list(figures_of(rows))
    lines: dict[str, list[Point]] = {}
    for row in rows:
        first = row.figures[0]
        lines.setdefault(row.sampler, []).append((row.calls, first.value, first.spread))
    across = "network calls per image, of all stages"
    made: str = curve(lines, None, rows[0].figures[0].name, f"{rows[0].stage}: {names[0]}, over {across}.", across)
    cells = [
        [row.sampler, row.steps, f"{row.calls:,g}", *(number(f.value, f.spread) for f in row.figures)] for row in rows
    ]
    heads = ["sampler", "steps", "calls", *names]
    made += table(f"{rows[0].stage} at s = {rows[0].s}, {rows[0].kind}", heads, cells, range(1, len(heads)))
    over = spreads(f for row in rows for f in row.figures)
    return made + (paragraph(f"± is one standard deviation over {over}.") if over else "")


def gap_table(rows: Sequence[Level]) -> str:
    """The cascade gap: the distance on generated minus that on real low-resolution input, per stage and s.

    A gap has a spread where both distances have one of the same kind: sqrt(a^2 + b^2). Nothing where no pair is found.
    """
    made, spread = "", False
    for title, same in ways(rows).items():
        for name, found in figures_of(same).items():
            real = {row.s: f for row, f in found if row.kind == REAL and f.key in ("fd", "kd")}
            pairs = [(row, f, real[row.s]) for row, f in found if row.kind != REAL and row.s in real]
            if pairs:
                decimals = max(places(f.value, f.spread) for _, f in found)
                lines = [gap_line(*pair, decimals) for pair in sorted(pairs, key=lambda pair: pair[0].s)]
                spread = spread or any(line[-1] for line in lines)
                heads = ["s", "generated input", "on generated", "on real", "gap", "± one standard deviation over"]
                made += table(f"{title}: {name}, on generated minus on real input", heads, lines, (0, 2, 3, 4))
    return made + (paragraph("The ± of a gap is the root of the sum of the squares of both.") if spread else "")


def gap_line(row: Level, generated: Figure, real: Figure, decimals: int) -> list[object]:
    alike = generated.spread is not None and real.spread is not None and generated.spread_of == real.spread_of
    spread = math.hypot(generated.spread or 0, real.spread or 0) if alike else None
    distances = [number(f.value, f.spread, decimals) for f in (generated, real)]
    gap = number(generated.value - real.value, spread, decimals)
    return [row.s, row.kind, *distances, gap, spreads([generated, real])]
