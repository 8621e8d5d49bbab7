"""Sampling that is killed, out of room, uneven, doubled or large: the same bytes, a clear end, flat memory."""

import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny

from cdm_lightning import InputError
from cdm_lightning.bundle import write_bundle
from cdm_lightning.sample_blocks import BlockWriter, SampleManifest
from cdm_lightning.sampling import sample

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
BEFORE = """
import errno, os, signal, sys, time
from pathlib import Path
from cdm_lightning.cli import main
real, rank = Path.write_bytes, int(os.environ.get("LOCAL_RANK", 0))
def write_bytes(path, data):
    if ".tar." in path.name:
{how}
    return real(path, data)
Path.write_bytes = write_bytes
main()
"""
SLOWLY = "        real(path, data[: len(data) // 2]); time.sleep(0.03)"
FULL = '        if rank == 1: real(path, data[:99]); raise OSError(errno.ENOSPC, "No space left on device")'
DEAD = "        if rank == 1: real(path, data[:99]); os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "b"
    write_bundle(folder, tiny(("gaussian", "gaussian")), {"levels": [7, 3], "truncated": False})
    return folder


def hashes(folder: Path, pattern: str = "*") -> dict[str, str]:
    """SHA-256 of every file of a folder of samples but its picture."""
    files = [p for p in folder.rglob(pattern) if p.is_file() and p.name != "samples.png"]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


