"""A checkpoint that `cdm fit` of version 0.1.0 wrote after four steps is read, and training goes on from it.

Kept beside it are the weights, and their averages, that the same version had after two more steps: those of today, if
the random numbers are those of then.
"""

import shutil
from pathlib import Path

import torch
import yaml
from commands import ROOT
from earlier_noise import EarlierStreams
from safetensors.torch import load_file

from cdm_lightning.__main__ import main
from cdm_lightning.stages import diffusion_stage
from cdm_lightning.stages.loading import load_stage

RUN = Path(__file__).parent / "run_of_0.1.0"
SETTINGS = {
    "trainer.logger": "false", "trainer.max_steps": 6, "trainer.val_check_interval": 100,
    "trainer.limit_val_batches": 0, "trainer.enable_progress_bar": "false", "trainer.accelerator": "cpu",
    "trainer.devices": 1, "trainer.accumulate_grad_batches": 2, "data.batch_size": 8, "data.num_workers": 0,
    "model.channels": 4, "model.channel_mult": "[1]", "model.attention_resolutions": "[]", "model.norm_groups": 2,
    "model.num_heads": 1, "model.dropout": 0.1, "model.warmup_steps": 2, "model.decay_fraction": 0.5,
    "model.sampling_steps": 2,
}  # fmt: skip


STEP4, STEP6 = torch.load(RUN / "step4.ckpt", weights_only=True), load_file(RUN / "step6.safetensors")


def test_a_stage_of_an_earlier_version_is_read():
    stage = load_stage(RUN / "step4.ckpt")
    names = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
    assert stage.name == "sr16" and stage.hparams["low_res_timesteps"] == 4000 and stage.hparams["dropout"] == 0.1
    assert stage.trained == {
        "averaged": True, "steps": 4, "images": 32, "classes": names, "crop": "padded from 28 to 32", "filter": "none",
    }  # fmt: skip
    state = stage.state_dict()
    assert all(torch.equal(state[name], value) for name, value in STEP4["state_dict"].items())


def test_a_training_of_an_earlier_version_goes_on(tmp_path, monkeypatch):
    """With the callbacks of today, which the checkpoint knows by their names of then."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(diffusion_stage, "KeyedStreams", EarlierStreams)
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(RUN / "step4.ckpt", tmp_path / "checkpoints" / "last.ckpt")
    saver = {"class_path": "cdm_lightning.training.Checkpoint", "init_args": {"every_n_train_steps": 2}}
    others = [{"class_path": f"cdm_lightning.training.{name}"} for name in ("EMA", "FiniteSteps")]
    others[0]["init_args"] = {"decay": 0.9999}
    (tmp_path / "callbacks.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [*others, saver]}}))
    folder = ROOT / "experiments"
    files = [folder / "defaults.yaml", folder / "fashion/defaults.yaml", folder / "fashion/sr16.yaml"]
    configs = [word for file in [*files, tmp_path / "callbacks.yaml"] for word in ("--config", str(file))]
    options = [f"--{name}={value}" for name, value in {**SETTINGS, "trainer.default_root_dir": tmp_path}.items()]
    main(["fit", *configs, *options])
    ended = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert ended["global_step"] == 6 and ended["ShardDataModule"]["images_seen"] == 48
    for prefix, kind in (("current", "current_model_state"), ("averaged", "state_dict")):
        names = [name for name, value in ended[kind].items() if value.is_floating_point()]
        before, now = (torch.cat([state[kind][name].flatten() for name in names]) for state in (STEP4, ended))
        expected = torch.cat([STEP6[f"{prefix}.{name}"].flatten() for name in names])
        assert float((now - expected).norm()) < 0.01 * float((expected - before).norm())  # processors round differently
