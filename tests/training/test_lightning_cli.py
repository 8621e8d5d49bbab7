"""Lightning's command line as a project of this size needs it: old class paths, and what they are called now."""

from pkgutil import resolve_name

import pytest
import yaml
from commands import BASE8, ROOT, fit_command
from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import LightningArgumentParser

from cdm_lightning.__main__ import main
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.planning.recipe import read_recipe
from cdm_lightning.stages import BaseStage
from cdm_lightning.stages.loading import load_stage
from cdm_lightning.training import EMA, Checkpoint
from cdm_lightning.training.checkpoint_files import Trainer
from cdm_lightning.training.lightning_cli import (
    MOVED_CLASSES,
    add_callback_options,
    merge_callback_options,
    refuse_old_class_paths,
)


@pytest.mark.parametrize("old, new", MOVED_CLASSES.items())
def test_an_old_class_path_is_refused_by_the_name_of_the_new_one(old, new, tmp_path):
    sentence = f"cdm_lightning.{old} is cdm_lightning.{new} now"
    for name in ("mine.yaml", "mine.conf"):
        file = tmp_path / name
        file.write_text(f"trainer:\n  callbacks:\n    - class_path: cdm_lightning.{old}\n")
        for words in (["fit", "--config", str(file)], [f"--config={file}"], [f"--trainer={file}"]):
            with pytest.raises(InputError, match=f"{name}: {sentence}"):
                refuse_old_class_paths(words)
        with pytest.raises(InputError, match=f"{name}: {sentence}"):
            read_recipe([file])
    with pytest.raises(InputError, match=sentence):
        refuse_old_class_paths([f"--model=cdm_lightning.{old}"])
    assert resolve_name(f"cdm_lightning.{new}").__name__ == new.rpartition(".")[2]


def test_class_paths_that_stayed_and_comments_are_taken(tmp_path):
    file = tmp_path / "mine.yaml"
    kept = ("stages.BaseStage", "stages.SuperResolutionStage", "cascade.CascadeModule")
    kept = (*kept, "evaluation.callback.CascadeFigures")
    lines = [f"model: cdm_lightning.{path}  # once cdm_lightning.callbacks.EMA\n" for path in kept]
    file.write_text("# was cdm_lightning.callbacks.EMA\n" + "".join(lines))
    refuse_old_class_paths(["--config", str(file), "--config", "no_such.yaml", f"--data.root={tmp_path}"])
    names = [resolve_name(f"cdm_lightning.{path}").__name__ for path in kept]
    assert names == [path.rpartition(".")[2] for path in kept]


def test_arguments_with_an_open_quotation_are_one_sentence(tmp_path):
    with pytest.raises(InputError, match='arguments "it\'s" cannot be split into words: no closing quotation'):
        read_recipe([], "it's")


def callbacks_of(*words):
    """class name -> arguments that are given, of the callbacks that a command line asks for."""
    parser = LightningArgumentParser(parser_mode="omegaconf+")
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_lightning_class_args(Trainer, "trainer")
    add_callback_options(parser)
    read = parser.parse_args(list(words))
    merge_callback_options(read)
    assert "ema" not in read and "checkpoint" not in read
    listed = read.trainer.callbacks
    assert len({entry.class_path for entry in listed}) == len(listed)
    return {entry.class_path.rpartition(".")[2]: dict(entry.get("init_args") or {}) for entry in listed}


def test_a_short_option_changes_one_argument_of_a_callback_that_is_listed(tmp_path):
    file = tmp_path / "mine.yaml"
    saver = "{class_path: cdm_lightning.training.Checkpoint, init_args: {every_n_train_steps: 160, save_top_k: -1}}"
    file.write_text(f"trainer:\n  callbacks: [cdm_lightning.training.EMA, {saver}, cdm_lightning.training.LossCurve]\n")
    plain = callbacks_of(f"--config={file}")
    changed = callbacks_of("--ema.decay=0.99", f"--config={file}", "--checkpoint.every_n_train_steps=100")
    assert list(plain) == list(changed) == ["EMA", "Checkpoint", "LossCurve"]
    assert changed["EMA"]["decay"] == 0.99 and plain["EMA"]["decay"] == 0.9999
    assert changed["Checkpoint"] == {**plain["Checkpoint"], "every_n_train_steps": 100}
    assert changed["Checkpoint"]["save_top_k"] == -1


def test_a_short_option_adds_a_callback_that_is_not_listed(tmp_path):
    assert callbacks_of() == {}
    assert callbacks_of("--ema.decay=0.99", "--trainer.callbacks=cdm_lightning.training.LossCurve") == {
        "LossCurve": {},
        "EMA": {"decay": 0.99},
    }
    file = tmp_path / "mine.yaml"
    file.write_text("ema: {decay: 0.9}\ncheckpoint: {every_n_train_steps: 7}\n")
    found = callbacks_of(f"--config={file}", "--checkpoint.save_top_k=0")
    assert found == {"EMA": {"decay": 0.9}, "Checkpoint": {"every_n_train_steps": 7, "save_top_k": 0}}
    assert EMA(**found["EMA"]).decay == 0.9 and Checkpoint(**found["Checkpoint"]).save_top_k == 0


def test_a_plan_reads_the_short_options(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert read_recipe([ROOT / "experiments/fashion/base8.yaml"], "--data.root=x --ema.decay 0.9").average
    assert not read_recipe([ROOT / "experiments/fashion/base8.yaml"], "--data.root=x").average


def test_channels_and_classes_are_those_of_the_shards_where_they_are_not_given(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = yaml.safe_load(BASE8.read_text())
    for name in ("image_channels", "num_classes"):
        del recipe["model"]["init_args"][name]
    (tmp_path / "base8.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "defaults.yaml").write_text((BASE8.parent / "defaults.yaml").read_text())
    main(fit_command(f"--trainer.default_root_dir={tmp_path / 'run'}", config=tmp_path / "base8.yaml"))
    stage = load_stage(tmp_path / "run/checkpoints/last.ckpt")
    assert (stage.image_channels, stage.num_classes) == (1, 10)
    assert (stage.hparams.image_channels, stage.hparams.num_classes) == (1, 10)
    unlabelled = [f"--trainer.default_root_dir={tmp_path / 'none'}", "--model.num_classes=null"]
    main(fit_command(*unlabelled, config=tmp_path / "base8.yaml"))
    assert load_stage(tmp_path / "none/checkpoints/last.ckpt").num_classes is None
    assert BaseStage(resolution=8, channels=32).num_classes == 1000  # where no data is known
