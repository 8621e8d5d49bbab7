"""Damaged data: one sentence or a counted skip, as the user chose, on every process, and never a hang or a repeat."""

import csv
import hashlib
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from commands import ROOT, fit_command
from dealt_images import Recorder, contents, deal, flat, places, record_run, record_two_processes
from folders import make_folder, with_member
from refusals import sentence_of_error, sentence_of_refusal
from torch import multiprocessing

from cdm_lightning.__main__ import main
from cdm_lightning.data import ShardDataModule
from cdm_lightning.data.damaged_images import decode_damage, encode_damage
from cdm_lightning.data.shards import read_manifest, write_manifest
from cdm_lightning.data.stream import ShardStream
from cdm_lightning.foundation.errors import InputError

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]
SIZES = [7, 11, 5, 9, 6, 8, 7]
WATCHDOG = 400  # seconds, of runs that take ten on an idle machine


def vouched(folder, name, change):
    """Damage a shard from before its manifest was written: size and hash agree."""
    path, manifest = folder / name, read_manifest(folder)
    path.write_bytes(change(path))
    data = path.read_bytes()
    about = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    shards = [replace(s, **about) if s.name == name else s for s in manifest.shards]
    write_manifest(folder, replace(manifest, shards=shards))


SHARD = {  # what may happen to 002.tar, images 18 ... 22, after its manifest was written
    "missing": lambda p: p.unlink(),
    "empty": lambda p: p.write_bytes(b""),
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-700]),
    "garbage": lambda p: p.write_bytes(b"x" * p.stat().st_size),
    "a bit flipped": lambda p: p.write_bytes(p.read_bytes()[:600] + b"?" + p.read_bytes()[601:]),
    "another's": lambda p: p.write_bytes((p.parent / "004.tar").read_bytes()),
}
IMAGE = {  # what may be wrong with image 20 when its manifest is written
    "torn": lambda p: with_member("00000020.png", b"\x89PNG\r\n\x1a\n")(p),
    "no image": with_member("00000020.png", b"<html>"),
    "label out of range": with_member("00000020.cls", b"10"),
    "label of words": with_member("00000020.cls", b"cat"),
    "no label": with_member("00000020.cls", None),
}


def damage(folder, case):
    """Keys of the images that are lost."""
    if case in IMAGE:
        vouched(folder, "002.tar", IMAGE[case])
        return {20}
    SHARD[case](folder / "002.tar")
    return set(range(18, 23))


def lost_places(folder, lost, **options):
    """The places of lost images, found by walking the sequence of the undamaged folder."""
    stream = ShardStream(folder, read_manifest(folder), 8, 4, window=3, **options)
    return {place for place, name in stream.names() if int(name) in lost}


@pytest.mark.parametrize("case", [*SHARD, *IMAGE])
def test_damage_is_left_out_in_its_place_and_the_rest_is_as_ever(tmp_path, case, capsys):
    make_folder(tmp_path, SIZES)
    manifest = read_manifest(tmp_path)
    whole = {p: c for rank in deal(tmp_path, end=106) for p, c in contents(rank).items()}
    lost = lost_places(tmp_path, set(range(18, 23)) if case in SHARD else {20}, end=106)
    damage(tmp_path, case)
    if case in SHARD:
        write_manifest(tmp_path, manifest)
    for world_size, workers in ((1, 0), (2, 2)) if case in ("missing", "torn") else ((2, 0),):
        dealt = deal_damaged(tmp_path, world_size, workers)
        marks = [p for batches in dealt for p in places(batches)]
        assert {~p for p in marks if p < 0} == lost and len(lost) in (2, 10)
        assert sorted(p if p >= 0 else ~p for p in marks) == list(range(106))  # every place once, damaged or not
        found = {}
        for batches in dealt:
            for image, label, index in batches:
                intact = index[index >= 0]
                assert len(intact) == len(image)
                found |= {int(p): (x.numpy().tobytes(), int(y)) for x, y, p in zip(image, label, intact, strict=True)}
        assert found == {p: c for p, c in whole.items() if p not in lost}
        if not workers:  # one sentence for each of the processes, not one for each image
            said = capsys.readouterr().err.splitlines()
            about = "image 00000020 of " if case in IMAGE else ""
            assert len(said) == world_size and all(s.startswith(f"left out: {about}{tmp_path}/002.tar") for s in said)


