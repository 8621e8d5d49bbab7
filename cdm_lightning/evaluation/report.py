"""What an evaluation found: its rows, the table and the plot of them, one sentence, and the note in the bundle."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from cdm_lightning.bundle import read_about
from cdm_lightning.shards import write_atomically

Kind = Literal["truncated", "non-truncated", "real low-res"]
KINDS: tuple[Kind, ...] = ("truncated", "non-truncated", "real low-res")


@dataclass(frozen=True)
class Row:
    """One measured distance. kind: how the low-resolution input with level s came about.

    truncated: the reverse process, stopped at s. non-truncated: finished samples z_0, noised to s. real low-res:
    validation images, reduced and noised to s; the reference holds the same images, which lowers this kind a little.
    """

    stage: str
    resolution: int  # of the images that were measured
    s: int
    kind: Kind
    distance: float
    detector: str
    detector_sha256: str
    n: int  # generated images
    n_reference: int  # real images
    seed: int
    sampler: list[str]  # of each stage that ran
    sampling_steps: list[int]


def distance_at(rows: Sequence[Row], s: int, kind: Kind) -> float:
    return next(row.distance for row in rows if (row.s, row.kind) == (s, kind))


def choose(rows: Sequence[Row], truncated: bool | None) -> Row:
    """The row of least distance with s > 0 and generated input, of the truncated kind, the other, or (None) both."""
    kinds = {None: KINDS[:2], True: KINDS[:1], False: KINDS[1:2]}[truncated]
    return min((row for row in rows if row.s > 0 and row.kind in kinds), key=lambda row: row.distance)


def conclude(rows: Sequence[Row], chosen: Row) -> str:
    """One sentence: what the chosen level does to the distance after generated low-resolution images and real ones."""
    stage, s, effects = chosen.stage, chosen.s, []
    for kind in (chosen.kind, KINDS[2]):
        plain, noised = distance_at(rows, 0, kind), distance_at(rows, s, kind)
        verb = "lowers" if noised < plain else "does not lower"
        effects.append(f"{verb} the Fréchet distance of {stage} ({plain:.2f} at s = 0, {noised:.2f} at s = {s})")
    return (
        f"Conditioning augmentation with s = {s}, {chosen.kind}, {effects[0]} after generated low-resolution images, "
        f"and {effects[1]} after real ones; n = {chosen.n}, one seed, so that small differences are chance."
    )


def print_table(rows: Sequence[Row], final: Row, chosen: Row) -> None:
    """The levels as lines, the kinds of input as columns, the chosen cell marked by a star."""
    first = rows[0]
    console = Console()
    console.print(
        f"Fréchet distance ({first.detector}) of {first.stage} at {first.resolution}x{first.resolution}: "
        f"{first.n} generated images against {first.n_reference} real ones, seed {first.seed}",
        highlight=False,
    )
    table = Table("s", *KINDS)
    for s in sorted({row.s for row in rows}):
        cells = [f"{distance_at(rows, s, k):.2f}{' *' if (s, k) == (chosen.s, chosen.kind) else ''}" for k in KINDS]
        table.add_row(str(s), *cells)
    console.print(table)
    console.print(
        f"* chosen; with it {final.stage} makes {final.distance:.2f} at {final.resolution}x{final.resolution}",
        highlight=False,
    )


def plot_levels(rows: Sequence[Row], path: Path) -> None:
    """Save the distance against s as a PNG, one line per kind of input."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for kind, style in zip(KINDS, ("o-", "s--", "^:"), strict=True):
        line = sorted((row.s, row.distance) for row in rows if row.kind == kind)
        axes.plot(*zip(*line, strict=True), style, label=kind)
    axes.set_xlabel("level s of the noise on the low-resolution input")
    axes.set_ylabel(f"Fréchet distance ({rows[0].detector})")
    axes.set_title(f"{rows[0].stage}, {rows[0].n} images against {rows[0].n_reference}")
    axes.set_ylim(bottom=0)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write results.json."""
    write_atomically(Path(folder) / "results.json", (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())


def store_in_bundle(bundle: Path, results: dict[str, Any]) -> None:
    """Write the chosen levels and the results into bundle.json, atomically; the weights and their hashes stay."""
    chosen = {"levels": results["levels"], "truncated": results["truncated"], "results": results}
    text = json.dumps({**read_about(bundle), **chosen}, indent=1) + "\n"
    write_atomically(Path(bundle) / "bundle.json", text.encode())
