"""An hour of training and sampling: no growth of memory, file handles or processes.

CDM_SOAK_SECONDS (3600) says how long, CDM_SOAK_OUT (a temporary folder) where soak.csv, soak.png and the runs go.
"""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT
from matplotlib import pyplot
from scipy.stats import theilslopes
from small_models import smallest_stages

from cdm_lightning.cascade.bundle import write_bundle
from cdm_lightning.stages.loading import load_stage

MIB, WARM, GROWTH = 2**20, 0.2, 16.0  # warm: first part of the time, not judged. growth: MiB allowed over the rest
LOGGER = """
trainer:
  logger:
    - class_path: lightning.pytorch.loggers.CSVLogger
      init_args: {save_dir: "${trainer.default_root_dir}", name: logs}
"""


@contextmanager
def started(log: Path, *arguments: str) -> Iterator[subprocess.Popen]:
    """`cdm` in a session of its own; whatever is left of the session in the end is killed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "cdm_lightning", *arguments], env=environment, start_new_session=True,
            stdout=stream, stderr=stream, cwd=ROOT,
        )  # fmt: skip
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def members(session: int) -> list[Path]:
    """The folders in /proc of a session's processes."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(folder)
    return found


def state(session: int) -> dict[str, float]:
    """What a session's processes hold: memory of their own, handles, number.

    Memory: anonymous pages, those that several share divided among them; pages of files are the system's to keep, and
    their division depends on who else runs. Tensors on their way from a loader's worker are files in shared memory; as
    many as happen to wait are open.
    """
    sums = {"memory MiB": 0.0, "handles": 0.0, "waiting tensors": 0.0, "processes": 0.0}
    for folder in members(session):
        with suppress(OSError):  # one that ends meanwhile
            lines = (line.split() for line in (folder / "smaps_rollup").read_text().splitlines())
            memory = next(int(line[1]) / 1024 for line in lines if line[0] == "Pss_Anon:")
            handles = [os.readlink(file) for file in (folder / "fd").iterdir()]
            waiting = sum(name.startswith("/dev/shm/torch_") for name in handles)
            values = (memory, len(handles) - waiting, waiting, 1)
            for name, value in zip(sums, values, strict=True):
                sums[name] += value
    return sums


def size_of(folder: Path) -> float:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.lstat().st_size
    return total / MIB


def judge(rows: list[dict[str, float]]) -> dict[str, tuple[str, bool]]:
    """For each series, its growth after the warm-up in words, and whether it is allowed.

    Memory: the rise of the Theil-Sen line, which single peaks do not move. Handles and processes: the median of the
    last third must be that of the first, save for waiting tensors, of which a few batches more or less are no growth.
    Disk is told and not judged: logs and pictures are there to be kept.
    """
    rows = [row for row in rows if row["seconds"] >= WARM * rows[-1]["seconds"]]
    seconds, third, said = [row["seconds"] for row in rows], len(rows) // 3, {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name.endswith("MiB"):
            rise = float(theilslopes(values, seconds).slope) * (seconds[-1] - seconds[0])
            said[name] = (f"{rise:+.2f} MiB", "disk" in name or bool(rise < GROWTH))
        elif name != "seconds":
            before, after = np.median(values[:third]), np.median(values[-third:])
            spare = 64 if name.endswith("waiting tensors") else 0
            said[name] = (f"{before:g} -> {after:g}", bool(abs(after - before) <= spare))
    return said


