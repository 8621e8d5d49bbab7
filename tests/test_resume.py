"""A run that is killed and started again by the same command ends in the bits, and the log, of the unbroken run."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from cdm_lightning import InputError
from cdm_lightning.cli import main
from cdm_lightning.resume import newest_checkpoint, run_id

ROOT = Path(__file__).parents[1]
SETTINGS = {  # everything that a state must be saved for: averages, accumulation, dropout, workers, a falling rate
    "model.dropout": 0.1, "model.decay_fraction": 0.5, "model.warmup_steps": 4, "model.sampling_steps": 2,
    "data.batch_size": 16, "data.num_workers": 2, "trainer.accumulate_grad_batches": 2, "trainer.accelerator": "cpu",
    "trainer.log_every_n_steps": 3, "trainer.limit_val_batches": 1, "trainer.val_check_interval": 12,
    "trainer.enable_progress_bar": "false", "trainer.enable_model_summary": "false",
    "trainer.logger": "lightning.pytorch.loggers.CSVLogger",
}  # fmt: skip
NETWORK = {"model.channels": 16, "model.num_heads": 2, "model.norm_groups": 8}


def command(run, **options):
    """The arguments of `cdm fit` on the demo's base stage with a checkpoint every other step."""
    files = [ROOT / "experiments/defaults.yaml", ROOT / "experiments/fashion/defaults.yaml"]
    files += [ROOT / "experiments/fashion/base8.yaml", run / "callbacks.yaml"]
    run.mkdir(exist_ok=True)
    saver = {"class_path": "cdm_lightning.resume.Checkpoint", "init_args": {"every_n_train_steps": 2}}
    callbacks = yaml.safe_load((ROOT / "experiments/fashion/defaults.yaml").read_text())["trainer"]["callbacks"]
    kept = [c for c in callbacks if not c["class_path"].endswith(("Checkpoint", "SampleGrid", "LossCurve"))]
    (run / "callbacks.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [*kept, saver]}}))
    options = {**SETTINGS, "data.root": ROOT / "data/fashion", **options}
    options |= {"trainer.default_root_dir": run, "trainer.logger.save_dir": run}
    return ["fit", *(f"--config={f}" for f in files), *(f"--{name}={value}" for name, value in options.items())]


def start(run, **options):
    """`cdm fit` in a process group of its own, its output in run/output.txt."""
    arguments = command(run, **options)
    with (run / "output.txt").open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "cdm_lightning", *arguments], stdout=output, stderr=output, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT)}, cwd=ROOT,
        )  # fmt: skip


def finish(run, **options):
    process = start(run, **options)
    try:
        assert process.wait(timeout=400) == 0, (run / "output.txt").read_text()[-3000:]
    finally:
        kill(process)


def kill(process):
    """SIGKILL for the process, its ranks and their workers."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait(timeout=60)


def wait_for(process, condition, timeout=200):
    """Poll until the condition holds; False where the process ended before."""
    end = time.monotonic() + timeout
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.0005)
    return False


def differences(a, b, path=""):
    """Where two checkpoints differ; places of files, and counters of batches that were only fetched, do not count."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{path}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [d for key in a for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same or (isinstance(a, str) and "/" in a) else [f"{path}: {a} {b}"]


def last(run):
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


def same_run(whole, parts):
    """Where the ends of two runs differ."""
    a, b = last(whole), last(parts)
    return [d for d in differences(a, b) if not d.startswith(("/callbacks/Checkpoint", "/callbacks/ModelCheckpoint"))]


def curve(run):
    """{(step, figure): value} of all starts of a run; a step that was logged twice must have been logged alike."""
    points = {}
    for file in sorted(run.glob("**/metrics.csv"), key=lambda f: f.stat().st_mtime_ns):
        with file.open() as lines:
            for row in csv.DictReader(lines):
                for name, value in row.items():
                    if value and name not in ("step", "epoch"):
                        key = (int(row["step"]), name)
                        assert points.setdefault(key, value) == value, f"{key} in {file}: {points[key]} and {value}"
    return points


def survive(tmp_path, kills, seed, **options):
    """Kill a run at random moments, every third time while a checkpoint is being written; it must end as unbroken."""
    finish(tmp_path / "whole", **options)
    parts, chance, torn = tmp_path / "parts", random.Random(seed), 0
    done = 0
    while done < kills:
        process = start(parts, **options)
        try:
            versions = len(list(parts.glob("**/metrics.csv")))
            if done % 3 == 2:
                hit = wait_for(process, lambda: any(parts.glob("checkpoints/*.partial")))
                torn += hit
            else:
                begun = (parts / "checkpoints/last.ckpt").stat().st_mtime_ns if newest(parts) else 0
                hit = wait_for(process, lambda begun=begun: newest(parts) and newest(parts).stat().st_mtime_ns > begun)
                time.sleep(chance.uniform(0, options.pop("spread", 2.0)))
            if process.poll() == 0:
                break  # it came to its end before
        finally:
            kill(process)
        done += 1
    finish(parts, **options)
    print(f"{done} kills, {torn} of them while a checkpoint was being written, {versions} logs")
    assert done == kills
    assert same_run(tmp_path / "whole", parts) == []
    assert curve(parts) == curve(tmp_path / "whole")
    assert not list(parts.glob("checkpoints/*.partial"))


def newest(run):
    file = run / "checkpoints/last.ckpt"
    return file if file.is_file() else None
