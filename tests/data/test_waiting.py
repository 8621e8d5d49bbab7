"""No wait for images is without an end, and a training that waits for them is saved when it is told to stop."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from commands import ENVIRONMENT, fit_command
from folders import make_folder
from refusals import sentence_of_error, sentence_of_refusal
from torch import multiprocessing

from cdm_lightning.__main__ import main
from cdm_lightning.data import ShardDataModule, datamodule
from cdm_lightning.data.shards import read_manifest
from cdm_lightning.data.stream import ShardStream
from cdm_lightning.foundation import process_group
from cdm_lightning.foundation.errors import user_error

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]


@pytest.fixture
def root(tmp_path):
    """Three shards of four images to train on."""
    make_folder(tmp_path / "data/train/8", [4, 4, 4])
    make_folder(tmp_path / "data/val/8", [4])
    return tmp_path / "data"


def training(root, *options):
    """`cdm fit` with a checkpoint every step, on shards that are read in windows of one."""
    return fit_command("--trainer.limit_val_batches=0", "--trainer.max_steps=3000", f"--data.root={root}",
                       "--data.window=1", f"--trainer.default_root_dir={root}/run", *options)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- shared memory


def fit_shared_memory(monkeypatch, megabytes, **options):
    """How many batches of 16 images of 256x256, 3.1 MB, each reading process holds where so much memory is free."""
    module = SimpleNamespace(image_channels=3, resolution=256)
    trainer = SimpleNamespace(lightning_module=module, num_devices=1, world_size=1, accumulate_grad_batches=1)
    data = ShardDataModule("nowhere", 16, **{"num_workers": 8, **options})
    data.trainer = trainer
    space = SimpleNamespace(f_bavail=megabytes * 2**8, f_frsize=4096)
    monkeypatch.setattr(datamodule.os, "statvfs", lambda path: space)
    monkeypatch.setattr(datamodule, "SHARED_MEMORY", Path("/"))
    return data.fit_shared_memory()


def test_readers_hold_as_many_batches_as_shared_memory_has_room_for(monkeypatch):
    assert fit_shared_memory(monkeypatch, 1000) == 8
    with pytest.warns(UserWarning, match="/ has 67 MB free: each reading process reads 1 batches ahead, not 8"):
        assert fit_shared_memory(monkeypatch, 64) == 1
    assert fit_shared_memory(monkeypatch, 0, num_workers=0) == 8
    sentence_of_error(
        lambda: fit_shared_memory(monkeypatch, 32),
        "/ has 34 MB free, and 8 reading processes for each of 1 processes need 63 MB for batches of 16 images",
        "fewer data.num_workers", "docker run --shm-size",
    )  # fmt: skip


def test_a_batch_that_finds_no_shared_memory_is_a_sentence(root, capsys, monkeypatch):
    def full(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    sentence = sentence_of_refusal(capsys, training(root, "--data.num_workers=1"))
    assert "no room for a batch of" in sentence and "No space left on device (28)" in sentence
    assert "docker run --shm-size" in sentence
    assert "no room in /dev/shm" in str(user_error(RuntimeError("DataLoader worker (pid 7) is killed by: Bus error")))


FULL = """
from pathlib import Path
from torch.utils.data import DataLoader
from cdm_lightning.data.shards import read_manifest
from cdm_lightning.data.stream import ShardStream
folder = Path("{folder}")
Path("/dev/shm/all").write_bytes(bytes(200_000))
for _ in DataLoader(ShardStream(folder, read_manifest(folder), 64, 8), batch_size=None, num_workers=1, timeout=60):
    pass
