"""Every YAML trains a step through the real command line, and the ImageNet files state the paper's table."""

import csv

import numpy as np
import pytest
import torch
import yaml
from commands import QUICK, ROOT, configs

from cdm_lightning import stages
from cdm_lightning.__main__ import main
from cdm_lightning.data.shards import Manifest, write_manifest, write_shard
from cdm_lightning.foundation.images import encode_png
from cdm_lightning.stages.adm import PRESETS, read_flags, stage_arguments
from cdm_lightning.stages.loading import load_stage

EXPERIMENTS = sorted(
    p
    for p in (ROOT / "experiments").glob("*/*.yaml")
    if {"defaults", "cascade", "cas", "distance", "sweeps", "gpu", "study.yaml"}.isdisjoint(
        (p.stem, p.name, p.parent.name)
    )
)


@pytest.fixture(scope="module")
def colour_shards(tmp_path_factory):
    """Four images of 256x256 in 1000 classes, as `cdm prepare imagenet` would leave them."""
    root = tmp_path_factory.mktemp("imagenet")
    images = np.random.default_rng(0).integers(0, 256, (4, 256, 256, 3), dtype=np.uint8)
    for split in ("train", "val"):
        folder = root / split / "256"
        shard = write_shard(folder / "000000.tar", [(str(i), encode_png(x), 300 * i) for i, x in enumerate(images)])
        counts = [int(c % 300 == 0) for c in range(1000)]
        write_manifest(folder, Manifest(256, 3, split, [f"n{c:08d}" for c in range(1000)], counts, [shard]))
    return root


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_experiment_trains_a_step(path, colour_shards, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = tmp_path / path.stem
    arguments = ["fit", *configs(path), *QUICK, f"--trainer.default_root_dir={run}"]
    if path.parent.name in ("imagenet", "lsun"):
        arguments += [f"--data.root={colour_shards}", "--model.init_from=null"]  # the network is not the published one
    elif path.parent.name == "study":
        arguments += ["--data.root=data/fashion", "--model.image_channels=1"]
    main(arguments)
    stage = load_stage(run / "checkpoints" / "last.ckpt")
    stated = yaml.safe_load(path.read_text())["model"]["init_args"]
    assert stage.trained["steps"] == 1 and stage.resolution == stated["resolution"]
    for name in ("timesteps", "schedule", "variance", "low_res_timesteps", "augmentation", "attention_resolutions"):
        assert stage.hparams.get(name) == stated.get(name)
    assert len(list((run / "grids").glob("*.png"))) == 1


PAPER = {  # Appendix B, column by column
    "base32": (256, [1, 2, 3, 4], 6, [8, 16], 4, 0.1, 2048, 700_000, 4000, 4000, "learned", False, None),
    "sr64": (256, [1, 2, 3, 4], 5, [8, 16], 4, 0.1, 2048, 400_000, 4000, 4000, "learned", False, "gaussian"),
    "sr128": (128, [1, 2, 4, 8, 8], 3, [16], 1, 0.0, 1024, 500_000, 2000, 100, "fixed_small", True, "blur"),
    "sr256": (128, [1, 2, 4, 4, 8, 8], 3, [16], 1, 0.0, 1024, 500_000, 2000, 100, "fixed_small", True, "blur"),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_imagenet_files_state_the_papers_table(name):
    config = yaml.safe_load((ROOT / "experiments" / "imagenet" / f"{name}.yaml").read_text())
    model = config["model"]["init_args"]
    names = ("channels", "channel_mult", "num_res_blocks", "attention_resolutions", "num_heads", "dropout")
    stated = tuple(model.get(name) for name in names)
    stated += (
        config["data"]["batch_size"],
        config["trainer"]["max_steps"],
        model["timesteps"],
        model["sampling_steps"],
    )
    stated += (model["variance"], model.get("continuous", False), model.get("augmentation"))
    assert stated == PAPER[name]
    assert model["num_classes"] == 1000 and model["lr"] == 1e-4
    defaults = yaml.safe_load((ROOT / "experiments" / "defaults.yaml").read_text())
    assert defaults["trainer"]["callbacks"][0]["init_args"]["decay"] == 0.9999


def test_stages_below_128_take_gaussian_noise_and_those_above_blur():
    """The paper's choice, and in words which s it found best, where there is one."""
    kinds = {}
    for path in (ROOT / "experiments" / "imagenet" / f"{name}.yaml" for name in PAPER if name.startswith("sr")):
        text = path.read_text()
        model = yaml.safe_load(text)["model"]["init_args"]
        kinds[model["resolution"]] = model["augmentation"]
        assert ("# s in sampling. Paper: " in text) == (model["augmentation"] == "gaussian")
        assert model.get("max_level") is None and "min_level" not in model  # amortised over all s
    assert kinds == {64: "gaussian", 128: "blur", 256: "blur"}


def test_the_tuned_upsampler_is_adms_network():
    config = yaml.safe_load((ROOT / "experiments/imagenet/sr256_from_adm.yaml").read_text())["model"]["init_args"]
    kind, published = stage_arguments(read_flags(PRESETS["64_256_upsampler"]))
    assert kind == "SuperResolutionStage" and published.pop("augmentation") == "none"
    with torch.device("meta"):
        built, _ = (stages.SuperResolutionStage(**given) for given in (config, {**published, "augmentation": "none"}))
    assert {name: built.hparams[name] for name in published} == published


def test_every_number_of_imagenet_and_lsun_is_marked_as_the_papers_or_ours():
    for path in EXPERIMENTS:
        if (data := path.parent.name) in ("imagenet", "lsun"):
            lines = path.read_text().split("init_args:")[1].splitlines()
            bare = [line for line in lines if ":" in line and not line.rstrip().endswith(":") and "#" not in line]
            assert [line.strip() for line in bare] == [f"default_root_dir: runs/{data}/{path.stem}"]


def test_a_run_goes_on_where_it_was(tmp_path, monkeypatch):
    """Six steps in two calls end in the bits of six steps in one: weights, averages, data, draws and dropout."""
    monkeypatch.chdir(ROOT)
    path = ROOT / "experiments" / "fashion" / "sr16.yaml"
    options = ["--model.dropout=0.1", "--model.decay_fraction=0", "--trainer.limit_val_batches=0"]

    def run(folder, steps):
        arguments = ["fit", *configs(path), *QUICK, *options, f"--trainer.default_root_dir={tmp_path / folder}"]
        main([*arguments, f"--trainer.max_steps={steps}", "--trainer.val_check_interval=100"])
        return torch.load(tmp_path / folder / "checkpoints" / "last.ckpt", weights_only=True)

    run("parts", 3)
    parts, whole = run("parts", 6), run("whole", 6)
    assert parts["global_step"] == whole["global_step"] == 6
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][name]), name
    for name, value in whole["current_model_state"].items():
        assert torch.equal(value, parts["current_model_state"][name]), name
    assert parts["ShardDataModule"]["images_seen"] == whole["ShardDataModule"]["images_seen"] == 12


def test_the_loss_is_logged_and_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_MODE", "offline")
    path = ROOT / "experiments" / "fashion" / "base8.yaml"
    quick = [option for option in QUICK if "logger" not in option]
    main(["fit", *configs(path), *quick, f"--trainer.default_root_dir={tmp_path}", "--trainer.log_every_n_steps=1"])
    with (tmp_path / "logs" / "version_0" / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert any(float(row["train/loss"] or 0) > 0 for row in rows) and any(
        float(row["val/loss"] or 0) > 0 for row in rows
    )
    assert any(float(row["train/ema_decay"] or 0) == pytest.approx(0.1) for row in rows)
    assert (tmp_path / "loss.png").stat().st_size > 5000
    pictures = list((tmp_path / "wandb").glob("offline-run-*/files/media/images/samples*.png"))
    assert len(pictures) == 1


def test_mixed_precision_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = ROOT / "experiments" / "fashion" / "base8.yaml"
    main(["fit", *configs(path), *QUICK, "--trainer.precision=bf16-mixed", f"--trainer.default_root_dir={tmp_path}"])
    stage = load_stage(tmp_path / "checkpoints" / "last.ckpt")
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in stage.parameters())
