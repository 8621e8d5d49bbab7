"""report.html and results.json of `cdm evaluate`, of the test of a cascade, and of `cdm cas`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cdm_lightning.evaluation.metrics.measurements import Accuracy, Figure
from cdm_lightning.evaluation.report.figure_tables import cas_table, figures_table, paper_table
from cdm_lightning.evaluation.report.memorisation import card_to_search, memorisation, neighbour_rows
from cdm_lightning.evaluation.report.page import Block, Drawing, Section, write_page
from cdm_lightning.evaluation.report.pictures import neighbours_grid, stages_grid
from cdm_lightning.evaluation.report.results import (
    facts_of,
    provenance,
    provenance_sections,
    settings_table,
    write_results,
)
from cdm_lightning.evaluation.report.stored_samples import resolution_folders, stage_rows


def write_evaluation(out: Path, measured: Any, real: Path | None, cas: dict[str, Any] | None) -> dict[str, Any]:
    """Write results.json and report.html of an `Evaluation`, and return the results.

    real: root of the shards that a reference card was made from, to show nearest images. cas: from `read_cas`.
    """
    results = {**measured.as_dict(), "made": provenance(), "memorisation": None}
    manifest, card = measured.manifests[0], card_to_search(measured.cards)
    resolution = manifest.resolution
    sections: list[Section] = [("Figures", figures_table(measured.figures))]
    if is_imagenet(manifest.classes):
        sections.append(("Beside the paper", paper_table(resolution, measured.figures)))
    if cas is not None:
        sections.append(("Classification accuracy score", cas_blocks(cas, resolution, manifest.classes)))
    sections.append(("Stages side by side", stages_grid(stage_rows(resolution_folders(measured.folders[0])))))
    if card.split != "train":
        text = "Copies were not looked for: that takes a reference card of the training images."
        sections.append(("Memorisation", [text]))
    elif card.features is not None and len(card.features) > 1:
        results["memorisation"] = memorisation(card, measured.features)
        text = memorisation_sentence(results["memorisation"])
        rows = [] if real is None else neighbour_rows(card, measured.features[0], measured.folders[0], real)
        grid = neighbours_grid(rows, f"the features of {measured.detector.name}")
        sections.append(("Memorisation", [text, *grid]))
    sections += provenance_sections(facts_of(results), results)
    lead = f"{measured.figures[0].n:,} samples of {resolution} × {resolution}, measured with {measured.detector.name}."
    write_page(out / "report.html", "Evaluation of a cascade", sections, lead)
    write_results(out, results)
    print(f"{out / 'report.html'}: figures and pictures; {out / 'results.json'}: the same as data")
    return results


def is_imagenet(classes: Sequence[str]) -> bool:
    """Whether the classes are the 1,000 of ILSVRC2012, named by WordNet ids such as n01440764."""
    return len(classes) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in classes)


def write_test(out: Path, figures: Sequence[Figure], about: dict[str, Any], rows: Sequence[Any]) -> None:
    """Write results.json and report.html of `cdm test`, which stores no samples.

    about: detector, seed and references. rows: (class name, [image per resolution]).
    """
    results = {**about, "figures": [asdict(figure) for figure in figures], "made": provenance()}
    sections: list[Section] = [("Figures", figures_table(figures)), ("Samples", stages_grid(rows))]
    sections += provenance_sections(facts_of(results), results)
    lead = f"{figures[0].n:,} samples, measured with {about['detector']['name']}."
    write_page(Path(out) / "report.html", "Test of a cascade", sections, lead)
    write_results(Path(out), results)
    print(f"{Path(out) / 'report.html'}: figures and samples, {Path(out) / 'results.json'}: the same as data")


def write_cas(out: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Write results.json and report.html of `cdm cas`, and return the results. `out` must already hold cas.png."""
    results = {**results, "made": provenance()}
    bars = Drawing((Path(out) / "cas.png").read_bytes(), "Accuracy of each class, trained on each set")
    facts = {name.capitalize(): results["made"][name] for name in ("date", "device", "versions")}
    settings = {name: results[name] for name in ("recipe", "seeds", "samples", "sha256")}
    sections: list[Section] = [
        ("Classification accuracy score", cas_blocks(results, results["resolution"], results["classes"])),
        ("Class by class", [bars]),
        *provenance_sections(facts, {"made": results["made"]}, *settings_table("Training", [settings])),
    ]
    write_page(Path(out) / "report.html", "Classification accuracy score", sections)
    write_results(Path(out), results)
    return results


def cas_blocks(score: dict[str, Any], resolution: int, classes: Sequence[str]) -> list[Block]:
    """The table and the conclusion of `cdm cas`. score: its results.json."""
    rows = []
    for kind in ("generated", "real"):
        top1, top5 = score[kind]["top1"], score[kind]["top5"]
        spread_of = f"{len(score['seeds'])} trainings"
        spread = None if top1["sd"] is None else 100 * top1["sd"]
        top5_mean = 100 * top5["mean"] if len(classes) > 10 else None
        rows.append(Accuracy(f"{kind} images", score["n"], 100 * top1["mean"], top5_mean, spread, spread_of))
    table = cas_table(rows, score["recipe"]["architecture"], resolution if is_imagenet(classes) else None)
    return [*table, score["conclusion"]]


def memorisation_sentence(result: dict[str, Any]) -> str:
    """The result of the search for copies, as text. result: from `memorisation`."""
    return (
        f"{100 * result['share']:.2f} % of the generated images count as copies: each lies nearer to one of "
        f"{result['searched']:,} real {result['split']} images than {100 * result['expected']:.0f} % of those lie to "
        f"their own nearest neighbour. A share of about {100 * result['expected']:.0f} % is expected without "
        "memorisation; a larger share means that the model has memorised images. "
        f"The search covers only these {result['searched']:,} images, whose features the reference card keeps."
    )
