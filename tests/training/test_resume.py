"""A run that is killed and started again by the same command ends in the bits, and the log, of the unbroken run."""

import contextlib
import csv
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from commands import ENVIRONMENT, ROOT
from lightning.pytorch.callbacks import Callback

from cdm_lightning.__main__ import main
from cdm_lightning.cascade.bundle import read_bundle
from cdm_lightning.data.stream import leave_signals_to_the_parent
from cdm_lightning.stages.checkpoints import newest_checkpoint
from cdm_lightning.training.resume import run_id

SETTINGS = {  # everything that a state must be saved for: averages, accumulation, dropout, workers, a falling rate
    "model.dropout": 0.1, "model.decay_fraction": 0.5, "model.warmup_steps": 4, "model.sampling_steps": 2,
    "data.batch_size": 16, "data.num_workers": 2, "trainer.accumulate_grad_batches": 2, "trainer.accelerator": "cpu",
    "trainer.log_every_n_steps": 3, "trainer.limit_val_batches": 1, "trainer.val_check_interval": 12,
    "trainer.enable_progress_bar": "false", "trainer.enable_model_summary": "false",
    "trainer.logger": "lightning.pytorch.loggers.CSVLogger",
}  # fmt: skip
NETWORK = {"model.channels": 16, "model.num_heads": 2, "model.norm_groups": 8}


def command(run, *more, **options):
    """The arguments of `cdm fit` on the demo's base stage with a checkpoint every other step."""
    files = [ROOT / "experiments/defaults.yaml", ROOT / "experiments/fashion/defaults.yaml"]
    files += [ROOT / "experiments/fashion/base8.yaml", run / "callbacks.yaml"]
    run.mkdir(exist_ok=True)
    saver = {"class_path": "cdm_lightning.training.Checkpoint", "init_args": {"every_n_train_steps": 2}}
    callbacks = yaml.safe_load((ROOT / "experiments/fashion/defaults.yaml").read_text())["trainer"]["callbacks"]
    kept = [c for c in callbacks if not c["class_path"].endswith(("Checkpoint", "SampleGrid", "LossCurve"))]
    (run / "callbacks.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [*kept, saver, *more]}}))
    options = {**SETTINGS, "data.root": ROOT / "data/fashion", **options}
    options |= {"trainer.default_root_dir": run, "trainer.logger.save_dir": run}
    return ["fit", *(f"--config={f}" for f in files), *(f"--{name}={value}" for name, value in options.items())]


def start(run, *more, **options):
    """`cdm fit` in a process group of its own, its output in run/output.txt."""
    arguments = command(run, *more, **options)
    with (run / "output.txt").open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "cdm_lightning", *arguments], stdout=output, stderr=output, start_new_session=True,
            env=ENVIRONMENT, cwd=ROOT,
        )  # fmt: skip


def finish(run, **options):
    """To the end; one process alone is this one, which is quicker and ends in the same bits."""
    if options.get("trainer.devices", 1) == 1:
        return main(command(run, **options))
    process = start(run, **options)
    try:
        assert process.wait(timeout=1500) == 0, (run / "output.txt").read_text()[-3000:]
    finally:
        kill(process)