def deal_damaged(folder, world_size, workers, **options):
    return deal(folder, world_size, workers, whole=False, on_damage="skip", **{"end": 106, **options})


def test_a_batch_of_damage_alone_holds_an_intact_image_and_a_folder_of_it_is_refused(tmp_path):
    make_folder(tmp_path, [4] * 5)
    first = deal(tmp_path, shuffle=False, end=20)[0]
    (tmp_path / "001.tar").unlink()
    for window, source in ((1, 0), (2, 0), (5, 0)):
        [batches] = deal_damaged(tmp_path, 1, 0, shuffle=False, end=20, window=window)
        assert [len(x) for x, _, _ in batches] == [4, 1, 4, 4, 4]
        assert batches[1][2].tolist() == [~4, ~5, ~6, ~7]
        assert torch.equal(batches[1][0][0], first[source][0][0]) and batches[1][1][0] == first[source][1][0]
    [again] = deal_damaged(tmp_path, 1, 0, shuffle=False, start=4, end=20, window=1)
    assert torch.equal(again[0][0], batches[1][0])  # of what is damaged alone, and not of where the run began
    for number in (0, 2, 3, 4):
        (tmp_path / f"{number:03d}.tar").unlink()
    sentence_of_error(lambda: deal_damaged(tmp_path, 1, 0), f"{tmp_path} holds no intact image")


# ---------------------------------------------------------------------------------------------------- through a Trainer


class Log(L.Callback):
    """The values in the log after every step and validation."""

    def __init__(self):
        self.steps, self.validations = [], []

    def on_train_batch_end(self, trainer, *args):
        self.steps.append({k: float(v) for k, v in trainer.logged_metrics.items() if k.startswith("data/")})

    def on_validation_end(self, trainer, *args):
        self.validations.append({k: float(v) for k, v in trainer.logged_metrics.items() if k.startswith("val/")})


@pytest.fixture
def root(tmp_path):
    make_folder(tmp_path / "data/train/8", SIZES)
    make_folder(tmp_path / "data/val/8", [4, 4, 5])
    return tmp_path / "data"


def skipping(root, **options):
    return ShardDataModule(root, 12, window=3, on_damage="skip", **{"num_workers": 0, **options})


@pytest.mark.parametrize("workers", [0, 2])
def test_the_log_counts_what_was_left_out_and_a_resumed_run_counts_on(root, tmp_path, workers):
    lost = sorted(lost_places(root / "train/8", {20, *range(38, 46)}, end=84))  # image 20, and those of 005.tar
    vouched(root / "train/8", "002.tar", IMAGE["torn"])
    (root / "train/8/005.tar").unlink()
    (root / "val/8/001.tar").write_bytes(b"")
    log = Log()
    options = {"callbacks": [log], "log_every_n_steps": 1}
    whole = record_run(root, tmp_path / "a", data=skipping(root, num_workers=workers), **options)
    assert flat(whole.seen) == [p for p in range(84) if p not in lost] and len(lost) > 9
    expected = [sum(p < 12 * step for p in lost) for step in range(1, 8)]
    assert log.steps == [{"data/skipped_images": n, "data/stand_ins": 0} for n in expected]
    # 13 images, of which 4 ... 7 are lost, in batches of 12 and 1
    assert whole.validated[:2] == [[0, 1, 2, 3, 8, 9, 10, 11], [12]]
    assert log.validations[-1] == {"val/skipped_images": 4, "val/stand_ins": 0}
    saved = torch.load(tmp_path / "a/step=4.ckpt", weights_only=True)["ShardDataModule"]
    assert saved["skipped"] == [expected[3], 0]
    log = Log()
    options["callbacks"] = [log]
    again = record_run(
        root, tmp_path / "b", tmp_path / "a/step=4.ckpt", data=skipping(root, num_workers=workers), **options
    )
    assert flat(again.seen) == [p for p in range(48, 84) if p not in lost]
    assert [s["data/skipped_images"] for s in log.steps] == expected[4:]
    saved = torch.load(tmp_path / "b/step=7.ckpt", weights_only=True)["ShardDataModule"]
    assert saved["skipped"] == [expected[6], 0] == [len(lost), 0]


