"""The report of a search over s: printed table, results.json, report.html, and the chosen levels in the bundle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cdm_lightning.cascade.hub import write_hub_files
from cdm_lightning.cascade.metadata import bundle_file, read_bundle_metadata
from cdm_lightning.evaluation.report.figure_tables import format_number
from cdm_lightning.evaluation.report.page import Block, Drawing, Section, write_page
from cdm_lightning.evaluation.report.pictures import level_slider, stages_grid
from cdm_lightning.evaluation.report.results import facts_of, provenance, provenance_sections, write_results
from cdm_lightning.evaluation.report.stored_samples import contact_sheet, stage_rows
from cdm_lightning.evaluation.search.finding import TERMS, draw_side_by_side, finding, rows_side_by_side, stage_of
from cdm_lightning.evaluation.search.level_tables import BOTH, cost_curve, gap_table, level_curves
from cdm_lightning.foundation.files import write_atomically
from cdm_lightning.foundation.terminal import folding_table, table_console


def print_rows(rows: Sequence[Any], chosen: Any) -> None:
    """Print a table of the points of a search, with a star at the chosen one."""
    first = rows[0].figures
    table = folding_table("stage", "s", "low-res input", "sampler", "steps", "calls", *(f.name for f in first[:2]))
    for row in rows:
        star = " *" if row is chosen else ""
        cells = [f"{f.value:.4g}" + ("" if f.spread is None else f" ± {f.spread:.2g}") for f in row.figures[:2]]
        cells[0] += star
        table.add_row(row.stage, str(row.s), row.kind, row.sampler, str(row.steps), str(row.calls), *cells)
    console = table_console()
    console.print(table)
    spreads = dict.fromkeys(f"{f.name}: ± over {f.spread_of}" for f in first if f.spread is not None)
    console.print(f"* chosen. {'; '.join(spreads)}. n = {first[0].n} images per seed.", highlight=False)
    for note in dict.fromkeys(f.note for f in first if f.note):
        console.print(f"note: {note}", highlight=False)


def write_search(
    run: Any,
    rows: Sequence[Any],
    chosen: Any,
    last: Any,
    levels: list[int],
    kind: str,
    shown: Sequence[Path],
    low_res: Sequence[Path],
    floor: float | None,
) -> dict[str, Any]:
    """Write results.json, report.html, curve.png and levels.png of a search, and return the results.

    run: the LevelSearch. chosen: the chosen row of the last stage with a choice of s. last: the row of the whole
    cascade at the chosen levels. levels, kind: the choice. shown: folders of its samples, from low to high resolution.
    low_res: the folder of the low-resolution samples in levels.png, if they were finished. floor: from `run.floor`.
    """
    figure = chosen.figures[0]
    results = {
        "levels": levels,
        "truncated": kind == "truncated" and any(levels),
        "rows": [asdict(row) for row in rows],
        "chosen": asdict(chosen),
        "conclusion": f"{finding(rows, chosen, kind)} {'' if figure.is_result else figure.note}".strip(),
        "floor": floor,
        "n": run.n,
        "seeds": run.seeds,
        "precision": run.precision,
        "seed": run.seeds[0],
        "detector": {"name": run.detector.name, "sha256": run.detector.sha256},
        "references": [card.summary() for card in run.cards.values()],
        "made": provenance(),
    }
    pictures, numbers = write_pictures(run, rows, chosen, low_res, floor)
    name, own = chosen.figures[0].name, stage_of(rows, chosen)
    whole = format_number(last.figures[0].value, last.figures[0].spread)
    choice = (
        f"Chosen, by {name} of {run.n:,} samples per seed: s = {levels}, {kind if any(levels) else 'without noise'}. "
        f"The whole cascade then measures {whole}."
    )
    others = [row for row in rows if not row.compared and row.stage != chosen.stage]
    same = [row for row in own if row.kind in (kind, BOTH)]
    slider = {row.s: contact_sheet(Path(row.folders[0]) / "train" / str(row.resolution)) for row in same}
    sections: list[Section] = [
        ("The finding", [*pictures.values(), choice, TERMS]),
        ("Samples by level", level_slider(slider, chosen.s, f"Samples of {chosen.stage}")),
        ("Stages side by side", stages_grid(stage_rows(shown))),
        ("The cascade gap", gap_table([*own, *others])),
        ("The distance over s", [*numbers, *level_curves(others)]),
        ("Samplers and steps", cost_curve([row for row in rows if row.compared])),
        *provenance_sections(facts_of(results), results),
    ]
    write_page(run.out / "report.html", "Search over the levels of a cascade", sections, results["conclusion"])
    write_results(run.out, results)
    print(results["conclusion"])
    print(f"{', '.join(map(str, pictures))}: the same as pictures; report.html, results.json: everything")
    return results


def write_pictures(
    run: Any, rows: Sequence[Any], chosen: Any, low_res: Sequence[Path], floor: float | None
) -> tuple[dict[Path, Drawing], list[Block]]:
    """Write curve.png, unless the stage was measured at one level alone, and levels.png; gives both, and the tables."""
    blocks = level_curves(stage_of(rows, chosen), chosen, None if floor is None else (f"{run.n:,} real images", floor))
    drawn: dict[Path, Drawing] = {}
    if isinstance(blocks[0], Drawing):
        drawn[run.out / "curve.png"] = blocks[0]
        write_atomically(run.out / "curve.png", blocks[0].png)
    pair, path = rows_side_by_side(rows, chosen), run.out / "levels.png"
    draw_side_by_side(path, pair, chosen, low_res, run.shards, run.split)
    at = " and at ".join(f"s = {row.s}" for row in pair)
    text = f"{chosen.stage}: one sample per class at {at}, beside a real image"
    levels = Drawing(path.read_bytes(), text, caption=f"{text}. The distances are of all samples.")
    return {**drawn, path: levels}, blocks[len(drawn) :]


def store_in_bundle(bundle: Path, results: dict[str, Any]) -> None:
    """Write the chosen levels, and how they were found, into bundle.json atomically; its weights stay the same."""
    chosen = results["chosen"]
    found = {
        "levels": results["levels"], "truncated": results["truncated"],
        "n": results["n"], "seeds": results["seeds"], "detector": results["detector"], "date": results["made"]["date"],
        "references": results["references"], "figures": chosen["figures"], "kind": chosen["kind"],
        "sampler": chosen["sampler"], "steps": chosen["steps"], "conclusion": results["conclusion"],
        "rows": [{"stage": row["stage"], "s": row["s"], "kind": row["kind"], "value": row["figures"][0]["value"],
                  "spread": row["figures"][0]["spread"]} for row in results["rows"]],
    }  # fmt: skip
    metadata = {
        **read_bundle_metadata(bundle),
        "levels": results["levels"],
        "truncated": results["truncated"],
        "search": found,
    }
    metadata.pop("results", None)
    write_atomically(bundle_file(bundle), (json.dumps(metadata, indent=1) + "\n").encode())
    write_hub_files(bundle_file(bundle).parent, metadata)
    print(f"{bundle}: now stores levels s = {results['levels']}, truncated {results['truncated']}")