def kill(process):
    """SIGKILL for the process, its ranks and their workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=300)


def wait_for(process, condition, timeout=500, pause=0.01):
    """Poll until the condition holds; False where the process ended before."""
    end = time.monotonic() + timeout
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < end, "nothing happened"
        time.sleep(pause)
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
    """Where the ends of two runs differ, but for counters: Lightning counts a validation before a checkpoint twice."""
    apart = differences(last(whole), last(parts))
    return [d for d in apart if not d.startswith(("/callbacks/Checkpoint", "/loops/fit_loop/epoch_loop.val_loop"))]


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


def survive(tmp_path, kills, seed, pause=0.0, **options):
    """Kill a run at random moments, every third time while a checkpoint is being written; it must end as unbroken.

    pause: seconds before every batch of a run to be killed, so that no machine is too quick to be hit.
    """
    finish(tmp_path / "whole", **options)
    more = [{"class_path": "small_training.Pause", "init_args": {"seconds": pause}}]
    parts, chance, torn = tmp_path / "parts", random.Random(seed), 0
    done = 0
    while done < kills:
        process = start(parts, *more, **options)
        try:
            versions = len(list(parts.glob("**/metrics.csv")))
            if done % 3 == 2:
                hit = wait_for(process, lambda: any(parts.glob("checkpoints/*.partial")), pause=0.0005)
                torn += hit
            else:
                begun = (parts / "checkpoints/last.ckpt").stat().st_mtime_ns if newest(parts) else 0
                hit = wait_for(process, lambda begun=begun: newest(parts) and newest(parts).stat().st_mtime_ns > begun)
                time.sleep(chance.uniform(0, 0.7))
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


TWO = {"trainer.devices": 2, "trainer.strategy": "ddp"}


def test_a_killed_run_ends_as_the_unbroken_one(tmp_path):
    survive(tmp_path, 1, 0, 0.1, **NETWORK, **{"trainer.max_steps": 10})


@pytest.mark.long
def test_two_ranks_killed_again_and_again_end_as_the_unbroken_run(tmp_path):
    survive(tmp_path, 21, 1, **TWO, **{"model.channels": 32, "trainer.max_steps": 150})


@pytest.mark.parametrize(
    "number, rank, options",
    [
        (signal.SIGUSR1, 1, TWO),
        pytest.param(signal.SIGTERM, 0, TWO, marks=pytest.mark.long),
        pytest.param(signal.SIGUSR1, None, {**TWO, "trainer.accumulate_grad_batches": 4}, marks=pytest.mark.long),
    ],
)
def test_a_signal_to_one_process_ends_all_after_the_step_in_hand(tmp_path, number, rank, options):
    """rank None: the whole group, workers too. What was trained by then is saved, and the run ends as unbroken."""
    options = {**NETWORK, "trainer.max_steps": 24, **options}
    parts = tmp_path / "parts"
    process = start(parts, **{**options, "trainer.max_steps": 5000})
    try:
        assert wait_for(process, lambda: newest(parts))
        if rank is None:
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid if rank == 0 else child_rank(process.pid), number)
        assert process.wait(timeout=500) in (128 + number, -signal.SIGTERM)  # the launcher may end what is at its end
    finally:
        kill(process)
    assert "the same command goes on" in (parts / "output.txt").read_text()
    saved = last(parts)["global_step"]
    assert saved >= 2 and last(parts)["ShardDataModule"]["images_seen"] == 16 * saved
    rest = {**options, "trainer.max_steps": saved + 3, "model.decay_fraction": 0, "trainer.devices": 1}
    finish(parts, **{**rest, "trainer.strategy": "auto"})
    assert last(parts)["global_step"] == saved + 3


def child_rank(pid):
    """The process of rank 1 that Lightning's launcher started."""
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = f"PPid:\t{pid}\n" in status.read_text()
            if parent and "LOCAL_RANK=1" in (status.parent / "environ").read_text():
                return int(status.parent.name)
        except OSError:
            continue
    raise AssertionError("there is no second rank")


class Halt(Callback):
    """Ends a run as a kill would, before a given step."""

    def __init__(self, at: int):
        self.at = at

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.at:
            raise KeyboardInterrupt


