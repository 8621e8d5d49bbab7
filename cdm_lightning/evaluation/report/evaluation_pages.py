"""The pages of an evaluation, of the test of a cascade, and of a classification accuracy score: what stands on each."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cdm_lightning.evaluation.metrics.figures import Accuracy, Figure
from cdm_lightning.evaluation.report.figure_tables import cas_table, figures_table, paper_table
from cdm_lightning.evaluation.report.memorisation import memorisation, neighbour_rows, searched
from cdm_lightning.evaluation.report.page import Block, Drawing, Section, write_page
from cdm_lightning.evaluation.report.pictures import neighbours_grid, stages_grid
from cdm_lightning.evaluation.report.results import facts_of, made_sections, provenance, write_results
from cdm_lightning.evaluation.report.stored_samples import stage_rows, stored


def write_evaluation(out: Path, measured: Any, real: Path | None, cas: dict[str, Any] | None) -> dict[str, Any]:
    """results.json and report.html of an `Evaluation`.

    real: root of the shards behind a card, for the pictures of its nearest images. cas: from `read_cas`.
    """
    results = {**measured.as_dict(), "made": provenance(), "memorisation": None}
    manifest, card = measured.manifests[0], searched(measured.cards)
    resolution = manifest.resolution
    sections: list[Section] = [("Figures", figures_table(measured.figures))]
    if is_imagenet(manifest.classes):
        sections.append(("Beside the paper", paper_table(resolution, measured.figures)))
    if cas is not None:
        sections.append(("Classification accuracy score", cas_blocks(cas, resolution, manifest.classes)))
    sections.append(("Stages side by side", stages_grid(stage_rows(stored(measured.folders[0])))))
    if card.split != "train":
        said = "Copies were not looked for: no reference is of the training images, the only ones that can be copied."
        sections.append(("Memorisation", [said]))
    elif card.features is not None and len(card.features) > 1:
        results["memorisation"] = memorisation(card, measured.features)
        said = memorisation_sentence(results["memorisation"])
        rows = [] if real is None else neighbour_rows(card, measured.features[0], measured.folders[0], real)
        grid = neighbours_grid(rows, f"the features of {measured.detector.name}")
        sections.append(("Memorisation", [said, *grid]))
    sections += made_sections(facts_of(results), results["made"]["command"])
    lead = f"{measured.figures[0].n:,} samples of {resolution} × {resolution}, judged by {measured.detector.name}."
    write_page(out / "report.html", "Evaluation of a cascade", sections, lead)
    write_results(out, results)
    print(f"{out / 'report.html'}: the figures beside pictures, {out / 'results.json'}: the same as data")
    return results


def is_imagenet(classes: Sequence[str]) -> bool:
    """Whether the classes are the thousand of ILSVRC2012, named by their WNIDs."""
    return len(classes) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in classes)


def write_test(out: Path, figures: Sequence[Figure], about: dict[str, Any], rows: Sequence[Any]) -> None:
    """report.html of a test that stores no samples. about: detector, seed and references; rows: (class, [image])."""
    results = {**about, "figures": [asdict(figure) for figure in figures], "made": provenance()}
    sections: list[Section] = [("Figures", figures_table(figures)), ("Samples", stages_grid(rows))]
    sections += made_sections(facts_of(results), results["made"]["command"])
    lead = f"{figures[0].n:,} samples, judged by {about['detector']['name']}."
    write_page(Path(out) / "report.html", "Test of a cascade", sections, lead)
    write_results(Path(out), results)


def write_cas(out: Path, results: dict[str, Any]) -> dict[str, Any]:
    """results.json and report.html of `cdm cas`; cas.png must lie in `out` already."""
    results = {**results, "made": provenance()}
    bars = Drawing((Path(out) / "cas.png").read_bytes(), "Accuracy of each class, trained on each set")
    known = {name.capitalize(): json.dumps(results[name]) for name in ("recipe", "seeds", "samples", "sha256")}
    known |= {name.capitalize(): results["made"][name] for name in ("date", "device", "versions")}
    sections: list[Section] = [
        ("Classification accuracy score", cas_blocks(results, results["resolution"], results["classes"])),
        ("Class by class", [bars]),
        *made_sections(known, results["made"]["command"]),
    ]
    write_page(Path(out) / "report.html", "Classification accuracy score", sections)
    write_results(Path(out), results)
    return results


def cas_blocks(found: dict[str, Any], resolution: int, classes: Sequence[str]) -> list[Block]:
    """The table of what `cdm cas` found, and its conclusion."""
    rows = []
    for kind in ("generated", "real"):
        one, five = found[kind]["top1"], found[kind]["top5"]
        over = f"{len(found['seeds'])} trainings"
        spread = None if one["sd"] is None else 100 * one["sd"]
        top5 = 100 * five["mean"] if len(classes) > 10 else None
        rows.append(Accuracy(f"{kind} images", found["n"], 100 * one["mean"], top5, spread, over))
    table = cas_table(rows, found["recipe"]["architecture"], resolution if is_imagenet(classes) else None)
    return [*table, found["conclusion"]]


def memorisation_sentence(found: dict[str, Any]) -> str:
    """What the search for copies found, in words."""
    return (
        f"{100 * found['share']:.2f} % of the generated images lie nearer to one of {found['searched']:,} real "
        f"{found['split']} images than {100 * found['expected']:.0f} % of those lie to their own nearest neighbour. "
        "Samples of the same law as the real images would have about the latter share; more of them is memorisation. "
        f"The card keeps the features of these {found['searched']:,} alone: a copy of another image would not be seen."
    )
