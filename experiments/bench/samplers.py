"""Sampler benchmark: the distance of a cascade's samples by sampler and number of steps, at s = 0.

All stages take the same number of steps. `python experiments/bench/samplers.py` resumes where it was stopped; each
point is a folder of samples.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from matplotlib.figure import Figure

from cdm_lightning.cascade.bundle import read_bundle
from cdm_lightning.diffusion import Sampler
from cdm_lightning.evaluation.evaluate import evaluate
from cdm_lightning.foundation.files import write_atomically
from cdm_lightning.sampling.sample import sample


def samplers(
    bundle: Path = Path("data/fashion-cascade"),
    reference: Path = Path("data/references/fashion-val-32.safetensors"),
    out: Path = Path("runs/bench/samplers"),
    samplers: list[Sampler] = ["ddpm", "ddim", "dpm++"],  # noqa: B006, read only
    steps: list[int] = [4, 10, 25, 50, 100, 250],  # noqa: B006, read only
    n: int = 1000,
    seeds: list[int] = [0],  # noqa: B006, read only
) -> list[dict[str, Any]]:
    """Draw and measure the samples of every point, and write results.json and curve.png.

    Args:
        bundle: The bundle of the cascade.
        reference: The reference card of the real images.
        out: Folder for samples, results.json and curve.png.
        samplers: Samplers to compare.
        steps: Network calls of each stage.
        n: Images per point and seed.
        seeds: Seeds of the samples; three or more give error bars.
    """
    stages = len(read_bundle(bundle)[0])
    rows: list[dict[str, Any]] = []
    for sampler in samplers:
        for count in steps:
            point = out / f"{sampler}-{count}"
            for seed in seeds:
                sample(
                    bundle, point / f"{seed}", n, seed=seed, levels=[0] * (stages - 1), truncated=False,
                    sampler=sampler, sampling_steps=[count] * stages, block_size=100,
                )  # fmt: skip
            found = evaluate([point / f"{seed}" for seed in seeds], [reference], point / "evaluation")
            distance = next(figure for figure in found["figures"] if figure["key"] == "fd")
            rows.append(
                {"sampler": sampler, "steps": count, "calls": count * stages, "n": n, "seeds": seeds, **distance}
            )
            write_atomically(out / "results.json", (json.dumps(rows, indent=1) + "\n").encode())
            draw(rows, out / "curve.png")
    print(table(rows))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of distances, also relative to ddpm, the paper's sampler, at its largest number of steps."""
    ancestral = [row["value"] for row in sorted(rows, key=lambda row: row["steps"]) if row["sampler"] == "ddpm"]
    lines = [
        "| sampler | steps per stage | network calls per image | distance | relative to ddpm with most steps |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        relative = f"{row['value'] / ancestral[-1] - 1:+.1%}" if ancestral else ""
        lines.append(f"| {row['sampler']} | {row['steps']} | {row['calls']} | {row['value']:.3f} | {relative} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot distance over network calls, one line per sampler."""
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for sampler in dict.fromkeys(row["sampler"] for row in rows):
        own = [row for row in rows if row["sampler"] == sampler]
        axes.plot([r["calls"] for r in own], [r["value"] for r in own], "o-", label=sampler, linewidth=1, markersize=4)
    axes.set(xscale="log", yscale="log", xlabel="network calls per image, all stages", ylabel=rows[0]["name"])
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    auto_cli(samplers, as_positional=False)