class Command:
    """`cdm sample` in a session of its own, with the way shards are written replaced."""

    def __init__(self, tmp_path: Path, bundle: Path, how: str, devices: int, **options: object) -> None:
        script = tmp_path / f"{hashlib.sha256(how.encode()).hexdigest()[:8]}.py"
        script.write_text(BEFORE.format(how=how))
        options = {"bundle": bundle, "devices": devices, "accelerator": "cpu", **options}
        self.arguments = [sys.executable, str(script), "sample", *(f"--{k}={v}" for k, v in options.items())]
        self.processes: list[subprocess.Popen] = []

    def start(self, **environment: str) -> subprocess.Popen:
        process = subprocess.Popen(
            self.arguments, env=ENVIRONMENT | environment, start_new_session=True, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def members(session: int) -> list[int]:
    """The living processes of a session that draw, its leader first."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rsplit(")", 1)[1].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return sorted(found)


def kill(process: subprocess.Popen, victim: str) -> None:
    """SIGKILL for the whole session, for its first process alone, or for one of the others, which ends the first."""
    others = [pid for pid in members(process.pid) if pid != process.pid]
    if victim == "one of the others" and others:
        os.kill(others[0], signal.SIGKILL)
    elif victim == "the first":
        process.kill()  # the others draw on beside the next command, until they wait for it
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0


def survive(tmp_path: Path, bundle: Path, count: int, kills: list[tuple[int, str]]) -> dict[str, int]:
    """Kill a run again and again, finish it with two commands at once, and compare it with an unbroken one."""
    options = {"count": count, "block_size": 2}
    sample(bundle, tmp_path / "whole", **options)
    whole, out, figures = hashes(tmp_path / "whole"), tmp_path / "parts", {"kills": 0, "in a shard's writing": 0}
    moments = random.Random()
    for number, (devices, victim) in enumerate(kills):
        with Command(tmp_path, bundle, SLOWLY, devices, out=out, **options) as command:
            before = len(list(out.rglob("*.tar")))
            process = command.start()
            wait_for(lambda: len(list(out.rglob("*.tar"))) > before, process)  # noqa: B023, called at once
            time.sleep(moments.uniform(0, 0.7))
            if number % 2 == 0:
                wait_for(lambda: list(out.rglob("*.tar.*.partial")), process, pause=0.001)
            kill(process, victim)
            stored, partial = hashes(out, "*.tar"), list(out.rglob("*.tar.*.partial"))
            figures["kills"] += 1
            figures["in a shard's writing"] += bool(partial)
            assert not list(out.rglob("train/*/manifest.json")), f"finished before kill {number}: give more images"
            assert stored.items() <= whole.items(), f"a shard of another content after kill {number}"
    with Command(tmp_path, bundle, SLOWLY, 1, out=out, **options) as command:
        for process in [command.start(), command.start()]:
            assert process.communicate(timeout=600)[1] is not None and process.returncode == 0
    assert hashes(out) == whole, "other bytes, or a file too many"
    return figures


def wait_for(happened, process: subprocess.Popen, pause: float = 0.01) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(pause)


def test_a_killed_run_ends_in_the_bytes_of_an_unbroken_one(bundle, tmp_path):
    figures = survive(tmp_path, bundle, 120, [(2, "all"), (1, "all")])
    assert figures == {"kills": 2, "in a shard's writing": figures["in a shard's writing"]}
    assert figures["in a shard's writing"] >= 1


@pytest.mark.long
def test_thirty_kills(bundle, tmp_path):
    victims = ["all", "all", "the first", "all", "one of the others"]
    kills = [(1 + number % 3, victims[number % 5]) for number in range(30)]
    figures = survive(tmp_path, bundle, 4000, kills)
    print(figures)
    assert figures["kills"] == 30 and figures["in a shard's writing"] >= 10


# -- processes that end before the others


def start_by_hand(command: Command, world: int) -> list[subprocess.Popen]:
    """The processes as torchrun starts them: no launcher of Lightning's watches over them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_PORT": port, "GROUP_RANK": "0"}
    shared |= {"TORCHELASTIC_RUN_ID": "0"}
    return [command.start(RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(world)]


@pytest.mark.parametrize(
    "how, code, sentence",
    [
        pytest.param(FULL, 2, "could not be written: No space left on device", id="full disk"),
        pytest.param(DEAD, -signal.SIGKILL, "", id="killed", marks=pytest.mark.long),
    ],
)
def test_no_process_waits_for_one_that_ended(bundle, tmp_path, how, code, sentence):
    options = {"count": 8, "block_size": 2}
    sample(bundle, tmp_path / "whole", **options)
    with Command(tmp_path, bundle, how, 2, out=tmp_path / "s", **options) as command:
        first, second = start_by_hand(command, 2)
        errors = [process.communicate(timeout=240)[1] for process in (first, second)]
    assert second.returncode == code and sentence in errors[1], errors[1]
    assert first.returncode == 2, errors[0]
    assert (
        errors[0]
        .rstrip()
        .endswith(
            "cdm: error: another process of this run ended before its time: what is written stays, "
            "and the same command goes on"
        )
    )
    stored = hashes(tmp_path / "s", "*.tar")
    assert len(stored) == 2 * 3 and stored.items() <= hashes(tmp_path / "whole").items()  # the first one's two blocks
    sample(bundle, tmp_path / "s", **options)
    assert hashes(tmp_path / "s") == hashes(tmp_path / "whole")


def test_a_shard_that_is_not_whole_is_refused_before_the_folder_is_closed(bundle, tmp_path):
    sample(bundle, tmp_path / "s", count=6, block_size=2)
    expected, folder = hashes(tmp_path / "s"), tmp_path / "s" / "train" / "16"
    (folder / "manifest.json").unlink()
    for torn, reason in ((b"", "cannot be read: ReadError: empty file"), (bytes(10240), "holds 0 images")):
        (folder / "000001.tar").write_bytes(torn)
        with pytest.raises(InputError, match=rf"16/000001.tar {reason}.*; remove it"):
            sample(bundle, tmp_path / "s", count=6, block_size=2)
    (folder / "000001.tar").unlink()
    sample(bundle, tmp_path / "s", count=6, block_size=2)
    assert hashes(tmp_path / "s") == expected


# -- other choices from the same low resolution


@pytest.mark.parametrize("resolution, levels", [(8, [2, 11]), (16, [7, 11])])
def test_another_s_from_stored_images_is_the_run_in_one_go(bundle, tmp_path, resolution, levels):
    sample(bundle, tmp_path / "before", count=5, block_size=2)
    sample(bundle, tmp_path / "whole", count=5, block_size=2, levels=levels)
    start = tmp_path / "before" / "train" / str(resolution)
    sample(bundle, tmp_path / "on", count=5, block_size=2, levels=levels, start=start)
    whole, made = hashes(tmp_path / "whole", "*.tar"), hashes(tmp_path / "on", "*.tar")
    assert len(made) == 3 * (2 if resolution == 8 else 1) and made.items() <= whole.items()
    assert not made.items() & hashes(tmp_path / "before", "*.tar").items()


# -- 50,000 images


def test_the_size_of_a_run_is_no_part_of_a_block():
    few, many = (SampleManifest("", n, [7, 2, 5], 0, 4, [], False, [], []) for n in (12, 10**15))
    assert many.blocks == 25 * 10**13
    for name, value in few.block(2).items():
        assert torch.equal(value, many.block(2)[name])
    assert few.block(2)["label"].tolist() == few.labels()[8:].tolist() == [5, 7, 2, 5]


def measure(out: Path, monkeypatch: pytest.MonkeyPatch, count: int, **options: object) -> tuple[list[int], list[float]]:
    """Resident memory in bytes and seconds of CPU time of this process after every block."""
    resident, seconds, real = [], [], BlockWriter.write_on_batch_end

    def write(self, *arguments):
        real(self, *arguments)
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE"))
        seconds.append(time.process_time())

    with monkeypatch.context() as patch:
        patch.setattr(BlockWriter, "write_on_batch_end", write)
        sample(out=out, count=count, sampling_steps=[1, 1], classes=[0, 1, 2], **options)
    return resident, seconds


def check_flat(resident: list[int], seconds: list[float], blocks: int, bound: int) -> dict[str, float]:
    """No growth of memory from the first tenth of a run to its end, nor of the time a block takes."""
    tenth = blocks // 10
    assert len(resident) == blocks
    steps = np.diff(seconds)
    figures = {
        "growth in MiB": (max(resident[-tenth:]) - max(resident[:tenth])) / 2**20,
        "resident in MiB": max(resident) / 2**20,
        "CPU ms a block, first tenth": 1e3 * float(np.median(steps[:tenth])),
        "CPU ms a block, last tenth": 1e3 * float(np.median(steps[-tenth:])),
    }
    print({name: round(value, 2) for name, value in figures.items()})
    assert figures["growth in MiB"] < bound
    assert figures["CPU ms a block, last tenth"] < 1.5 * figures["CPU ms a block, first tenth"]
    return figures


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "b"
    write_bundle(folder, tiny(("none",)), {"levels": [0], "truncated": False})
    return folder


def test_memory_and_time_are_flat_over_two_thousand_images(two_stages, tmp_path, monkeypatch):
    """From stored images, so that reading them is part of it."""
    sample(two_stages, tmp_path / "warm", count=20, sampling_steps=[1, 1])
    for out, start in (("a", None), ("b", tmp_path / "a" / "train" / "8")):
        figures = measure(tmp_path / out, monkeypatch, 2000, bundle=two_stages, start=start, block_size=20)
        check_flat(*figures, blocks=100, bound=2)


@pytest.mark.long
def test_memory_and_time_are_flat_from_1000_to_50000_images(two_stages, tmp_path, monkeypatch):
    sample(two_stages, tmp_path / "warm", count=1000, sampling_steps=[1, 1])
    peaks = {}
    for count in (1000, 50_000):
        for out, start in ((f"a{count}", None), (f"b{count}", tmp_path / f"a{count}" / "train" / "8")):
            figures = measure(tmp_path / out, monkeypatch, count, bundle=two_stages, start=start, block_size=50)
            peaks[out] = check_flat(*figures, blocks=count // 50, bound=8)["resident in MiB"]
    assert peaks["a50000"] - peaks["a1000"] < 16 and peaks["b50000"] - peaks["b1000"] < 16


# -- what a person sees


def test_a_log_says_how_far_all_processes_are(bundle, tmp_path, capfd):
    sample(bundle, tmp_path / "s", count=10, block_size=2)
    for path in (tmp_path / "s").rglob("00000[34].tar"):
        path.unlink()
    capfd.readouterr()
    sample(bundle, tmp_path / "s", count=10, block_size=2)
    lines = [line for line in capfd.readouterr().err.replace("\r", "").splitlines() if "sampling" in line]
    assert lines[0].startswith("sampling: 60%, 6 of 10 [") and lines[-1].startswith("sampling: 100%, 10 of 10 [")
    assert lines[-1].endswith("image/s]")
