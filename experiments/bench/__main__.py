"""`python experiments/bench`: run the benchmarks, print their tables, and store results and a chart in a folder."""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Any, Literal

import growth
import network
import recipes
import sampling
import startup
import torch
from jsonargparse import auto_cli

import data
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import write_atomically
from cdm_lightning.foundation.process_group import exit_with_sentence

Part = Literal["network", "recipes", "sampling", "data", "growth", "startup"]


def bench(
    out: Path = Path("runs/bench"),
    parts: list[Part] = ["network", "recipes", "sampling", "data", "growth", "startup"],  # noqa: B006, read only
    guided_diffusion: Path | None = None,
    compile: bool = False,
    quick: bool = False,
) -> None:
    """Measure speed, compared with other projects and with the hardware's limits.

    Everything that is compared is measured in turn, round after round. Figures are stored as they come, so that a run
    that is stopped leaves those it has.

    Args:
        out: Folder for results.json, results.md and growth.png.
        parts: What to measure.
        guided_diffusion: A checkout of openai/guided-diffusion, to measure its network too.
        compile: Also measure our network compiled (takes minutes).
        quick: Run everything in about a minute, as a test; the results mean nothing.
    """
    results: dict[str, Any] = {"machine": machine(), "quick": quick}
    texts = [", ".join(f"{name} {value}" for name, value in results["machine"].items())]

    def write() -> None:
        write_atomically(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
        write_atomically(out / "results.md", ("\n\n".join(texts) + "\n").encode())

    for part in parts:

        def save(found: dict[str, Any], part: str = part) -> None:
            results[part] = found
            write()

        if part == "network":
            results[part] = network.run(quick, guided_diffusion, compile, save=save)
            texts.append(network.table(results[part]))
        elif part == "recipes":
            results[part] = recipes.run(quick, compile, save)
            texts.append(recipes.table(results[part]))
        elif part == "sampling":
            results[part] = sampling.run(quick, save=save)
            texts.append(sampling.table(results[part]))
        elif part == "data":
            results[part] = data.run(quick)
            texts.append("```\n" + data.table(results[part]) + "\n```")
        elif part == "startup":
            results[part] = startup.run(quick)
            texts.append(startup.table(results[part]))
        else:
            results[part] = growth.run(quick)
            texts.append(growth.table(results[part]))
            out.mkdir(parents=True, exist_ok=True)
            growth.draw(results[part], out / "growth.png")
        print(texts[-1] + "\n", flush=True)
        write()
    print(f"{out}/results.json, results.md{', growth.png' if 'growth' in parts else ''}")


def machine() -> dict[str, Any]:
    """GPU if there is one, processor, cores, threads, torch version and date."""
    gpu: dict[str, Any] = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    return {
        **gpu,
        "processor": processor(),
        "cores": cores,
        "threads": threads,
        "torch": torch.__version__,
        "date": f"{date.today()}",
    }


def processor() -> str:
    """The name of the processor model, or its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    try:
        auto_cli(bench, as_positional=False)
    except InputError as error:
        sys.exit(exit_with_sentence(error))
