"""A run's folder is its own, holds what the unbroken run would hold, and is made once its input is known to be good."""

import csv
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import yaml
from commands import ROOT, fit_command
from dealt_images import Recorder
from folders import make_folder
from refusals import sentence_of_error, sentence_of_refusal

from cdm_lightning.__main__ import main
from cdm_lightning.data import ShardDataModule
from cdm_lightning.stages.checkpoints import newest_checkpoint
from cdm_lightning.training import Checkpoint
from cdm_lightning.training.fit_checks import check_folder
from cdm_lightning.training.lightning_cli import name_run_folder


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def options(folder, *more):
    """Two steps of the smallest training with a CSV log, a best checkpoint by validation loss, and W&B left out."""
    best = {"dirpath": "${trainer.default_root_dir}/checkpoints", "filename": "best", "monitor": "val/loss"}
    saver = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": best}
    csv_log = {"save_dir": "${trainer.default_root_dir}", "name": "logs"}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": csv_log}
    callbacks = [{"class_path": "cdm_lightning.training.Checkpoint"}, saver]
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({"trainer": {"logger": [logger], "callbacks": callbacks}}))
    wanted = [word for word in fit_command() if word not in ("--trainer.logger=false", "--trainer.max_steps=1")]
    run = [f"--config={file}", f"--trainer.default_root_dir={folder}", "--trainer.max_steps=2"]
    return [*wanted, *run, "--trainer.log_every_n_steps=1", *more]


def rows(folder):
    files = sorted(folder.glob("logs/version_*/metrics.csv"))
    return [row for file in files for row in csv.DictReader(file.read_text().splitlines())]


def test_a_saved_configuration_makes_a_run_of_its_own_in_another_folder(tmp_path):
    """Neither its log nor a checkpoint goes into the old folder; what it says of the old one is where that lay."""
    old, new = tmp_path / "old", tmp_path / "new"
    main(options(old))
    before = {file: file.stat().st_mtime_ns for file in old.rglob("*")}
    saved = old / "logs/version_0/config.yaml"
    main(["fit", f"--config={saved}", f"--trainer.default_root_dir={new}", "--model.lr=1e-5"])
    assert {file: file.stat().st_mtime_ns for file in old.rglob("*")} == before
    written = {str(file.relative_to(new)) for file in new.rglob("*") if file.is_file()}
    assert {"checkpoints/last.ckpt", "checkpoints/best.ckpt", "logs/version_0/metrics.csv"} <= written
    assert len(rows(new)) == 4 and str(old) not in (new / "logs/version_0/config.yaml").read_text()
    main(["validate", f"--config={saved}"])  # the log of a run stays a curve over its steps
    assert [row["step"] for row in rows(old) if row["val/loss"]] == ["0", "1", "1"]


def test_only_the_folder_that_is_written_to_goes_by_its_name():
    config = {
        "default_root_dir": "runs/x",
        "logger": [{"init_args": {"save_dir": "runs/x", "name": "runs/x"}}, {"init_args": {"save_dir": "runs/xy"}}],
        "callbacks": [{"init_args": {"dirpath": "runs/x/c"}}, {"init_args": {"dirpath": None, "bundle": "runs/x"}}],
    }  # fmt: skip
    name_run_folder(config, "runs/x")
    root = "${trainer.default_root_dir}"
    assert config["logger"] == [
        {"init_args": {"save_dir": root, "name": "runs/x"}},
        {"init_args": {"save_dir": "runs/xy"}},
    ]
    assert [c["init_args"]["dirpath"] for c in config["callbacks"]] == [f"{root}/c", None]
    assert config["default_root_dir"] == "runs/x" == config["callbacks"][1]["init_args"]["bundle"]


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (["--data.root=nowhere"], "nowhere"),
        (["--data.root={tmp}/grey"], "has 3 classes, the model takes 10"),
        (["--data.batch_size=3", "--trainer.accumulate_grad_batches=2"], "batch_size 3 cannot be shared"),
        (["--ckpt_path={tmp}/file"], "is not a checkpoint that can be loaded"),
        (["--trainer.default_root_dir={tmp}/file/run"], "cannot be made: "),
        (["--sample_grid.sampling_steps=3", "--model.sampler=ddim"], "sampling_steps 3 does not divide T = 4000"),
        (
            [
                "--trainer.callbacks+=cdm_lightning.evaluation.StageDistance",
                "--trainer.callbacks.reference=data/references/fashion-val-32.safetensors",
            ],
            "is of images with resolution 32",
        ),
    ],
)
def test_nothing_is_made_before_the_input_is_known_to_be_good(wrong, sentence, tmp_path, capsys):
    """The loggers, W&B among them, open after that, and so does every folder."""
    (tmp_path / "file").write_text("no checkpoint")
    for split in ("train", "val"):
        make_folder(tmp_path / f"grey/{split}/8", [6], classes=3)
    run = options(tmp_path / "run", "--trainer.logger+=lightning.pytorch.loggers.WandbLogger")
    before = {*tmp_path.rglob("*"), *ROOT.glob("wandb/*")}
    assert sentence in sentence_of_refusal(capsys, [*run, *(word.format(tmp=tmp_path) for word in wrong)])
    assert {*tmp_path.rglob("*"), *ROOT.glob("wandb/*")} == before