def draw(rows: list[dict[str, float]], path: Path) -> None:
    names = [name for name in rows[0] if name != "seconds"]
    figure, axes = pyplot.subplots(len(names), 1, figsize=(8, 1.6 * len(names)), sharex=True)
    for name, axis in zip(names, axes, strict=True):
        axis.plot([row["seconds"] for row in rows], [row[name] for row in rows], linewidth=1)
        axis.set_title(name, fontsize=8, loc="left")
    axes[-1].set_xlabel("seconds")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def test_the_judge_tells_a_leak_from_noise():
    noise, seconds = np.random.default_rng(0), np.linspace(0, 3600, 360)
    flat = 500 + noise.normal(0, 20, 360) + 200 * (seconds < 500)  # a high start is no leak, nor hides one
    for leak, allowed in ((0.0, True), (30.0, False)):  # MiB an hour
        rows = [{"seconds": t, "fit memory MiB": v + leak * t / 3600} for t, v in zip(seconds, flat, strict=True)]
        assert judge(rows)["fit memory MiB"][1] is allowed
    for leak, allowed in ((0, True), (1, False)):
        rows = [{"seconds": t, "fit handles": 40 + (t % 100 < 10) + leak * (t > 1800)} for t in seconds]
        assert judge(rows)["fit handles"][1] is allowed


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_training_and_sampling_do_not_grow(tmp_path):
    out, length = Path(os.environ.get("CDM_SOAK_OUT", tmp_path)), float(os.environ.get("CDM_SOAK_SECONDS", 3600))
    out.mkdir(parents=True, exist_ok=True)
    for name in ("fit", "samples", "again"):
        shutil.rmtree(out / name, ignore_errors=True)
    write_bundle(out / "bundle", smallest_stages(("gaussian",), sampling_steps=10), {"levels": [7], "truncated": False})
    (out / "logger.yaml").write_text(LOGGER)
    configs = ["experiments/defaults.yaml", "experiments/fashion/defaults.yaml", "experiments/fashion/base8.yaml"]
    fit = ["fit", *(f"--config={file}" for file in (*configs, out / "logger.yaml"))]
    fit += [f"--trainer.default_root_dir={out / 'fit'}", "--trainer.max_steps=1000000000", "--data.num_workers=2"]
    fit += ["--trainer.val_check_interval=40", "--trainer.limit_val_batches=2", "--trainer.devices=1"]
    fit += ["--model.channels=16", "--model.norm_groups=4", "--data.batch_size=16", "--trainer.accelerator=cpu"]
    sample = ["sample", f"--bundle={out / 'bundle'}", "--accelerator=cpu"]
    with ExitStack() as stack:
        fitting = stack.enter_context(started(out / "fit.log", *fit))
        sampling = stack.enter_context(
            started(out / "sample.log", *sample, f"--out={out / 'samples'}", "--count=100000000")
        )
        again = watch(out, length, {"fit": fitting, "sample": sampling}, [*sample, f"--out={out / 'again'}"])
        fitting.send_signal(signal.SIGTERM)
        fitting.wait(timeout=300)
        time.sleep(10)
        assert not members(fitting.pid), "training was ended and left processes behind"
    load_stage(out / "fit" / "checkpoints" / "last.ckpt")
    rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader((out / "soak.csv").open())]
    draw(rows, out / "soak.png")
    said, checkpoints = judge(rows), len(list((out / "fit" / "checkpoints").iterdir()))
    print(f"{rows[-1]['seconds']:.0f} s, {len(rows)} looks, {again} short sampling runs, {checkpoints} checkpoints")
    print(
        "\n".join(f"{name}: {growth}, at most {max(r[name] for r in rows):.0f}" for name, (growth, _) in said.items())
    )
    assert all(allowed for _, allowed in said.values()), {name for name, (_, allowed) in said.items() if not allowed}
    assert checkpoints <= 2


def watch(out: Path, length: float, processes: dict[str, subprocess.Popen], again: list[str]) -> int:
    """Write a row of soak.csv every so often; beside it start short sampling runs, and count those that ended well."""
    grids, shards = out / "fit" / "grids", out / "samples" / "train" / "16"
    deadline = time.monotonic() + 600
    while len(list(grids.glob("*"))) < 25 or not list(shards.glob("*")):  # matplotlib's heap settles after about 20
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes.values()), "see the logs"
        time.sleep(0.5)
    begin, done, turn, row = time.monotonic(), 0, 0.0, {}
    with (out / "soak.csv").open("w", newline="") as file, ExitStack() as stack:
        short: subprocess.Popen | None = None
        while (now := time.monotonic() - begin) < length:
            first, row = not row, {"seconds": round(now, 1)}
            for name, process in processes.items():
                assert process.poll() is None, f"{name} ended with {process.returncode}: see {out / name}.log"
                row |= {f"{name} {what}": value for what, value in state(process.pid).items()}
            shared = os.statvfs("/dev/shm")
            row["shared memory MiB"] = (shared.f_blocks - shared.f_bfree) * shared.f_frsize / MIB
            row["disk of training MiB"] = size_of(out / "fit")
            table = csv.DictWriter(file, list(row))
            if first:
                table.writeheader()
            table.writerow(row)
            file.flush()
            if short is not None and short.poll() is not None:
                assert short.returncode == 0, f"see {out / 'again.log'}"
                assert not members(short.pid), "a sampling run left processes behind"
                short, done = None, done + 1
                stack.close()
            if short is None and now >= turn:
                shutil.rmtree(out / "again", ignore_errors=True)
                short, turn = stack.enter_context(started(out / "again.log", *again, "--count=20")), now + length / 30
            time.sleep(max(0.5, length / 360))
    return done
