"""`python experiments/gpu`: its clock, and its parts at reduced size on a CPU."""

import os
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import torch
from commands import ENVIRONMENT, ROOT
from jsonargparse import auto_cli

COMMAND = [sys.executable, "experiments/gpu"]


@pytest.fixture(scope="module")
def runner():
    return runpy.run_path(str(ROOT / "experiments/gpu/__main__.py"))


def test_the_clock_leaves_out_ends_and_goes_on(runner, tmp_path, capfd):
    gathered = []
    stubborn = f"trap '' TERM; echo begun; sleep 60 & echo $! > {tmp_path}/child; wait; sleep 60"
    part, shell = runner["Part"], lambda text: ["sh", "-c", text]
    runner["run_parts"].__globals__["GRACE"] = 0.2
    parts = {
        "fails": part([shell("echo why >&2; exit 3"), shell("echo more")], 0, 9),
        "runs over": part([shell(stubborn), shell("echo never")], 0, 1, gathered.append),
        "too long": part([shell("echo never")], 1e6, 1e6),
        "last": part([shell("echo $PYTHONUNBUFFERED")], 0, 9),
    }
    assert runner["run_parts"](parts, tmp_path, 30) == 1
    said = capfd.readouterr().out
    logs = {path.stem: path.read_text() for path in tmp_path.glob("*.log")}
    assert logs == {"fails": "why\nmore\n", "runs over": "begun\n", "last": "1\n"} and gathered == [tmp_path]
    table = said[said.index("| part |") :]
    for words in ("fails | 0 | failed with code 3", "| ended by the clock", "left out: it needs 1000000 s", "0 | ok |"):
        assert words in table, said
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # the child of what was killed is gone too
            os.kill(int((tmp_path / "child").read_text()), 0)
            time.sleep(0.05)
    assert runner["run_parts"]({"last": parts["last"], "too long": parts["too long"]}, tmp_path, 30) == 0


def test_a_signal_ends_the_part_that_runs(tmp_path):
    code = (
        "import runpy, signal, sys; from pathlib import Path\n"
        "gpu = runpy.run_path('experiments/gpu/__main__.py')\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"part = gpu['Part']([['sh', '-c', 'echo $$ > {tmp_path}/child; exec sleep 60']], 0, 60)\n"
        f"gpu['run_parts']({{'a': part}}, Path('{tmp_path}/out'), 60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT) as process:
        child = tmp_path / "child"
        while not (child.is_file() and child.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(child.read_text()), 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so():
    done = subprocess.run(COMMAND, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.startswith("make gpu needs a GPU") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("quick", [False, True])
def test_the_benchmark_understands_what_it_is_asked(runner, quick, tmp_path):
    bench = runpy.run_path(str(ROOT / "experiments/bench"))["bench"]
    parts = runner["parts_of"](tmp_path, tmp_path, quick)
    for name in ("speed", "compiled"):
        (command,) = parts[name].commands
        assert command[1] == "experiments/bench"
        with pytest.raises(SystemExit) as stop:
            auto_cli(bench, args=[*command[2:], "--print_config"], as_positional=False)
        assert stop.value.code == 0


def test_its_reduced_form_runs(tmp_path):
    """In a copy, as the study writes its figures beside its plan: a test, a recipe and an arm of each command.

    But for `speed`, which is the benchmark that has tests of its own, and `compiled`, which takes minutes.
    """
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    for name in ("cdm_lightning", "data", "tests", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    words = ["--quick", "true", "--out", "out", "--parts", "[correctness,training]"]
    done = subprocess.run(
        [*COMMAND, *words], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    out = tmp_path / "out"
    logs = "\n".join(path.read_text()[-3000:] for path in out.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert done.stdout.count(" | ok |") == 2
    assert "\npassed " in (out / "correctness.log").read_text()
    assert "reference deciding_one_model" in (out / "study.json").read_text()
    with tarfile.open(out / "samples-deciding_one_model-0.tar.gz") as tar:
        assert {f"deciding_one_model-0/{name}manifest.json" for name in ("", "train/32/")} <= set(tar.getnames())
