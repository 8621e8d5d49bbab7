"""What every evaluation leaves behind: results.json, a printed table, and one page to look at."""

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

from cdm_lightning.data.shards import Manifest, shards_digest
from cdm_lightning.evaluation.metrics.figures import Accuracy, Figure
from cdm_lightning.evaluation.report import page
from cdm_lightning.evaluation.report.elements import paragraph
from cdm_lightning.evaluation.report.memory import memorisation, neighbour_rows, searched, stage_rows, stored
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import write_atomically
from cdm_lightning.foundation.terminal import whole_console, whole_table

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
    table = whole_table("figure", "value", "±", "over", "against", "n", "n real")
    for f in figures:
        spread = "" if f.spread is None else f"{f.spread:.4g}"
        over = f.spread_of if spread else ""
        table.add_row(f.name, f"{f.value:.4f}", spread, over, f.against, str(f.n), str(f.n_reference or ""))
    console = whole_console()
    console.print(table)
    for note in dict.fromkeys(f.note for f in figures if f.note):
        console.print(f"note: {note}", highlight=False)


def read_cas(path: Path, manifests: Sequence[Manifest]) -> dict[str, Any]:
    """What `cdm cas` found of one of these folders of samples; refuses any other file, and other samples' score."""
    try:
        found = dict(json.loads(Path(path).read_text()))
        if not {"generated", "real", "recipe", "seeds", "conclusion"} <= set(found):
            raise ValueError("it holds no score")
        trained_on = str(found["sha256"]["samples"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is not the results.json of `cdm cas`: {error}") from error
    measured = [shards_digest(manifest.shards) for manifest in manifests]
    if trained_on not in measured:
        have = ", ".join(digest[:16] for digest in measured)
        raise InputError(
            f"{path} is the score of samples of SHA-256 {trained_on[:16]}, and those to evaluate are of {have}"
        )
    return found


def write_evaluation(out: Path, measured: Any, real: Path | None, cas: dict[str, Any] | None) -> dict[str, Any]:
    """results.json and report.html of an `Evaluation`.

    real: root of the shards behind a card, for the pictures of its nearest images. cas: from `read_cas`.
    """
    results = {**measured.as_dict(), "made": provenance(), "memorisation": None}
    manifest, card = measured.manifests[0], searched(measured.cards)
    resolution = manifest.resolution
    sections = [("Figures", page.figures_table(measured.figures))]
    if is_imagenet(manifest.classes):
        sections.append(("Beside the paper", page.paper_table(resolution, measured.figures)))
    if cas is not None:
        sections.append(("Classification accuracy score", cas_section(cas, resolution, manifest.classes)))
    sections.append(("Stages side by side", page.stages_grid(stage_rows(stored(measured.folders[0])))))
    if card.split != "train":
        said = "Copies were not looked for: no reference is of the training images, the only ones that can be copied."
        sections.append(("Memorisation", paragraph(said)))
    elif card.features is not None and len(card.features) > 1:
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


def write_test(out: Path, figures: Sequence[Figure], about: dict[str, Any], rows: Sequence[Any]) -> None:
    """report.html of a test that stores no samples. about: detector, seed and references; rows: (class, [image])."""
    results = {**about, "figures": [asdict(figure) for figure in figures], "made": provenance()}
    sections = [
        ("Figures", page.figures_table(figures)),
        ("Samples", page.stages_grid(rows)),
        ("How it was made", made_section(results)),
        ("Commands", page.commands([results["made"]["command"]])),
    ]
    lead = f"{figures[0].n:,} samples, judged by {about['detector']['name']}."
    page.write_page(Path(out) / "report.html", "Test of a cascade", sections, lead)
    write_results(Path(out), results)


def write_cas(out: Path, results: dict[str, Any]) -> dict[str, Any]:
    """results.json and report.html of `cdm cas`; cas.png must lie in `out` already."""
    results = {**results, "made": provenance()}
    picture = page.picture((Path(out) / "cas.png").read_bytes(), "Accuracy of each class, trained on each set")
    known = {name.capitalize(): json.dumps(results[name]) for name in ("recipe", "seeds", "samples", "sha256")}
    known |= {name.capitalize(): results["made"][name] for name in ("date", "device", "versions")}
    sections = [
        ("Classification accuracy score", cas_section(results, results["resolution"], results["classes"])),
        ("Class by class", picture),
        ("How it was made", page.facts(known)),
        ("Commands", page.commands([results["made"]["command"]])),
    ]
    page.write_page(Path(out) / "report.html", "Classification accuracy score", sections)
    write_results(Path(out), results)
    return results


def cas_section(found: dict[str, Any], resolution: int, classes: Sequence[str]) -> str:
    """The table of what `cdm cas` found."""
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
        "Samples of the same law as the real images would have about the latter share; more of them is memorisation. "
        f"The card keeps the features of these {found['searched']:,} alone: a copy of another image would not be seen."
    )


def made_section(results: dict[str, Any]) -> str:
    """What was measured with what, as the last part of a page."""
    detector, made = results["detector"], results["made"]
    known = {"Detector": f"{detector['name']}, SHA-256 {detector['sha256']}", "Seed": str(results["seed"])}
    known |= {name.capitalize(): made[name] for name in ("date", "device", "versions")}
    for number, card in enumerate(results.get("references", []), 1):
        about = {name: value for name, value in card.items() if name not in ("classes", "counts", "detector_sha256")}
        known[f"Reference {number}"] = json.dumps(about, ensure_ascii=False)
    for number, samples in enumerate(results.get("samples", []), 1):
        known[f"Samples {number}"] = json.dumps(samples)
    return page.facts(known)
