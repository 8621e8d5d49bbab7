"""`python experiments/gpu`: on a machine with a GPU, prove what runs there, measure its speed and train the study.

A list of parts in order of worth, each of which may fail alone. A clock leaves out what no longer fits and ends what
runs over. Output goes to OUT/<part>.log as it comes; figures are stored as soon as they are known.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli

PYTHON = sys.executable
PYTEST = [PYTHON, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
STUDY = Path("experiments/study")
CIFAR = Path("runs/data/cifar")
MEASURED = "^(search|reference)"  # FID and CAS can wait: the samples come back
GRACE = 10.0  # seconds between SIGTERM and SIGKILL
Name = Literal["correctness", "speed", "training", "compiled"]


@dataclass(frozen=True)
class Part:
    """Commands to run in order, the seconds that they need at least and may take at most, and what follows them."""

    commands: list[list[str]]
    least: float
    most: float
    after: Callable[[Path], None] = lambda out: None  # also when they failed or ran over: gathers what there is


def parts_of(out: Path, guided_diffusion: Path | None, quick: bool) -> dict[str, Part]:
    """All parts, in order of worth; quick: at reduced size, for a CPU."""
    compiled = Path("tests/gpu/test_with_compiler.py")
    tests = [compiled, *sorted(set(Path("tests/gpu").glob("test_*.py")) - {compiled})]  # the slowest first
    tests += [Path("tests") / name for name in ("planning/test_plan.py", "training/test_resume.py")]
    tests = [*map(str, tests), "tests/foundation/test_randomness.py", "-n", "8", "--dist", "worksteal"]
    bench = [PYTHON, "experiments/bench"]
    peer = ["--guided_diffusion", str(guided_diffusion)] if guided_diffusion else []
    data, plan = "cifar_wide" if CIFAR.exists() else "fashion_wide", STUDY / "wide/study.yaml"
    if quick:
        tests, bench = ["tests/gpu/test_equal_numbers.py", "-k", "detector"], [*bench, "--quick", "true"]
        data, plan = "fashion_wide", Path("experiments/gpu/quick.yaml")
    runs = Path("runs/study/quick" if quick else "runs/study")
    results = (runs if quick else STUDY) / "results" / f"{data}-0.json"
    measured = ["[recipes]"] if quick else ["[recipes,network,sampling]"]
    again = [*bench, "--parts", "[recipes]", "--compile", "true", "--out", str(out / "bench-compiled")]
    return {
        "correctness": Part([[*PYTEST, *tests]], 5 if quick else 40, 130),
        "speed": Part([[*bench, "--parts", *measured, "--out", str(out / "bench"), *peer]], 5 if quick else 30, 200),
        "training": Part(
            [[PYTHON, str(STUDY), data, "0", "--plan", str(plan), "--jobs", "1" if quick else "8", "--only", MEASURED]],
            5 if quick else 90, 1800, lambda out: pack(results, runs / data / "0", out),
        ),
        "compiled": Part([again], 5 if quick else 60, 600),
    }  # fmt: skip


def pack(results: Path, run: Path, out: Path) -> None:
    """The study's figures, its logs, and the samples of each deciding arm as a tar."""
    if results.is_file():
        shutil.copy(results, out / "study.json")
    samples = {f"samples-{folder.name}": folder for folder in run.glob("samples/deciding_*")}
    for name, folder in {"logs": run / "logs", **samples}.items():
        if folder.is_dir():
            with tarfile.open(out / f"{name}.tar.gz", "w:gz") as tar:
                tar.add(folder, folder.name)


def run_part(name: str, part: Part, out: Path, deadline: float) -> str:
    """Run a part until the deadline at most, and return how it ended."""
    codes = []
    with (out / f"{name}.log").open("wb") as log:
        for command in part.commands:
            if codes and time.monotonic() >= deadline:
                codes.append(None)
                break
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
            try:
                codes.append(process.wait(max(0, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                codes.append(None)
            finally:
                end(process)
            if codes[-1] is None:
                break
    try:
        part.after(out)
    except OSError as error:
        return f"failed: {error}"
    if None in codes:
        return "ended by the clock"
    return "ok" if not any(codes) else f"failed with code {next(filter(None, codes))}"


def end(process: subprocess.Popen[bytes]) -> None:
    """End a command with all that it started: SIGTERM, and SIGKILL where that does not do."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it left behind, too
    process.wait()


def run_parts(parts: dict[str, Part], out: Path, seconds: float) -> int:
    """Run the parts within the time, print how each ended, and return 1 if one failed, else 0."""
    out.mkdir(parents=True, exist_ok=True)
    start, rows = time.monotonic(), []
    for name, part in parts.items():
        begun = time.monotonic()
        left = start + seconds - begun
        if left < part.least:
            how = f"left out: it needs {part.least:.0f} s, and {max(0, left):.0f} are left"
        else:
            print(f"{begun - start:4.0f} s  {name}: {out / name}.log", flush=True)
            how = run_part(name, part, out, begun + min(part.most, left))
        rows.append((name, time.monotonic() - begun, how))
        print(f"{time.monotonic() - start:4.0f} s  {name} {how}", flush=True)
    print("\n| part | seconds | how it ended |\n|---|---|---|")
    print("\n".join(f"| {name} | {taken:.0f} | {how} |" for name, taken, how in rows), flush=True)
    return int(any(how.startswith("failed") for *_, how in rows))


def gpu(
    out: Path = Path("runs/gpu"),
    seconds: float = 460,
    parts: list[Name] = ["correctness", "speed", "training", "compiled"],  # noqa: B006, read only
    guided_diffusion: Path | None = None,
    quick: bool = False,
) -> None:
    """Test, measure and train on this machine's GPU, in the project's root.

    Args:
        out: Folder for the logs, figures and samples.
        seconds: The time for all parts. A part that no longer fits is left out.
        parts: What to run, in this order.
        guided_diffusion: A folder that holds guided_diffusion/, to measure its network too.
        quick: Run everything at reduced size on any machine, as a test; the results mean nothing.
    """
    if not quick and not torch.cuda.is_available():
        print("make gpu needs a GPU, and torch finds none here; --quick true runs a reduced form", file=sys.stderr)
        sys.exit(2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the part that runs, too
    known = parts_of(out, guided_diffusion, quick)
    sys.exit(run_parts({name: known[name] for name in parts}, out, seconds))


if __name__ == "__main__":
    auto_cli(gpu, as_positional=False)