def test_a_folder_that_is_not_ours_is_refused(tmp_path, monkeypatch):
    check_folder(tmp_path / "new/run")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("os.access", lambda path, mode: False)
    sentence_of_error(lambda: check_folder(tmp_path / "run"), f"cannot be written to: {tmp_path} is not ours to write")


def saver_of(folder, **options):
    """A Checkpoint in a folder, as its trainer sets it up."""
    saver = Checkpoint(**options)
    saver.dirpath = str(folder)
    return saver


def test_a_resumed_run_ends_with_the_files_of_the_unbroken_one(tmp_path):
    """Also where the interval of the checkpoints has changed, or the folder has moved."""
    for file in ("epoch=0-step=4.ckpt", "mine.ckpt"):
        (tmp_path / file).touch()
    state = saver_of("/elsewhere/checkpoints", every_n_train_steps=2).state_dict()
    state |= {"best_model_path": "/elsewhere/checkpoints/epoch=0-step=4.ckpt"}
    resumed = SimpleNamespace(ckpt_path=tmp_path / "epoch=0-step=4.ckpt", accumulate_grad_batches=1, datamodule=None)
    saver = saver_of(tmp_path, every_n_train_steps=3)
    key = saver_of(tmp_path, every_n_train_steps=2).state_key
    checkpoint = {"callbacks": {key: state, "EMA": {}}}
    saver.on_load_checkpoint(resumed, None, checkpoint)
    assert saver.state_key != key
    saver.load_state_dict(checkpoint["callbacks"][saver.state_key])
    assert saver.best_model_path == str(tmp_path / "epoch=0-step=4.ckpt")
    assert saver._should_remove_checkpoint(resumed, saver.best_model_path, str(tmp_path / "epoch=0-step=6.ckpt"))
    assert not saver._should_remove_checkpoint(resumed, saver.best_model_path, saver.best_model_path)
    assert not saver._should_remove_checkpoint(resumed, "/elsewhere/checkpoints/a.ckpt", str(tmp_path / "b.ckpt"))


def test_a_run_killed_between_its_two_files_leaves_one_numbered_file_in_the_end(tmp_path):
    make_folder(tmp_path / "data/train/8", [40])
    make_folder(tmp_path / "data/val/8", [5])

    def train(folder, resume=None, fail_at=None):
        trainer = L.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
            max_steps=6, limit_val_batches=0, callbacks=[Checkpoint(folder, every_n_train_steps=2)],
        )  # fmt: skip
        trainer.fit(Recorder(fail_at), ShardDataModule(tmp_path / "data", 12, 0), ckpt_path=resume, weights_only=True)
        return {file.name for file in folder.iterdir()}

    whole = train(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="lost power"):
        train(tmp_path / "parts", fail_at=5)
    (tmp_path / "parts/last.ckpt").unlink()  # it would be that of step 2, and `last` resumes from the newest
    newest = newest_checkpoint([tmp_path / "parts"])
    assert newest.name == "epoch=0-step=4.ckpt"
    assert train(tmp_path / "parts", newest) == whole == {"epoch=1-step=6.ckpt", "last.ckpt"}
