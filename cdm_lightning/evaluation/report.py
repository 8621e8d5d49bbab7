"""What an evaluation and a search leave behind: results.json, a printed table, and one page to look at."""

from __future__ import annotations

import json
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from cdm_lightning.bundle import read_about
from cdm_lightning.evaluation import page
from cdm_lightning.evaluation.figures import Accuracy, Figure
from cdm_lightning.evaluation.memory import memorisation, neighbour_rows, sheet, stage_rows, stored
from cdm_lightning.evaluation.page_elements import paragraph
from cdm_lightning.shards import write_atomically

PACKAGES = ("torch", "lightning", "torchmetrics", "diffusers")


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write results.json."""
    write_atomically(Path(folder) / "results.json", (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())


def provenance() -> dict[str, str]:
    """When, where and with what something was measured."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["cdm", *sys.argv[1:]]),
        "device": device,
        "versions": ", ".join(f"{name} {version(name)}" for name in ("cdm_lightning", *PACKAGES)),
    }


def print_figures(figures: Sequence[Figure]) -> None:
    """The figures as lines, with their error bars and what those are."""
    table = Table(Column("figure", overflow="fold"), "value", "±", "over", "against", "n", "n real")
    for f in figures:
        spread = "" if f.spread is None else f"{f.spread:.4g}"
        over = f.spread_of if spread else ""
        table.add_row(f.name, f"{f.value:.4f}", spread, over, f.against, str(f.n), str(f.n_reference or ""))
    console = Console()
    console.print(table)
    for note in dict.fromkeys(f.note for f in figures if f.note):
        console.print(f"note: {note}", highlight=False)


def write_evaluation(out: Path, measured: Any, real: Path | None, cas: Path | None) -> dict[str, Any]:
    """results.json and report.html of an `Evaluation`.

    real: root of the shards behind a card, for the pictures of its nearest images. cas: results of `cdm cas`.
    """
    results = {**measured.as_dict(), "made": provenance(), "memorisation": None}
    manifest, card = measured.manifests[0], next((c for c in measured.cards if c.split == "train"), measured.cards[0])
    resolution = manifest.resolution
    sections = [("Figures", page.figures_table(measured.figures))]
    if is_imagenet(manifest.classes):
        sections.append(("Beside the paper", page.paper_table(resolution, measured.figures)))
    if cas is not None:
        sections.append(("Classification accuracy score", cas_section(cas, resolution, manifest.classes)))
    sections.append(("Stages side by side", page.stages_grid(stage_rows(stored(measured.folders[0])))))
    if card.features is not None and len(card.features) > 1:
        results["memorisation"] = memorisation(card, measured.features)
        said = memorisation_sentence(results["memorisation"])
        rows = [] if real is None else neighbour_rows(card, measured.features[0], measured.folders[0], real)
        grid = page.neighbours_grid(rows, f"the features of {measured.detector.name}")
        sections.append(("Memorisation", paragraph(said) + grid))
    sections += [("How it was made", made_section(results)), ("Commands", page.commands([results["made"]["command"]]))]
    lead = f"{measured.figures[0].n:,} samples of {resolution} × {resolution}, judged by {measured.detector.name}."
    page.write_page(out / "report.html", "Evaluation of a cascade", sections, lead)
    write_results(out, results)
    print(f"{out / 'report.html'}: the figures beside pictures, {out / 'results.json'}: the same as data")
    return results


def is_imagenet(classes: Sequence[str]) -> bool:
    """Whether the classes are the thousand of ILSVRC2012, named by their WNIDs."""
    return len(classes) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in classes)


def cas_section(path: Path, resolution: int, classes: Sequence[str]) -> str:
    """The table of a results.json of `cdm cas`."""
    found = json.loads(Path(path).read_text())
    rows = []
    for kind in ("generated", "real"):
        one, five = found[kind]["top1"], found[kind]["top5"]
        over = f"{len(found['seeds'])} trainings"
        spread = None if one["sd"] is None else 100 * one["sd"]
        top5 = 100 * five["mean"] if len(classes) > 10 else None
        rows.append(Accuracy(f"{kind} images", found["n"], 100 * one["mean"], top5, spread, over))
    table = page.cas_table(rows, found["recipe"]["architecture"], resolution if is_imagenet(classes) else None)
    return table + paragraph(found["conclusion"])


def memorisation_sentence(found: dict[str, Any]) -> str:
    return (
        f"{100 * found['share']:.2f} % of the generated images lie nearer to one of {found['searched']:,} real "
        f"{found['split']} images than {100 * found['expected']:.0f} % of those lie to their own nearest neighbour. "
        "Samples of the same law as the real images would have about the latter share; more of them is memorisation."
    )


