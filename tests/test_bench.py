"""The benchmark at reduced size: that it runs, and that its figures are those of what it says it measures."""

import gc
import importlib.util
import json
import os
import runpy
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT

BENCH = ROOT / "experiments" / "bench"


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """A function that runs a file or folder of the benchmark as `python` would, and gives what it printed."""
    monkeypatch.chdir(ROOT)
    modules = set(sys.modules)

    def as_main(path: Path, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(path), *arguments, "--out", str(tmp_path / "bench")])
        monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
        capsys.readouterr()
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    yield as_main
    for name in set(sys.modules) - modules:
        if (Path(getattr(sys.modules[name], "__file__", None) or "x")).parent == BENCH:
            del sys.modules[name]  # its files have common names: data, network


def test_every_part_runs_and_is_written_down(tmp_path, run, monkeypatch):
    monkeypatch.setattr(
        os, "sched_getaffinity", lambda _: {0}
    )  # no measurement of all cores, whose number may be large
    said = run(BENCH, "--quick", "true")
    found = json.loads((tmp_path / "bench/results.json").read_text())
    [network] = found["network"].values()
    assert len(set(network["parameters"].values())) == 1, "the peers are not of one size"
    for own in network["contestants"].values():
        for what, factor in (("forward", 1), ("gradients", 3), ("step", 3)):
            flops = factor * network["flops"] * network["size"]["batch"]
            assert own[what]["flops"] * own[what]["seconds"] == pytest.approx(flops)
    assert network["contestants"]["ours"]["step"]["ours_faster"] == 1
    assert all(kept > 0 for kept in network["kept"].values())
    assert sum(network["profile"].values()) == pytest.approx(1)
    assert network["profile"]["convolution, forward"] > 0.01
    [row] = found["recipes"]["base8"]["None"]
    assert found["recipes"]["copy"] > 1e6
    assert row["images_a_second"] > 0 and row["memory_on_paper"] > 1e6 and row["batch"] == 8
    loops = found["sampling"]["loops"]
    assert {"base8", "sr16", "sr32"} <= set(loops) and all(own["network_ms"] > 0 for own in loops.values())
    assert found["data"]["rates"].keys() == {"32", "64"}
    assert found["data"]["rates"]["64"].keys() == {"packed", "png", "jpeg", "copy"}
    assert all(rate > 0 for ways in found["data"]["rates"].values() for rates in ways.values() for rate in rates)
    ways = {f"{form}, {n} workers" for form in ("packed", "png") for n in (0, 1)}
    assert found["data"]["loader"]["32"].keys() == ways and "prepare, all packed" in found["data"]["prepare"]
    assert {name: len(curve) for name, curve in found["growth"].items()} == {
        "resolution": 2, "batch": 2, "stages": 3, "images": 2,
    }  # fmt: skip
    assert (tmp_path / "bench/growth.png").stat().st_size > 1000
    written = (tmp_path / "bench/results.md").read_text()
    assert all(name in written for name in ("diffusers", "base8", "64x64", "packed", "resolution"))
    assert all(part in said for part in written.split("\n\n")[1:])


def test_preparing_is_measured_on_several_cores(tmp_path):
    """With one worker, whose rate it computes as that of many."""
    spec = importlib.util.spec_from_file_location("bench_data", BENCH / "data.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    (tmp_path / "raw/a").mkdir(parents=True)
    for number in range(6):
        (tmp_path / f"raw/a/{number}.jpg").write_bytes(bench.photograph(np.random.default_rng(number)))
    rates = bench.on_all_cores(tmp_path / "raw", tmp_path / "out", 6, 1, resolutions=[32], packed=32)
    assert all(rate > 0 for rate in rates)


def test_networks_too_large_together_are_measured_apart(monkeypatch, capsys):
    """As on a GPU: one exists at a time, and one that does not fit by itself leaves the figures of the others."""
    spec = importlib.util.spec_from_file_location("bench_network", BENCH / "network.py")
    bench = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_network", bench)  # where its dataclasses are looked up
    spec.loader.exec_module(bench)
    alive = weakref.WeakSet()

    def out_of_memory():
        raise torch.OutOfMemoryError("too large")

    def alone(build, fits=True):
        def builder(*arguments):
            gc.collect()
            assert not alive
            contestant = build(*arguments)
            alive.add(contestant.network)
            if not fits:  # in its third round
                updates = iter([contestant.update, contestant.update])
                contestant.update = lambda: next(updates, out_of_memory)()
            return contestant

        return builder

    ours, size, saved = bench.ours, bench.Size(16, 32, 1, 2), []
    monkeypatch.setattr(bench, "ours", alone(ours))
    monkeypatch.setattr(bench, "diffusers", alone(bench.diffusers, fits=False))
    monkeypatch.setattr(bench, "guided_diffusion", alone(lambda size, device, _: ours(size, device)))
    found = bench.compare(size, torch.device("cpu"), True, Path("x"), False, 2, saved.append, apart=True)
    for part in ("contestants", "kept", "parameters"):
        assert found[part].keys() == {"ours", "guided-diffusion"}
    assert found["rounds"] == 2 and len(saved) == 5 and "diffusers, batch 2: too large" in capsys.readouterr().out


def test_no_checkout_is_one_sentence(tmp_path, run, capsys):
    with pytest.raises(SystemExit) as stop:
        run(BENCH, "--quick", "true", "--parts", "[network]", "--guided_diffusion", str(tmp_path))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in said
    assert f"{tmp_path} is no checkout of guided-diffusion" in said


def test_quality_against_cost(tmp_path, run):
    options = ["--n", "20", "--steps", "[2]", "--samplers", "[ddpm,dpm++]"]
    said = run(BENCH / "samplers.py", *options)
    rows = json.loads((tmp_path / "bench/results.json").read_text())
    assert [(row["sampler"], row["calls"], row["n"]) for row in rows] == [("ddpm", 6, 20), ("dpm++", 6, 20)]
    assert all(row["value"] > 0 and row["key"] == "fd" for row in rows)
    assert (tmp_path / "bench/curve.png").stat().st_size > 1000 and "| dpm++ | 2 | 6 |" in said


def test_reading_from_an_address(tmp_path, run):
    said = run(BENCH / "addresses.py", "--shards", "5", "--images", "20", "--rounds", "1")
    rows = json.loads((tmp_path / "bench/addresses.json").read_text())
    assert rows["disk, 2 workers"]["of_disk"] == 1 and rows["empty cache, 0 workers"]["rate"] > 0
    assert "full cache, 2 workers: " in said
