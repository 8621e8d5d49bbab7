"""Start-up benchmark: CPU time of the command line's help texts and errors, compared with Python and import torch."""

from __future__ import annotations

import os
import subprocess
import sys
from statistics import median

# The modules of the standard library that `cdm --help` imports.
STANDARD = (
    "import contextlib, dataclasses, importlib, logging, multiprocessing, os, pathlib, secrets, sys, tempfile, "
    "threading, time, typing, warnings"
)
CDM = [sys.executable, "-m", "cdm_lightning"]
ANSWERS = {
    "cdm --help": ["--help"],
    "cdm --version": ["--version"],
    "an unknown command": ["nonsense"],
    **{f"cdm {command} --help": [command, "--help"] for command in ("bundle", "sample", "evaluate", "search", "cas")},
    **{f"cdm {command} --help": [command, "--help"] for command in ("reference", "npz", "detector", "sweep", "plan")},
    "cdm prepare imagenet --help": ["prepare", "imagenet", "--help"],
    "cdm sample with a wrong option": ["sample", "--cuont", "3"],
    "cdm fit --help": ["fit", "--help"],
}
BARE, TORCH = "python, standard library", "python, import torch"


def run(quick: bool = False) -> dict[str, float]:
    """CPU seconds (user and system) of each command, as medians over rounds in which all take turns."""
    commands = {BARE: [sys.executable, "-c", STANDARD], TORCH: [sys.executable, "-c", "import torch"]}
    commands |= {name: [*CDM, *arguments] for name, arguments in ANSWERS.items()}
    if quick:
        commands = {name: commands[name] for name in (BARE, TORCH, "cdm --help")}
    rounds = [{name: processor_time(command) for name, command in commands.items()} for _ in range(1 if quick else 5)]
    return {name: median(one[name] for one in rounds) for name in commands}


def processor_time(command: list[str]) -> float:
    """CPU seconds of a command, user and system."""
    before = os.times()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def table(found: dict[str, float]) -> str:
    """A Markdown table of the CPU seconds, also relative to Python alone and to import torch."""
    lines = ["| start-up | CPU seconds | relative to bare python | relative to import torch |", "|---|---|---|---|"]
    for name, seconds in found.items():
        lines.append(f"| {name} | {seconds:.2f} | {seconds / found[BARE]:.1f} | {seconds / found[TORCH]:.2f} |")
    return "\n".join(lines)
