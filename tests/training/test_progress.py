"""What a training shows of itself: in a pipe, on a terminal, from the first line to the last."""

import fcntl
import logging
import os
import pty
import re
import struct
import sys
import termios
import threading
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from types import SimpleNamespace

import pytest
import wandb
from commands import BASE8, ROOT, SR16, fit_command
from dealt_images import Recorder
from lightning.pytorch.utilities import rank_zero_info

from cdm_lightning.__main__ import main
from cdm_lightning.foundation import progress_bar
from cdm_lightning.foundation.progress_bar import ProgressBar
from cdm_lightning.training import progress
from cdm_lightning.training.progress import Progress, RunSummary

UNWANTED = (
    *("Epoch", "/-2", "FLOPs", "Total params", "estimated model params", "v_num", "weights_only", "anonymous", "leet"),
    *("stopped:", "GPU available", "TPU available", "Seed set", "LOCAL_RANK", "litlogger", "litmodels", "wandb:"),
    *("logging interval", "Restoring", "Restored", "Loaded model", "current_model_state", "WeightAveraging", "Warning"),
)


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_SILENT", "WANDB_QUIET"):
        monkeypatch.delenv(name, raising=False)
    wandb.finish()  # a run that another test left open would be gone on with
    yield
    wandb.finish()


def options(folder, steps=6, config=BASE8) -> list[str]:
    """A training of few steps with the bar and the loggers that `fit` of test_cli leaves out."""
    quick = [word for word in fit_command(config=config) if "logger" not in word and "progress_bar" not in word]
    more = [f"--trainer.max_steps={steps}", "--trainer.val_check_interval=3", "--trainer.log_every_n_steps=1"]
    return [*quick, *more, "--data.batch_size=4", f"--trainer.default_root_dir={folder}"]


