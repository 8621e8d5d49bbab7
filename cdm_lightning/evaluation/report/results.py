"""results.json of a measurement, its provenance, the printed table, and reading the results of `cdm cas`."""

from __future__ import annotations

import json
import platform
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cdm_lightning import __version__
from cdm_lightning.data.shards import Manifest, shards_digest
from cdm_lightning.evaluation.metrics.measurements import Figure
from cdm_lightning.evaluation.report.page import Block, Command, Folded, Section, Table
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import write_atomically
from cdm_lightning.foundation.terminal import folding_table, table_console

PACKAGES = ("torch", "lightning", "torchmetrics", "diffusers")


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write results.json into a folder, atomically."""
    write_atomically(Path(folder) / "results.json", (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())


def provenance() -> dict[str, str]:
    """Date, command, device and package versions of a measurement."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["cdm", *sys.argv[1:]]),
        "device": device,
        "versions": ", ".join([f"cdm_lightning {__version__}", *(f"{name} {version(name)}" for name in PACKAGES)]),
    }


def print_figures(figures: Sequence[Figure]) -> None:
    """Print a table of figures with their spreads, and their notes."""
    table = folding_table("figure", "value", "±", "over", "against", "n", "n real")
    for f in figures:
        spread = "" if f.spread is None else f"{f.spread:.4g}"
        over = f.spread_of if spread else ""
        value = f"{f.value:.4f}{'' if f.is_result else ' NOT A RESULT'}"
        table.add_row(f.name, value, spread, over, f.against, str(f.n), str(f.n_reference or ""))
    console = table_console()
    console.print(table)
    for note in dict.fromkeys(f.note for f in figures if f.note):
        console.print(f"note: {note}", highlight=False)


def read_cas(path: Path, manifests: Sequence[Manifest]) -> dict[str, Any]:
    """The results.json of `cdm cas`. Raises InputError if it is none, or if its samples are not among `manifests`."""
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


def facts_of(results: dict[str, Any]) -> dict[str, str]:
    """The facts on a page: detector and its SHA-256, seed, date, device and versions."""
    detector = results["detector"]
    facts = {"Detector": f"{detector['name']}, SHA-256 {detector['sha256']}", "Seed": str(results["seed"])}
    return facts | {name.capitalize(): results["made"][name] for name in ("date", "device", "versions")}


def settings_table(caption: str, settings: Sequence[Any]) -> list[Table]:
    """A table of settings, one column for each of several tables of the same kind; [] without any.

    The classes of a reference card and its images per class are left out; results.json has them.
    """
    flat = [dict(named_values(one)) for one in settings]
    names = dict.fromkeys(name for one in flat for name in one if name not in ("classes", "counts"))
    heads = ["setting", *(f"{number}" if len(flat) > 1 else "value" for number in range(1, len(flat) + 1))]
    return [Table(caption, heads, [[name, *(one.get(name) for one in flat)] for name in names])] if names else []


def named_values(settings: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The values of a nested table as texts, with names such as `made, date`. A SHA-256 is cut to its first digits."""
    for name, value in (settings or {}).items():
        if isinstance(value, dict):
            yield from named_values(value, f"{prefix}{name}, ")
        elif isinstance(value, list):
            yield prefix + name, ", ".join(map(str, value)) if len(value) <= 12 else f"{len(value):,} values"
        else:
            text = "" if value is None else str(value)
            yield prefix + name, f"{text[:16]} …" if re.fullmatch("[0-9a-f]{64}", text) else text


def provenance_sections(facts: dict[str, str], results: dict[str, Any], *more: Table) -> list[Section]:
    """The last sections of a page: facts, settings, and the command that made it. more: tables of settings."""
    tables = [
        *more,
        *settings_table("Reference cards", results.get("references", [])),
        *settings_table("Sets of samples", results.get("samples", [])),
    ]
    settings: list[Block] = [Folded("Settings", tables)] if tables else []
    return [("How it was made", [facts, *settings]), ("Commands", [Command(results["made"]["command"])])]