def in_process(run, halt=None, **options):
    """`cdm fit` in this process, cut short when step `halt` would begin."""
    more = [{"class_path": "test_resume.Halt", "init_args": {"at": halt}}] if halt else []
    try:
        main(command(run, *more, **NETWORK, **{"data.num_workers": 0, "trainer.max_steps": 10, **options}))
    except SystemExit:
        assert halt


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The unbroken run of ten steps."""
    run = tmp_path_factory.mktemp("whole")
    in_process(run)
    return run


@pytest.mark.parametrize("halt", [3, 7])  # a validation is due after step 6
def test_a_run_goes_on_from_every_kind_of_step(whole, tmp_path, halt):
    in_process(tmp_path, halt)
    assert last(tmp_path)["global_step"] == halt - 1
    in_process(tmp_path)
    assert same_run(whole, tmp_path) == []
    assert curve(tmp_path) == curve(whole)


class Interrupt(Callback):
    """Ctrl-C as a batch begins, or as it ends: the run then hears it where it waits for the next one."""

    def __init__(self, at: int, begins: bool):
        self.at, self.begins = at, begins

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.begins and batch_idx == self.at:
            os.kill(os.getpid(), signal.SIGINT)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not self.begins and batch_idx == self.at:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    "at, begins, step",
    [
        (9, True, 4),  # one of two batches of the fifth step is done, and is done again
        (8, False, 4),  # likewise
        pytest.param(11, False, 6, marks=pytest.mark.long),  # a validation is due, and comes first
    ],
)
def test_ctrl_c_saves_the_run_which_goes_on_as_the_unbroken_one(whole, tmp_path, caplog, at, begins, step):
    more = [{"class_path": "test_resume.Interrupt", "init_args": {"at": at, "begins": begins}}]
    with pytest.raises(SystemExit) as stop:
        main(command(tmp_path, *more, **NETWORK, **{"data.num_workers": 0, "trainer.max_steps": 10}))
    assert stop.value.code == 130
    assert f"Ctrl-C: saved {tmp_path}/checkpoints/last.ckpt at step {step}; the same command goes on" in caplog.text
    assert last(tmp_path)["global_step"] == step
    in_process(tmp_path)
    assert same_run(whole, tmp_path) == []
    assert curve(tmp_path) == curve(whole)


class InterruptTwice(Callback):
    """Ctrl-C twice within the third step."""

    def on_before_optimizer_step(self, trainer, *args):
        for _ in range(2 * (trainer.global_step == 2)):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_second_ctrl_c_ends_at_once(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command(tmp_path, {"class_path": "test_resume.InterruptTwice"}, **NETWORK, **{"data.num_workers": 0}))
    assert stop.value.code == 130
    assert "Ctrl-C: the steps since the newest checkpoint are not saved; the same command" in capsys.readouterr().err
    assert last(tmp_path)["global_step"] == 2


@pytest.mark.parametrize("halts", [[7], pytest.param([3, 7], marks=pytest.mark.long)])
def test_a_run_by_passes_goes_on_too(tmp_path, halts):
    """With max_epochs Lightning asks for the loader before it has counted what was done; a pass is 6 steps."""
    passes = {
        "trainer.max_epochs": 2, "trainer.limit_train_batches": 12, "trainer.val_check_interval": 12,
        "trainer.max_steps": 10,
    }  # fmt: skip
    in_process(tmp_path / "whole", **passes)
    for halt in halts:
        in_process(tmp_path / f"parts{halt}", halt, **passes)
        in_process(tmp_path / f"parts{halt}", **passes)
        assert same_run(tmp_path / "whole", tmp_path / f"parts{halt}") == []
        assert curve(tmp_path / f"parts{halt}") == curve(tmp_path / "whole")


EVEN = {"model.dropout": 0.0, "trainer.limit_val_batches": 0, "trainer.max_steps": 6}


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """An unbroken run of six steps without dropout, whose steps are the same in batches of any size."""
    run = tmp_path_factory.mktemp("even")
    in_process(run, **EVEN)
    return last(run)


@pytest.mark.parametrize("before, now", [(2, 8), (8, 2), (1, 4)])
def test_a_run_goes_on_with_another_accumulation(even, tmp_path, before, now):
    """No image is left out or seen twice, and every step is of the whole batch: the weights of any other run."""
    in_process(tmp_path, 3, **EVEN, **{"trainer.accumulate_grad_batches": before})
    in_process(tmp_path, **EVEN, **{"trainer.accumulate_grad_batches": now})
    whole, parts = even, last(tmp_path)
    assert parts["global_step"] == 6 and parts["ShardDataModule"]["images_seen"] == 96
    for name, value in whole["current_model_state"].items():
        torch.testing.assert_close(value, parts["current_model_state"][name], rtol=1e-3, atol=2e-5, msg=name)


def test_a_trial_run_writes_no_checkpoint_and_a_finished_one_names_its_newest(tmp_path):
    in_process(tmp_path, **{"trainer.fast_dev_run": "true"})
    assert newest_checkpoint([tmp_path / "checkpoints"]) is None
    in_process(tmp_path, **{"trainer.max_steps": 2})
    older = (tmp_path / "checkpoints/last.ckpt").read_bytes()
    in_process(tmp_path, **{"trainer.max_steps": 4})
    (tmp_path / "checkpoints/last.ckpt").write_bytes(older)  # as a kill between the two files would leave it
    main(["bundle", "--checkpoints", f"[{tmp_path}]", "--out", str(tmp_path / "bundle")])
    assert read_bundle(tmp_path / "bundle")[0][0].trained["steps"] == 4


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"ckpt_path": "nowhere/x.ckpt"}, "ckpt_path nowhere/x.ckpt is no file"),
        ({"trainer.callbacks.every_n_train_steps": 0}, "every_n_train_steps 0 of the checkpoints is less than 1"),
    ],
)
def test_what_cannot_be_gone_on_from_is_one_sentence(tmp_path, capsys, options, sentence):
    added = {"trainer.callbacks": "cdm_lightning.training.Checkpoint"} if "ckpt_path" not in options else {}
    with pytest.raises(SystemExit) as stop:
        main(command(tmp_path / "run", **NETWORK, **added, **options))
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


@pytest.fixture(scope="module")
def halted(tmp_path_factory):
    """The run of ten steps, cut short when step 5 would begin."""
    run = tmp_path_factory.mktemp("halted")
    in_process(run, 5)
    return run


def forget_averages(c):
    c["state_dict"] = {n.removeprefix("module."): v for n, v in c["current_model_state"].items()}


def forget_weights(c):
    c["current_model_state"] = {n: c["state_dict"][n.removeprefix("module.")] for n in c["current_model_state"]}


def forget_moments(c):
    c["optimizer_states"][0]["state"] = {}


def forget_rate(c):
    c["lr_schedulers"][0] |= {"last_epoch": 0, "_step_count": 1}


def forget_data(c):
    c["ShardDataModule"] |= {"images_seen": 0}


def forget_batches(c):
    progress = c["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    progress["current"] = dict.fromkeys(progress["current"], 0)
    progress["total"] = dict.fromkeys(progress["total"], 0)
    c["ShardDataModule"] |= {"batches": 0}  # so that the images alone go on


def forget_steps(c):
    loops = c["loops"]["fit_loop"]
    loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"] = {
        "ready": 0,
        "completed": 0,
    }


@pytest.mark.parametrize(
    "forget",
    [None, forget_averages, forget_weights, forget_moments, forget_rate, forget_data, forget_batches, forget_steps],
)
def test_every_state_that_is_saved_is_needed(whole, halted, tmp_path, forget):
    """With any one of them left out of the checkpoint, the comparison with the unbroken run goes red."""
    shutil.copytree(halted, tmp_path, dirs_exist_ok=True)
    if forget:
        checkpoint = last(tmp_path)
        forget(checkpoint)
        for file in (tmp_path / "checkpoints").glob("*.ckpt"):
            torch.save(checkpoint, file)
    try:
        in_process(tmp_path)
        alike = not same_run(whole, tmp_path) and curve(tmp_path) == curve(whole)
    except (AssertionError, RuntimeError, KeyError):
        alike = False
    assert alike == (forget is None)


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    assert newest_checkpoint([tmp_path, tmp_path / "nowhere"]) is None
    for step, name in ((2, "epoch=0-step=2"), (4, "last"), (3, "other")):
        torch.save(
            {"global_step": step, "state_dict": {"w": torch.zeros(1000)}, "optimizer_states": []},
            tmp_path / f"{name}.ckpt",
        )
    assert newest_checkpoint([tmp_path]) == tmp_path / "last.ckpt"
    assert newest_checkpoint([tmp_path], at_most=3) == tmp_path / "other.ckpt"
    whole = (tmp_path / "last.ckpt").read_bytes()
    for torn in (b"", whole[: len(whole) // 2], whole[:-1], b"garbage" * 100):
        (tmp_path / "last.ckpt").write_bytes(torn)
        with pytest.warns(UserWarning, match="last.ckpt is not a whole checkpoint"):
            assert newest_checkpoint([tmp_path]) == tmp_path / "other.ckpt"


def test_half_precision_is_refused_by_name_where_there_is_no_gpu(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command(tmp_path / "run", **NETWORK, **{"trainer.precision": "16-mixed"}))
    assert stop.value.code == 2 and "precision 16-mixed needs a GPU" in capsys.readouterr().err


def test_a_run_keeps_its_id(tmp_path):
    assert run_id(tmp_path) == run_id(tmp_path) != run_id(tmp_path / "other")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="half precision with a loss scaler needs a GPU")
def test_the_loss_scaler_goes_on_too(tmp_path):
    options = {"trainer.accelerator": "gpu", "trainer.devices": 1, "trainer.precision": "16-mixed"}
    in_process(tmp_path / "whole", **options)
    in_process(tmp_path / "parts", 5, **options)
    in_process(tmp_path / "parts", **options)
    states = [last(tmp_path / name)["MixedPrecision"] for name in ("whole", "parts")]
    assert states[0] == states[1] and states[0]["scale"] > 0 and states[0]["_growth_tracker"] > 0


def test_a_reader_leaves_the_first_sigterm_to_its_parent_and_ends_at_the_second():
    def read(pipe):
        leave_signals_to_the_parent(0)
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        pipe.send(signal.alarm(0))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(900)

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    reader = context.Process(target=read, args=(theirs,), daemon=True)
    reader.start()
    assert 200 < ours.recv() <= 300
    reader.join(300)
    assert reader.exitcode == -signal.SIGTERM
