"""The benchmark at reduced size: that it runs, and that its figures are those of what it says it measures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "experiments" / "bench"


def run(tmp_path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments, "--out", str(tmp_path / "bench")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


def test_every_part_runs_and_is_written_down(tmp_path):
    done = run(tmp_path, str(BENCH), "--quick", "true")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "bench/results.json").read_text())
    network = found["network"]
    assert len(set(network["parameters"].values())) == 1, "the peers are not of one size"
    for own in network["fp32"]["contestants"].values():
        for what, factor in (("forward", 1), ("gradients", 3), ("step", 3)):
            flops = factor * network["flops"] * network["size"]["batch"]
            assert own[what]["flops"] * own[what]["seconds"] == pytest.approx(flops)
    assert network["fp32"]["contestants"]["ours"]["step"]["ours_faster"] == 1
    assert all(kept > 0 for kept in network["fp32"]["kept"].values())
    assert sum(network["fp32"]["profile"].values()) == pytest.approx(1)
    assert network["fp32"]["profile"]["convolution, forward"] > 0.01
    [row] = found["recipes"]["base8"]["None"]
    assert row["images_a_second"] > 0 and row["memory_on_paper"] > 1e6 and row["batch"] == 8
    loops = found["sampling"]["loops"]
    assert {"base8", "sr16", "sr32"} <= set(loops) and all(own["network_ms"] > 0 for own in loops.values())
    assert found["data"]["rates"].keys() == {"32", "64"}
    assert {name: len(curve) for name, curve in found["growth"].items()} == {
        "resolution": 2, "batch": 2, "stages": 3, "images": 2,
    }  # fmt: skip
    assert (tmp_path / "bench/growth.png").stat().st_size > 1000
    written = (tmp_path / "bench/results.md").read_text()
    assert all(name in written for name in ("diffusers", "base8", "packed", "resolution"))
    assert all(part in done.stdout for part in written.split("\n\n")[1:])


def test_no_checkout_is_one_sentence(tmp_path):
    done = run(tmp_path, str(BENCH), "--quick", "true", "--parts", "[network]", "--guided_diffusion", str(tmp_path))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{tmp_path} is no checkout of guided-diffusion" in done.stderr


def test_quality_against_cost(tmp_path):
    options = ["--n", "20", "--steps", "[2]", "--samplers", "[ddpm,dpm++]"]
    done = run(tmp_path, str(BENCH / "samplers.py"), *options)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "bench/results.json").read_text())
    assert [(row["sampler"], row["calls"], row["n"]) for row in rows] == [("ddpm", 6, 20), ("dpm++", 6, 20)]
    assert all(row["value"] > 0 and row["key"] == "fd" for row in rows)
    assert (tmp_path / "bench/curve.png").stat().st_size > 1000 and "| dpm++ | 2 | 6 |" in done.stdout