class Plain(Recorder):
    """Takes batches of one image too, which batch normalisation does not."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(1, 1)


class Vanish(L.Callback):
    """Takes all shards but the first away after the first step."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for path in sorted(self.folder.glob("*.tar*"))[1:] if not batch_idx else []:
            path.unlink()


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_that_vanish_during_a_run(root, tmp_path, workers):
    train_folder, options = root / "train/8", {"max_steps": 20, "limit_val_batches": 0}
    data = ShardDataModule(root, 12, workers, window=1, on_damage="skip")
    module = record_run(root, tmp_path, module=Plain(), data=data, callbacks=[Vanish(train_folder)], **options)
    seen = flat(module.seen)
    skipped, stand_ins = data.skipped.tolist()
    assert len(seen) == len(set(seen)) and stand_ins  # no place twice, be it filled by a stand-in
    assert len(seen) + skipped - stand_ins == 240 and skipped > 20
    make_folder(train_folder, SIZES)
    data = ShardDataModule(root, 12, workers, window=1)
    with pytest.raises(InputError, match=r"\.tar cannot be read: FileNotFoundError: No such file or directory"):
        record_run(root, tmp_path / "x", data=data, callbacks=[Vanish(train_folder)], **options)


def test_the_counts_are_in_the_csv_log_of_a_stage(root, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    lost = lost_places(root / "train/8", set(range(18, 23)), end=24)
    SHARD["empty"](root / "train/8/002.tar")
    SHARD["garbage"](root / "val/8/001.tar")
    options = [
        f"--data.root={root}", f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=3", "--data.window=3",
        "--data.on_damage=skip", "--data.batch_size=8", "--trainer.log_every_n_steps=1",
        "--trainer.val_check_interval=3",
        "--trainer.limit_val_batches=1.0", "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        f"--trainer.logger.save_dir={tmp_path}",
    ]  # fmt: skip
    main(quick(*options))
    [path] = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(path.open()))
    counts = [float(row["data/skipped_images"]) for row in rows if row["data/skipped_images"]]
    assert counts == [sum(p < 8 * step for p in lost) for step in (1, 2, 3)] and counts[-1] > 0
    assert [float(row["val/skipped_images"]) for row in rows if row["val/skipped_images"]] == [4]


class KillWorker(L.Callback):
    """SIGKILL for a process that reads images, as the kernel does when memory runs out."""

    def setup(self, trainer, pl_module, stage):
        self.others = multiprocessing.active_children()  # an earlier run's readers, which live until they are collected

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 2:
            worker = next(p for p in multiprocessing.active_children() if p not in self.others)
            os.kill(worker.pid, signal.SIGKILL)
            time.sleep(0.5)


def quick(*options):
    """The demo's base stage, made tiny, with other data."""
    return [*fit_command("--trainer.limit_val_batches=0", "--trainer.max_steps=60"), *options]