def made_section(results: dict[str, Any]) -> str:
    detector, made = results["detector"], results["made"]
    known = {"Detector": f"{detector['name']}, SHA-256 {detector['sha256']}", "Seed": str(results["seed"])}
    known |= {name.capitalize(): made[name] for name in ("date", "device", "versions")}
    for number, card in enumerate(results.get("references", []), 1):
        about = {name: value for name, value in card.items() if name not in ("classes", "counts", "detector_sha256")}
        known[f"Reference {number}"] = json.dumps(about, ensure_ascii=False)
    for number, samples in enumerate(results.get("samples", []), 1):
        known[f"Samples {number}"] = json.dumps(samples)
    return page.facts(known)


def print_rows(rows: Sequence[Any], chosen: Any) -> None:
    """The points of a search as lines, the chosen one marked by a star."""
    first = rows[0].figures
    table = Table("stage", "s", "low-res input", "sampler", "steps", "calls", *(f.name for f in first[:2]))
    for row in rows:
        star = " *" if row is chosen else ""
        cells = [f"{f.value:.4g}" + ("" if f.spread is None else f" ± {f.spread:.2g}") for f in row.figures[:2]]
        cells[0] += star
        table.add_row(row.stage, str(row.s), row.kind, row.sampler, str(row.steps), str(row.calls), *cells)
    console = Console()
    console.print(table)
    over = dict.fromkeys(f"{f.name}: ± over {f.spread_of}" for f in first if f.spread is not None)
    console.print(f"* chosen. {'; '.join(over)}. n = {first[0].n} images a seed.", highlight=False)


def write_search(run: Any, rows: Sequence[Any], chosen: Any, levels: list[int], kind: str) -> dict[str, Any]:
    """results.json and report.html of a search: all points, the chosen setting, and the curves.

    chosen: the row of the last stage with a choice of s. levels, kind: what the whole cascade shall use.
    """
    results = {
        "levels": levels,
        "truncated": kind == "truncated" and any(levels),
        "rows": [asdict(row) for row in rows],
        "chosen": asdict(chosen),
        "n": run.n,
        "seeds": run.seeds,
        "seed": run.seeds[0],
        "detector": {"name": run.detector.name, "sha256": run.detector.sha256},
        "references": [card.about() for card in run.cards.values()],
        "made": provenance(),
    }
    searched = [row for row in rows if not row.compared]
    same = [row for row in searched if row.stage == chosen.stage and row.kind in (kind, "generated")]
    last = next(row for row in searched if row.levels == levels and row.kind in (kind, "generated"))
    slider = {row.s: sheet(Path(row.folders[0]) / "train" / str(row.resolution)) for row in same}
    sections = [
        ("The distance over s", page.curves(searched, chosen)),
        ("The cascade gap", page.gap_table(searched)),
        ("Samplers and steps", page.costs([row for row in rows if row.compared])),
        ("Samples by level", page.level_slider(slider, chosen.s, f"Samples of {chosen.stage}")),
        ("Stages side by side", page.stages_grid(stage_rows(run.stage_folders(last)))),
        ("How it was made", made_section(results)),
        ("Commands", page.commands([results["made"]["command"]])),
    ]
    name = chosen.figures[0].name
    lead = f"Chosen: s = {levels}, {kind if any(levels) else 'without noise'}, by {name} of {run.n:,} samples a seed."
    page.write_page(run.out / "report.html", "Search over the levels of a cascade", sections, lead)
    write_results(run.out, results)
    print(f"{run.out / 'report.html'}: curves and pictures, {run.out / 'results.json'}: the same as data")
    return results


def store_in_bundle(bundle: Path, results: dict[str, Any]) -> None:
    """Write the chosen levels, and how they were found, into bundle.json, atomically; weights and hashes stay."""
    chosen = results["chosen"]
    found = {
        "n": results["n"], "seeds": results["seeds"], "detector": results["detector"], "date": results["made"]["date"],
        "references": results["references"], "figures": chosen["figures"], "kind": chosen["kind"],
        "samplers": chosen["sampler"], "steps": chosen["steps"],
    }  # fmt: skip
    about = {**read_about(bundle), "levels": results["levels"], "truncated": results["truncated"], "search": found}
    about.pop("results", None)
    write_atomically(Path(bundle) / "bundle.json", (json.dumps(about, indent=1) + "\n").encode())
    print(f"{bundle}: stores s = {results['levels']}, truncated {results['truncated']}")