@contextmanager
def terminal():
    """A list that receives everything printed meanwhile, as a terminal of 100 columns gets it."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    shown = []

    def read():
        with suppress(OSError):  # nobody writes any more
            while data := os.read(master, 65536):
                shown.append(data.decode())

    reader = threading.Thread(target=read)
    reader.start()
    logger = logging.getLogger("lightning.pytorch")
    with open(slave, "w", buffering=1) as stream, redirect_stdout(stream), redirect_stderr(stream):
        handler = logging.StreamHandler()  # as Lightning has one where it is not under test
        logger.addHandler(handler)
        try:
            yield shown
        finally:
            logger.removeHandler(handler)
    reader.join()
    os.close(master)


def test_a_pipe_gets_plain_lines_of_what_a_newcomer_wants_to_know(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(progress_bar, "SHORTEST_PAUSE", 0.0)
    main(options(tmp_path))
    said = capfd.readouterr()
    everything = said.out + said.err
    assert not [word for word in UNWANTED if word in everything], everything
    assert "\r" not in everything and "\x1b" not in everything
    lines = everything.splitlines()
    assert len(lines) == len(set(lines)), everything
    what, images, plan, wandb, *between, last = lines
    assert re.fullmatch(r"base8: BaseStage, 10 classes -> 8x8, \d\.\d\d M parameters", what)
    assert images == "data/fashion/train/32: 15,000 images of 32x32 in 10 classes"
    assert plan == f"6 steps of 4 images on CPU, precision 32-true; new run in {tmp_path}"
    assert wandb.startswith(f"W&B: offline; to upload the run, `wandb sync {tmp_path}/wandb/offline-run-")
    assert len(between) >= 4 and all(re.match(r"base8(, validating)?: \d/6 steps \(\d+%\), ", one) for one in between)
    assert re.search(r"6/6 steps \(100%\), 00:\d\d gone, 00:00 left, [\d.,]+ images/s, loss \d", between[-1])
    done = r"base8: trained 6 steps in 0:\d\d:\d\d, training loss [\d.]+, validation loss [\d.]+; "
    assert re.fullmatch(f"{done}{tmp_path} holds checkpoints/last.ckpt, loss.png, grids", last)


def test_a_terminal_gets_one_bar(tmp_path):
    with terminal() as parts:
        main(options(tmp_path))
    shown = "".join(parts)
    assert not [word for word in UNWANTED if word in shown], shown
    lines = shown.split("\r\n")
    drawn = [line for line in lines if "steps, " in line]
    assert len(drawn) == 1, drawn  # the bar is one line, drawn again and again
    looks = [look for look in drawn[0].split("\r") if look.strip()]
    assert all(re.match(r"base8(, validating)? +\d+%\|.*\| \d/6 steps, ", look) for look in looks), looks
    assert any("validating" in look for look in looks) and "validating" not in looks[-1]
    assert " 6/6 steps" in looks[-1] and "images/s, loss " in looks[-1]
    assert all(len(look) <= 100 for look in looks)
    assert [line for line in lines if line][-1].startswith("base8: trained 6 steps in ")


def test_what_is_said_beside_a_bar_stands_on_lines_of_its_own():
    bar = Progress()
    bar._trainer = SimpleNamespace(callback_metrics={})
    with terminal() as parts:
        bar.open_bar("base8", 10, "steps", stays=True)
        rank_zero_info("a note of Lightning")
        print("a warning", file=sys.stderr)
        bar.close_bar()
    lines = [line.split("\r")[-1].strip() for line in "".join(parts).split("\r\n")]
    assert "a note of Lightning" in lines and "a warning" in lines


def test_a_run_that_goes_on_says_so_and_one_that_is_done_too(capsys, tmp_path):
    main(options(tmp_path, 1, SR16))
    first = capsys.readouterr().out
    assert "sr16: SuperResolutionStage, 8x8 -> 16x16, conditioning augmentation gaussian, " in first
    assert f"new run in {tmp_path}" in first
    main(options(tmp_path, 2, SR16))
    out = capsys.readouterr().out
    assert f"resuming {tmp_path} after step 1 from {tmp_path}/checkpoints/last.ckpt" in out
    assert "sr16: trained 2 steps (1 of them now) in " in out and "sr16: 2/2 steps (100%)" in out
    main(options(tmp_path, 2, SR16))
    said = capsys.readouterr()
    assert said.out.startswith("sr16: finished at step 2, nothing is left to train: ") and said.out.count("\n") == 1
    main(["validate", *options(tmp_path, 2, SR16)[1:]])
    said = capsys.readouterr()
    assert not [word for word in UNWANTED if word in said.out + said.err], said
    assert f"weights from {tmp_path}/checkpoints/last.ckpt" in said.out
    assert re.search(r"val/loss +│ [\d.]+ ", said.out) and said.out.count("val/loss") == 1


def test_a_run_whose_time_is_used_up_says_so(capsys, tmp_path):
    about = {"global_step": 3, "max_steps": 9, "default_root_dir": tmp_path, "is_global_zero": True}
    RunSummary().on_fit_end(SimpleNamespace(**about, checkpoint_callbacks=[], callback_metrics={}), Recorder())
    assert capsys.readouterr().out == "Recorder: max_time is used up at step 3 of 9, and a longer one trains on\n"


@pytest.mark.parametrize("command", ["validate", "test"])
def test_the_table_of_figures_stands_below_the_bar_of_a_terminal(command, tmp_path):
    main(options(tmp_path, 1, SR16))
    with terminal() as parts:
        main([command, *options(tmp_path, 1, SR16)[1:], "--trainer.limit_test_batches=2"])
    lines = "".join(parts).split("\r\n")
    [table] = [line for line in lines if "\u250f" in line]  # the upper edge
    assert table.split("\r")[-1].startswith("\u250f"), table


def test_the_bar_is_the_users_to_replace(capsys, tmp_path):
    main([*options(tmp_path / "none", 1), "--trainer.enable_progress_bar=false"])
    out = capsys.readouterr().out
    assert "steps (" not in out and "base8: trained 1 steps in " in out
    main([*options(tmp_path / "other", 1), "--trainer.callbacks+=lightning.pytorch.callbacks.TQDMProgressBar"])
    said = capsys.readouterr()
    assert "1/1 steps (" not in said.out and "Epoch" in said.out + said.err


def test_a_bar_inside_another_is_a_count_behind_it():
    with terminal() as parts:
        for _ in ProgressBar(range(2), desc="points", mininterval=0, miniters=1):
            with ProgressBar(total=3, desc="sampling", mininterval=0, miniters=1) as inner:
                for _ in range(3):
                    inner.update()
    shown = "".join(parts)
    assert "\n" not in shown.rstrip() and "\x1b[A" not in shown, shown  # one line, drawn again and again
    looks = shown.split("\r")
    assert any("sampling 2 of 3" in look and look.startswith("points:  50%") for look in looks), looks
    assert all(look.startswith("points: ") for look in looks if look.strip()) and "sampling" not in looks[-1]


def test_images_a_second_are_of_whole_batches_and_of_training_alone(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    bar = Progress()
    trainer = SimpleNamespace(
        callback_metrics={}, is_global_zero=True, global_step=0, estimated_stepping_batches=1000,
        datamodule=SimpleNamespace(batch_size=8), state=SimpleNamespace(fn="fit"),
    )  # fmt: skip
    module = SimpleNamespace(name="base8")
    bar.setup(trainer, module, "fit")
    bar.on_train_start(trainer, module)
    now = 500.0  # of compiling
    for batch in range(20):
        now += 0.25
        trainer.global_step = (batch + 1) // 2  # two accumulated batches a step
        bar.on_train_batch_end(trainer, module)
    assert bar.rate == pytest.approx(16)
    bar.on_validation_start(trainer, module)
    now += 1000
    bar.on_validation_end(trainer, module)
    for _ in range(2):
        now += 0.5
        trainer.global_step += 1
        bar.on_train_batch_end(trainer, module)
    assert bar.rate == pytest.approx(16) and bar.status() == "16 images/s"
    bar.close_bar()


def test_lines_come_seldom_and_those_of_a_quick_inner_bar_never(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now)
    with ProgressBar(total=1000, desc="outer", mininterval=0, miniters=1) as bar:
        for _ in range(1000):
            now += 1.0
            bar.update()
        with ProgressBar(range(5), desc="inner") as inner:
            list(inner)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and lines[-1].startswith("outer: 100%, 1000 of 1000 [")
    with ProgressBar(total=100, desc="quick", mininterval=0, miniters=1) as bar:
        for _ in range(100):
            now += 1.0
            bar.update()
    assert len(capsys.readouterr().err.splitlines()) == 4  # after 30, 60, 90 s, and the last
    with ProgressBar(total=100, desc="slow", mininterval=0, miniters=1) as bar:
        for _ in range(4):
            now += 200.0
            bar.update()
    assert len(capsys.readouterr().err.splitlines()) == 2  # ten minutes, and the last
