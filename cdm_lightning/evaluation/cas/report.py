"""The results of the classification accuracy score: means and spreads, one sentence, a table and a chart."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cdm_lightning.foundation.files import write_atomically
from cdm_lightning.foundation.terminal import folding_table, table_console

KINDS = ("generated", "real")
FIGURES = ("top1", "top5", "per_class")
MOST_BARS = 40  # classes; more than this are drawn as points


def over_seeds(values: Any) -> dict[str, Any]:
    """The value of each seed, and their mean and standard deviation (with n - 1; None for a single seed).

    values: (seeds,) or (seeds, classes).
    """
    table = np.asarray(values, dtype=np.float64)
    deviation = table.std(0, ddof=1).tolist() if len(table) > 1 else None
    return {"per_seed": table.tolist(), "mean": table.mean(0).tolist(), "sd": deviation}


def summarise(
    figures: Mapping[str, Sequence[Mapping[str, Any]]], classes: Sequence[str], n: int, n_real: int
) -> dict[str, Any]:
    """The table for results.json: accuracies of both kinds, their ratio generated / real per seed, and a conclusion.

    figures: for each kind ("generated", "real") and seed, {"top1", "top5", "per_class"}, accuracies in 0 ... 1. n:
    training images of each kind. n_real: real training images that exist.
    """
    results: dict[str, Any] = {
        kind: {name: over_seeds([seed[name] for seed in figures[kind]]) for name in FIGURES} for kind in KINDS
    }
    pairs = list(zip(figures["generated"], figures["real"], strict=True))
    defined = {name: all(real[name] for _, real in pairs) for name in FIGURES[:2]}
    results["ratio"] = {
        name: over_seeds([generated[name] / real[name] for generated, real in pairs]) if defined[name] else None
        for name in FIGURES[:2]
    }
    gap = np.subtract(results["generated"]["per_class"]["mean"], results["real"]["per_class"]["mean"])
    worst = int(gap.argmin())
    fewer = (
        f" The original protocol takes as many generated images as there are real ones, {n_real:,}; "
        "this is fewer, which lowers both accuracies."
    )
    results["conclusion"] = (
        f"A classifier trained on {n:,} generated images gets {mean_text(results['generated']['top1'])} % of the real "
        f"validation images right; trained on as many real ones, {mean_text(results['real']['top1'])} %. The ratio is "
        f"{mean_text(results['ratio']['top1'], 1, 3)} ({len(pairs)} seed{'s' if len(pairs) > 1 else ''}). "
        f"Class {classes[worst]} differs most, by {100 * gap[worst]:+.1f} points." + (fewer if n < n_real else "")
    )
    results |= {"n": n, "n_real_training": n_real, "protocol": "as published" if n >= n_real else "fewer images"}
    return results


def mean_text(figure: Mapping[str, Any] | None, scale: float = 100, digits: int = 2) -> str:
    """`mean ± sd` as text, times `scale`; "undefined" for None, the ratio to an accuracy of 0."""
    if figure is None:
        return "undefined"
    end = "" if figure["sd"] is None else f" ± {scale * figure['sd']:.{digits}f}"
    return f"{scale * figure['mean']:.{digits}f}{end}"


def print_table(results: Mapping[str, Any]) -> None:
    """Print top-1 and top-5 accuracy of both kinds in per cent, and their ratio."""
    console = table_console()
    console.print(
        f"Classification accuracy score: {results['recipe']['architecture']}, {results['recipe']['steps']} steps on "
        f"{results['n']:,} images of {results['resolution']}x{results['resolution']}, tested on "
        f"{results['n_validation']:,} real images, seeds {results['seeds']}",
        highlight=False,
    )
    table = folding_table("trained on", "top-1 %", "top-5 %")
    for kind in KINDS:
        table.add_row(f"{kind} images", mean_text(results[kind]["top1"]), mean_text(results[kind]["top5"]))
    ratio = results["ratio"]
    table.add_row("generated / real", mean_text(ratio["top1"], 1, 4), mean_text(ratio["top5"], 1, 4))
    console.print(table)


def plot_classes(results: Mapping[str, Any], path: Path) -> None:
    """Save a chart of the accuracy of each class as a PNG: paired bars, or a scatter plot for many classes."""
    from matplotlib.figure import Figure  # slow to import, and most commands draw nothing

    generated, real = (results[kind]["per_class"] for kind in KINDS)
    classes = results["classes"]
    many = len(classes) > MOST_BARS
    figure = Figure(figsize=(5, 5) if many else (max(6, 0.7 * len(classes)), 4), layout="constrained")
    axes = figure.subplots()
    if many:
        axes.plot([0, 1], [0, 1], "k:", linewidth=1)
        axes.errorbar(real["mean"], generated["mean"], generated["sd"], real["sd"], ".", alpha=0.5)
        axes.set(xlabel="trained on real images", ylabel="trained on generated images")
    else:
        place = np.arange(len(classes))
        for shift, one, label in ((-0.2, generated, "generated"), (0.2, real, "real")):
            axes.bar(place + shift, one["mean"], 0.4, yerr=one["sd"], capsize=2, label=f"trained on {label} images")
        axes.set_xticks(place, classes, rotation=30, ha="right")
        axes.set(ylabel="accuracy on real validation images", ylim=(0, 1))
        axes.legend(loc="lower right")
    axes.set_title(f"{results['n']:,} training images each, {len(results['seeds'])} seeds")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())
