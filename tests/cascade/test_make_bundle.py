"""`cdm bundle`, and a cascade of checkpoints without a bundle: which weights, levels and names they take."""

import pytest
import torch
from small_models import randomise_weights, smallest_stages

from cdm_lightning.cascade import CascadeModule
from cdm_lightning.cascade.bundle import write_bundle
from cdm_lightning.cascade.make_bundle import bundle
from cdm_lightning.cascade.metadata import read_bundle_metadata
from cdm_lightning.foundation.errors import InputError

NAMES = list("abcdefghij")


def save(path, stage, steps, averaged=True, **data):
    """A checkpoint of a stage, as a training leaves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"averaging_state": {}} if averaged else {}
    torch.save(
        {
            "stage": type(stage).__name__, "hyper_parameters": dict(stage.hparams), "state_dict": stage.state_dict(),
            "global_step": steps, "optimizer_states": [], "ShardDataModule": {"images_seen": 8 * steps, **data},
            **state,
        },
        path,
    )  # fmt: skip


def same_weights(stage, other):
    return all(torch.equal(x, y) for x, y in zip(stage.parameters(), other.parameters(), strict=True))


def test_the_newest_checkpoint_of_each_run_and_what_was_asked_for(tmp_path, capsys):
    (old, sr16), (new, _) = smallest_stages(), smallest_stages()
    randomise_weights(new)
    for steps, stage in ((30, new), (4, old)):  # the one with fewer steps is written last
        save(tmp_path / f"base8/checkpoints/step{steps}.ckpt", stage, steps)
    save(tmp_path / "sr16.ckpt", sr16, 5, averaged=False, classes=NAMES, crop="adm", filter="box")
    bundle([tmp_path / "base8", tmp_path / "sr16.ckpt"], tmp_path / "b", levels=[7], truncated=True)
    million = sum(p.numel() for stage in (new, sr16) for p in stage.parameters()) / 1e6
    said = f"b: base8 (30 steps) -> sr16 (5 steps), {million:.2f} M parameters, NOT averaged: sr16\n"
    assert capsys.readouterr().out.endswith(said)
    cascade = CascadeModule(tmp_path / "b")
    assert (cascade.levels, cascade.truncated) == ([7], True)
    assert cascade.origin == {"classes": NAMES, "crop": "adm", "filter": "box"}
    assert read_bundle_metadata(tmp_path / "b")["classes"] == NAMES
    assert same_weights(cascade.stages[0], new) and not same_weights(old, new) and same_weights(cascade.stages[1], sr16)
    trained = [{name: stage.trained[name] for name in ("steps", "images", "averaged")} for stage in cascade.stages]
    assert trained == [
        {"steps": 30, "images": 240, "averaged": True}, {"steps": 5, "images": 40, "averaged": False}
    ]  # fmt: skip


def test_by_default_the_least_level_of_each_stage_without_truncation(tmp_path, capsys):
    for stage in smallest_stages(min_level=3):
        save(tmp_path / f"{stage.name}.ckpt", stage, 1)
    files = [tmp_path / "base8.ckpt", tmp_path / "sr16.ckpt"]
    bundle(files, tmp_path / "b")
    bundle(files, tmp_path / "half", half=True)
    assert capsys.readouterr().out.count("M parameters\n") == 2  # all are averaged
    about = read_bundle_metadata(tmp_path / "b")
    assert (about["levels"], about["truncated"], about["classes"]) == ([3], False, None)
    whole, half = ((tmp_path / name / "base8.safetensors").stat().st_size for name in ("b", "half"))
    assert half < 0.8 * whole
    write_bundle(tmp_path / "none", smallest_stages(), {})
    assert CascadeModule(tmp_path / "none").levels == [0]


def test_a_run_without_a_checkpoint_is_refused_by_the_name_of_the_file(tmp_path):
    (tmp_path / "base8").mkdir()
    with pytest.raises(InputError, match=r"base8/checkpoints/last\.ckpt does not exist"):
        bundle([tmp_path / "base8"], tmp_path / "b")
    base, _, sr32 = smallest_stages(("gaussian", "gaussian"))
    for stage in (base, sr32):
        save(tmp_path / f"{stage.name}.ckpt", stage, 1)
    with pytest.raises(InputError, match="starts from resolution 16"):
        bundle([tmp_path / "base8.ckpt", tmp_path / "sr32.ckpt"], tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_cascade_of_checkpoints_is_that_of_their_stages(tmp_path):
    stages = smallest_stages()
    for stage in stages:
        save(tmp_path / f"{stage.name}.ckpt", stage, 1, classes=NAMES)
    files = [tmp_path / "base8.ckpt", tmp_path / "sr16.ckpt"]
    cascade, direct = CascadeModule(checkpoints=files), CascadeModule.from_stages(stages)
    assert (cascade.levels, cascade.truncated, cascade.origin["classes"]) == ([0], False, NAMES)
    label = torch.tensor([0, 3])
    for one, other in zip(cascade.sample(label, label), direct.sample(label, label), strict=True):
        assert torch.equal(one, other)
    chosen = CascadeModule(checkpoints=files, levels=[5], truncated=True, sampler="ddim", sampling_steps=[4, 5])
    assert (chosen.levels, chosen.truncated) == ([5], True)
    assert [(s.diffusion.sampler, s.diffusion.sampling_steps) for s in chosen.stages] == [("ddim", 4), ("ddim", 5)]
    for sources in ({}, {"bundle": tmp_path / "b", "checkpoints": files}):
        with pytest.raises(InputError, match="give one of the two"):
            CascadeModule(**sources)
