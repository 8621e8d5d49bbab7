"""Sampling that is killed, doubled or out of room: the same bytes in the end, and an end for all processes."""

import hashlib
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from folders import hashes
from small_models import smallest_stages

from cdm_lightning.cascade.bundle import write_bundle
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.sampling.sample import sample
from cdm_lightning.sampling.shared_work import end_with_first_process

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
BEFORE = """
import errno, os, signal, sys, time
from pathlib import Path
from cdm_lightning.__main__ import main
real, rank = Path.write_bytes, int(os.environ.get("LOCAL_RANK", 0))
def write_bytes(path, data):
    if ".tar." in path.name:
{how}
    return real(path, data)
Path.write_bytes = write_bytes
main()
"""
SLOWLY = "        real(path, data[: len(data) // 2]); time.sleep({})"
FULL = '        if rank == 1: real(path, data[:99]); raise OSError(errno.ENOSPC, "No space left on device")'
DEAD = "        if rank == 1: real(path, data[:99]); os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "b"
    write_bundle(folder, smallest_stages(("gaussian", "gaussian")), {"levels": [7, 3], "truncated": False})
    return folder


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
    process.wait(timeout=120)  # not for the pipe, which the others still hold
    assert process.returncode != 0


def draw_slowly(bundle: Path, out: Path, options: dict[str, int]) -> None:
    """`cdm sample` in a process of its own that was forked off, so that two of them begin at once."""
    real = Path.write_bytes

    def write_bytes(path: Path, data: bytes) -> int:
        if ".tar." in path.name:
            real(path, data[: len(data) // 2])
            time.sleep(0.03)
        return real(path, data)

    Path.write_bytes = write_bytes  # type: ignore[method-assign]
    sample(bundle, out, accelerator="cpu", **options)


def survive(
    tmp_path: Path, bundle: Path, count: int, kills: list[tuple[int, str]], seconds: float = 0.03
) -> dict[str, int]:
    """Kill a run again and again, finish it with two commands at once, and compare it with an unbroken one."""
    options = {"count": count, "block_size": 2}
    sample(bundle, tmp_path / "whole", **options)
    whole, out, moments = hashes(tmp_path / "whole"), tmp_path / "parts", random.Random()
    figures = {"kills": 0, "in a shard's writing": 0, "shards torn or of other bytes": 0}
    with ExitStack() as orphans:  # what the kill before left alive: it may go on beside the command after it
        for number, (devices, victim) in enumerate(kills):
            with ExitStack() as running:
                process = running.enter_context(
                    Command(tmp_path, bundle, SLOWLY.format(seconds), devices, out=out, **options)
                ).start()
                before = len(list(out.rglob("*.tar")))
                wait_for(process, lambda before=before: len(list(out.rglob("*.tar"))) > before)
                time.sleep(moments.uniform(0, 0.7))
                if number % 2 == 0:
                    wait_for(process, lambda: list(out.rglob("*.tar.*.partial")), pause=0.01)
                kill(process, victim)
                orphans.close()
                figures["kills"] += 1
                figures["in a shard's writing"] += victim == "all" and bool(list(out.rglob("*.tar.*.partial")))
                figures["shards torn or of other bytes"] += not hashes(out, "*.tar").items() <= whole.items()
                assert not list(out.glob("train/*/manifest.json")), f"finished before kill {number}: give more images"
                orphans.push(running.pop_all())
    finishing = [
        multiprocessing.get_context("fork").Process(target=draw_slowly, args=(bundle, out, options)) for _ in "ab"
    ]
    for process in finishing:
        process.start()
    for process in finishing:
        process.join(1200)
        assert process.exitcode == 0
    assert hashes(out) == whole, "other bytes, or a file too many"
    return figures


def wait_for(process: subprocess.Popen, happened: Callable[[], object], pause: float = 0.05) -> None:
    deadline = time.monotonic() + 300
    while not happened():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(pause)


def test_a_killed_run_ends_in_the_bytes_of_an_unbroken_one(bundle, tmp_path):
    figures = survive(tmp_path, bundle, 60, [(2, "all")], 0.1)
    assert figures["kills"] == 1 and figures["in a shard's writing"] >= 1
    assert figures["shards torn or of other bytes"] == 0


def ended(process: subprocess.Popen, seconds: float = 120) -> str:
    """What a process said that ended, and all that it started with it."""
    begun = time.monotonic()
    errors = process.communicate(timeout=seconds)[1]
    while members(process.pid):
        assert time.monotonic() - begun < seconds, "a process outlived the first one"
        time.sleep(0.1)
    return errors


@pytest.mark.parametrize(
    "devices, number, code",
    [
        pytest.param(1, "TERM", 143, marks=pytest.mark.long),
        (2, "TERM", 143),
        pytest.param(2, "KILL", -9, marks=pytest.mark.long),
    ],
)
def test_a_signal_to_the_first_process_ends_sampling_at_once_in_all(bundle, tmp_path, devices, number, code):
    options = {"count": 16, "block_size": 2}
    out = tmp_path / "s"
    with Command(tmp_path, bundle, SLOWLY.format(3), devices, out=out, **options) as command:
        process = command.start()
        wait_for(process, lambda: list(out.rglob("*.tar")))  # twenty seconds and more from its end
        os.kill(process.pid, getattr(signal, f"SIG{number}"))
        errors = ended(process)
    assert process.returncode == code and "Traceback" not in errors
    assert errors.count("SIGTERM: what is written stays, and the same command goes on") == (number == "TERM")
    assert not list(out.glob("train/*/manifest.json"))
    sample(bundle, tmp_path / "whole", **options)
    assert hashes(out, "*.tar").items() <= hashes(tmp_path / "whole").items()


def test_a_process_whose_first_has_ended_does_not_begin(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(prctl=lambda *arguments: 0))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("CDM_FIRST_PROCESS", str(os.getppid()))
    end_with_first_process()
    monkeypatch.setenv("CDM_FIRST_PROCESS", "1234567")
    with pytest.raises(SystemExit, match="143"):
        end_with_first_process()


@pytest.mark.long
def test_two_dozen_kills(bundle, tmp_path):
    victims = ["all", "all", "the first", "all", "one of the others"]
    kills = [(1 + number % 3, victims[number % 5]) for number in range(24)]
    figures = survive(tmp_path, bundle, 2400, kills, 0.5)
    print(figures)
    assert figures["kills"] == 24 and figures["in a shard's writing"] >= 9
    assert figures["shards torn or of other bytes"] == 0


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
        errors = [process.communicate(timeout=500)[1] for process in (first, second)]
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