def test_a_process_that_reads_and_is_killed_ends_the_run_in_a_sentence(root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = [f"--data.root={root}", "--trainer.callbacks+=test_data_faults.KillWorker", "--trainer.max_steps=3000",
               f"--trainer.default_root_dir={tmp_path}/run", "--data.num_workers=2"]  # fmt: skip
    begun = time.monotonic()
    sentence = sentence_of_refusal(capsys, quick(*options))
    assert "was ended from outside, as happens when memory runs out" in sentence
    assert "signal: Killed" in sentence or "exited unexpectedly" in sentence  # torch says either
    assert time.monotonic() - begun < WATCHDOG


# --------------------------------------------------------------------------------------------------- several processes


def command(root, tmp_path, *options):
    gloo = ["--trainer.strategy.class_path=lightning.pytorch.strategies.DDPStrategy",
            "--trainer.strategy.init_args.process_group_backend=gloo"]  # fmt: skip
    arguments = quick(*gloo, "--trainer.devices=2", f"--data.root={root}", "--trainer.max_steps=60",
                      f"--trainer.default_root_dir={tmp_path}/run", *options)  # fmt: skip
    return [sys.executable, "-m", "cdm_lightning", *arguments]


def watched(arguments, **options):
    """Run in a process group of its own, which is killed when the watchdog's time is over."""
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                               start_new_session=True, **options)  # fmt: skip
    try:
        err = process.communicate(timeout=WATCHDOG)[1]
        end = time.monotonic() + 120
        while left := group(process.pid):
            assert time.monotonic() < end, f"outlived the run: {left}"
            time.sleep(0.1)
        return err, process.returncode
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def group(pid):
    """Processes of a group that still run; one that has ended and waits to be reaped is none."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, group, *_ = file.read_text().rsplit(")", 1)[1].split()
            found += [file.parent.name] * (group == str(pid) and state != "Z")
    return found


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 1])
def test_damage_that_one_process_meets_ends_all_with_one_sentence(root, tmp_path, rank):
    folder = root / "train/8"
    places = {p: k for k in range(18, 23) for p in lost_places(folder, {k}, end=53)}
    key = next(k for p, k in places.items() if p % 2 == rank)  # even places are rank 0's
    vouched(folder, "002.tar", with_member(f"{key:08d}.png", b"<html>"))
    err, code = watched(command(root, tmp_path, "--data.window=3", f"--data.num_workers={rank}"))
    assert code == 2, err
    sentences = [line for line in err.splitlines() if line.startswith("cdm: error: ")]
    assert len(sentences) == 1 and f"image {key:08d} of {folder}/002.tar cannot be decoded" in sentences[0]
    assert "Traceback" not in err


def test_two_processes_of_three_workers_skip_one_shard_of_two_and_stay_in_step(tmp_path):
    root = tmp_path / "data"
    make_folder(root / "train/8", [30, 2])  # uneven, and fewer shards than workers
    make_folder(root / "val/8", [4, 4, 1])
    lost = lost_places(root / "train/8", {30, 31}, end=96)
    (root / "train/8/001.tar").write_bytes(b"not a tar")
    (root / "val/8/000.tar").unlink()
    data = ShardDataModule(root, 8, 3, window=3, on_damage="skip")
    (seen, validated, skipped, val), (seen1, validated1, skipped1, val1) = record_two_processes(
        root, tmp_path, data=data, max_steps=12, val_check_interval=12
    )
    assert sorted(flat(seen + seen1)) == [p for p in range(96) if p not in lost] and len(lost) == 6
    assert len(seen) == len(seen1) == 12
    assert skipped == skipped1 == [6, 0]
    assert validated == [[4], [6, 8]] and validated1 == [[5], [7]] and val == val1 == 4  # of 0, 2, 4 | 6, 8 and so on


LEADER = """
import os, subprocess, sys, time
from cdm_lightning.foundation.process_group import ending_together

with ending_together():  # as a process of a run does that is stuck in a collective operation
    if os.environ.get("LOCAL_RANK", "0") == "0":
        subprocess.Popen([sys.executable, __file__, sys.argv[1]], env={**os.environ, "LOCAL_RANK": "1"})
        time.sleep(900)
    if sys.argv[1] == "refuse":
        from cdm_lightning.foundation.process_group import exit_with_sentence
        sys.exit(exit_with_sentence(ValueError("it is bad")))
    os.kill(os.getppid(), 9)
    time.sleep(900)
"""


@pytest.mark.parametrize(
    "event, code", [("refuse", 2), pytest.param("kill the leader", -signal.SIGKILL, marks=pytest.mark.long)]
)
def test_a_process_that_is_stuck_ends_with_the_others(tmp_path, monkeypatch, event, code):
    (tmp_path / "run.py").write_text(LEADER)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    err, ended = watched([sys.executable, str(tmp_path / "run.py"), event])
    assert ended == code and ("cdm: error: it is bad" in err) == (event == "refuse") and "Traceback" not in err


def test_an_intact_batch_is_handed_over_as_it_is():
    """In memory that a GPU copies without a wait."""
    index = encode_damage([5, 6], [False, False])
    places, counts = decode_damage(index, 2)
    assert places is index and counts.tolist() == [0, 0]
    places, counts = decode_damage(encode_damage([5, 6, 7], [False, True, False]), 2)
    assert places.tolist() == [5, 7] and counts.tolist() == [1, 0]
