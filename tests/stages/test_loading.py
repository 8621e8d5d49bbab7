"""Stages from files: what a checkpoint says, which one is the newest, and what a resumed stage may change."""

import os

import pytest
import torch
from small_models import SMALLEST, smallest_stages

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.stages import BaseStage
from cdm_lightning.stages.checkpoints import check_checkpoint, newest_checkpoint
from cdm_lightning.stages.diffusion_stage import RESUMABLE_CHANGES, check_same_stage
from cdm_lightning.stages.loading import build_stage, load_stage

WHOLE = {"state_dict": {}, "optimizer_states": []}


@pytest.fixture
def base():
    return smallest_stages(())[0]


def checkpoint_of(stage, **about):
    return {
        "stage": "BaseStage", "hyper_parameters": dict(stage.hparams), "state_dict": stage.state_dict(),
        "global_step": 7, **about,
    }  # fmt: skip


def test_a_loaded_stage_knows_how_it_was_trained(base, tmp_path):
    data = {"images_seen": 56, "classes": ["a", "b"], "crop": "adm", "filter": "box", "batches": 7}
    torch.save(checkpoint_of(base, averaging_state={}, ShardDataModule=data), tmp_path / "a.ckpt")
    torch.save(checkpoint_of(base), tmp_path / "b.ckpt")
    loaded = load_stage(tmp_path / "a.ckpt")
    known = {"averaged": True, "steps": 7, "images": 56, "classes": ["a", "b"], "crop": "adm", "filter": "box"}
    assert known.items() <= loaded.trained.items()
    unknown = {"averaged": False, "steps": 7, "images": None, "classes": None, "crop": None, "filter": None}
    assert unknown.items() <= load_stage(tmp_path / "b.ckpt").trained.items()
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), base.parameters(), strict=True))


@pytest.mark.parametrize(
    "change",
    [{"stage": "ResNet"}, {"stage": ["BaseStage"]}, {"hyper_parameters": None}, {"state_dict": None}, {"step": None}],
)
def test_what_is_not_whole_is_no_checkpoint_of_a_stage(base, tmp_path, change):
    checkpoint = checkpoint_of(base) | change
    for name in [name for name, value in change.items() if value is None]:
        checkpoint.pop("global_step" if name == "step" else name)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="is not a checkpoint of a stage"):
        load_stage(tmp_path / "a.ckpt")
    torch.save([checkpoint], tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="is not a checkpoint of a stage"):
        load_stage(tmp_path / "a.ckpt")


def test_arguments_are_those_of_the_constructor(base):
    arguments, state = dict(base.hparams), base.state_dict()
    assert dict(build_stage(BaseStage, {**arguments, "_class_path": "x"}, state, "f").hparams) == arguments
    assert build_stage(BaseStage, {**arguments, "num_classes": 10, "compile": None}, state, "f").num_classes == 10
    for change, sentence in (
        ({"channels": None}, "TypeError: channels is null"),
        ({"channels": "many"}, "f does not fit BaseStage"),
        ({"colour": 1}, "f does not fit BaseStage"),
        ({"norm_groups": 3}, "norm_groups 3 does not divide"),
    ):
        with pytest.raises(InputError, match=sentence):
            build_stage(BaseStage, {**arguments, **change}, state, "f")


def test_the_newest_is_the_one_with_the_most_steps_and_then_the_last_written(tmp_path):
    for number, (name, step) in enumerate([("x/a", 9), ("y/b", 4), ("x/c", 9), ("x/d", 2), ("y/e", 9)]):
        path = tmp_path / f"{name}.ckpt"
        path.parent.mkdir(exist_ok=True)
        torch.save({**WHOLE, "global_step": step}, path)
        os.utime(path, (number, number if name != "y/e" else 0))
    (tmp_path / "x/torn.ckpt").write_bytes(b"PK\x03\x04")
    torch.save({"state_dict": {}, "global_step": 99}, tmp_path / "x/weights.ckpt")  # has no optimizer
    folders = [tmp_path / "y", tmp_path / "x"]
    with pytest.warns(UserWarning, match="is not a whole checkpoint and is passed over") as warned:
        assert newest_checkpoint(folders) == tmp_path / "x/c.ckpt"
    assert len(warned) == 2
    assert newest_checkpoint(folders[:1]) == tmp_path / "y/e.ckpt"
    for at_most, name in ((9, "x/c"), (8, "y/b"), (4, "y/b"), (3, "x/d")):
        with pytest.warns(UserWarning):
            assert newest_checkpoint(folders, at_most) == tmp_path / f"{name}.ckpt"
    assert newest_checkpoint(folders[:1], 1) is newest_checkpoint([]) is newest_checkpoint([tmp_path / "z"]) is None


def test_what_lightning_cannot_go_on_from_is_refused(tmp_path):
    whole = {
        "pytorch-lightning_version": "2.6", "epoch": 0, "global_step": 1, "loops": {}, "state_dict": {},
        "hyper_parameters": {},
    }  # fmt: skip
    torch.save(whole, tmp_path / "a.ckpt")
    check_checkpoint(tmp_path / "a.ckpt")
    for name in whole:
        torch.save({key: value for key, value in whole.items() if key != name}, tmp_path / "b.ckpt")
        with pytest.raises(InputError, match=f"it holds no {name}"):
            check_checkpoint(tmp_path / "b.ckpt")
    torch.save([whole], tmp_path / "b.ckpt")
    with pytest.raises(InputError, match="it holds no epoch"):  # the first of the sorted names
        check_checkpoint(tmp_path / "b.ckpt")


def test_a_resumed_stage_keeps_its_network_and_its_target(base):
    arguments = dict(base.hparams)
    checkpoint = checkpoint_of(base)
    check_same_stage("BaseStage", "base8", arguments, checkpoint)
    for name in arguments:
        changed = {**arguments, name: "other"}
        if name in RESUMABLE_CHANGES:
            check_same_stage("BaseStage", "base8", changed, checkpoint)
            continue
        with pytest.raises(InputError, match=f"its {name} is .*, and the configuration says 'other'"):
            check_same_stage("BaseStage", "base8", changed, checkpoint)
    with pytest.raises(InputError, match="its kind is 'BaseStage', and the configuration says 'SuperResolutionStage'"):
        check_same_stage("SuperResolutionStage", "sr8", arguments, checkpoint)


@pytest.mark.parametrize(
    ("warmup", "decay", "expected"),
    [
        (0, 0.0, [1.0] * 10),
        (3, 0.0, [0.25, 0.5, 0.75] + [1.0] * 7),
        (0, 0.4, [1.0] * 7 + [0.75, 0.5, 0.25]),  # the last of 4 steps of decay, at step 10, would be 0
        (1, 1.0, [0.5, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        (0, 0.05, [1.0] * 10),  # less than a step of decay
    ],
)
def test_the_learning_rate_rises_and_falls_in_straight_lines(warmup, decay, expected):
    stage = BaseStage(resolution=8, **SMALLEST, lr=0.5, warmup_steps=warmup, decay_fraction=decay)
    stage.trainer = type("T", (), {"estimated_stepping_batches": 10, "precision": "32-true"})()
    made = stage.configure_optimizers()
    assert made["lr_scheduler"]["interval"] == "step" and made["optimizer"].defaults["lr"] == 0.5
    found = []
    for _ in range(10):
        found.append(made["optimizer"].param_groups[0]["lr"] / 0.5)
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert found == pytest.approx(expected)