"""


@pytest.mark.long
@pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True).returncode != 0
    if sys.platform == "linux" and Path("/usr/bin/unshare").exists()
    else True,
    reason="only root may give a process another /dev/shm",
)
def test_a_small_shared_memory_of_the_system_ends_in_that_sentence_too(tmp_path):
    make_folder(tmp_path / "train/64", [16], 64, 3)
    (tmp_path / "run.py").write_text(FULL.format(folder=tmp_path / "train/64"))
    small = f"mount -t tmpfs -o size=256k tmpfs /dev/shm && exec {sys.executable} {tmp_path}/run.py"
    run = subprocess.run(["unshare", "-m", "bash", "-c", small], env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 1 and "no room for a batch of 0.0984 MB in shared memory, /dev/shm" in run.stderr


# ------------------------------------------------------------------------------------------------ readers that hang


class StopWorker(L.Callback):
    """Stops the process that reads images after the third batch, as SIGSTOP or a debugger does."""

    def setup(self, trainer, pl_module, stage):
        self.others = multiprocessing.active_children()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 2:
            [reader] = [p for p in multiprocessing.active_children() if p not in self.others]
            os.kill(reader.pid, signal.SIGSTOP)


def test_a_reader_that_is_stopped_ends_the_run_after_the_stated_time(root, capsys):
    options = ["--data.num_workers=1", "--data.timeout=1", "--trainer.callbacks+=test_waiting.StopWorker"]
    sentence = sentence_of_refusal(capsys, training(root, *options))
    assert sentence.startswith("reading process 1 of 1 (pid ") and ", stopped) gave no batch for 1 s" in sentence
    assert "which is data.timeout" in sentence and f"it was to read from {root}/train/8/00" in sentence


def as_pipe(root):
    """Put a pipe that nobody writes in the place of the last shard of the first pass: to open it takes for ever."""
    folder = root / "train/8"
    stream = ShardStream(folder, read_manifest(folder), 8, 4, window=1)
    path = stream.shards_of(2)[0]
    assert {path, stream.shards_of(0)[0], stream.shards_of(1)[0]} == set(folder.glob("*.tar"))
    assert stream.shards_of(3)[0].parent == folder and stream.shards_of(3) != stream.shards_of(4)
    path.unlink()
    os.mkfifo(path)
    return path


def release(path):
    """Let a process that waits for a writer of the pipe go on, if there is one."""
    with suppress(OSError):
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


@pytest.fixture
def pipe(root, monkeypatch):
    """Such a pipe; the sizes of the files are not looked at."""
    monkeypatch.setattr(datamodule, "read_manifest", lambda folder, check_files: read_manifest(folder, False))
    return as_pipe(root)


def test_a_file_that_does_not_answer_ends_the_run_after_the_stated_time(root, pipe, capsys):
    sentence = sentence_of_refusal(capsys, training(root, "--data.num_workers=1", "--data.timeout=1"))
    assert "gave no batch for 1 s, which is data.timeout" in sentence and f"read from {pipe}: once" in sentence


def test_without_reading_processes_the_whole_process_ends(root, pipe, capsys, monkeypatch):
    """Exiting is all that helps where the operating system does not interrupt a read."""

    def end(code):
        codes.append(code)
        release(pipe)
        raise SystemExit  # of the watching thread

    codes = []
    monkeypatch.setattr(process_group.os, "_exit", end)
    with suppress(SystemExit):
        main(training(root, "--data.timeout=1"))
    said = capsys.readouterr().err
    assert codes == [2]
    assert f"this process has read no batch for 1 s, which is data.timeout; it was to read from {pipe}:" in said


@pytest.mark.parametrize(
    "number, options, before, steps",
    [
        (signal.SIGTERM, ["--data.batch_size=2", "--data.num_workers=0"], 3, 4),
        # two of three batches of the third step come
        (
            signal.SIGINT,
            ["--data.batch_size=3", "--trainer.accumulate_grad_batches=3", "--data.num_workers=1"],
            2,
            2,  # whose checkpoint waits for the first batch of the third step, which comes
        ),
    ],
)
def test_a_training_that_waits_for_images_is_saved_when_it_is_told_to_stop(
    root, pipe, caplog, number, options, before, steps
):
    """The first eight images come, the ninth does not."""
    last = root / "run/checkpoints/last.ckpt"

    def send():
        while state_of(last).get("global_step", 0) < before:
            time.sleep(0.2)
        time.sleep(1)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(SystemExit) as stop:
        main(training(root, *options))
    release(pipe)
    assert stop.value.code == 128 + number
    assert f"saved {last} at step {steps}; the same command goes on" in caplog.text
    saved = state_of(last)
    assert saved["global_step"] == steps
    assert saved["ShardDataModule"]["images_seen"] == steps * int(options[0].rpartition("=")[2])


def state_of(path):
    with suppress(OSError, RuntimeError, EOFError):  # it is being replaced
        return torch.load(path, weights_only=True)
    return {}


def test_time_limits_must_be_positive():
    sentence_of_error(lambda: ShardDataModule("nowhere", timeout=0), "timeout 0 of the data is not positive")
