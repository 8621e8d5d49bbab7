"""The command line: help that a newcomer can use, and one sentence with exit code 2 for whatever cannot work."""

import shutil
from pathlib import Path

import pytest
import torch
from commands import BASE8, QUICK, ROOT, SR16, configs, fit_command
from refusals import sentence_of_refusal
from small_models import SMALL, randomise_weights

from cdm_lightning.__main__ import main
from cdm_lightning.cascade.bundle import write_bundle
from cdm_lightning.stages import BaseStage, SuperResolutionStage


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--help"], ["fit", "prepare", "bundle", "sample", "evaluate", "Train one stage"]),
        (["prepare", "imagenet", "--help"], ["--source", "--devkit", "--resolutions"]),
        (["prepare", "folder", "--help"], ["--source", "--grey"]),
        (["prepare", "webdataset", "--help"], ["--source", "--label", "--allow_commands", "--grey"]),
        (["prepare", "parquet", "--help"], ["--source", "--label", "--grey"]),
        (["bundle", "--help"], ["--checkpoints", "from low to high"]),
        (["sample", "--help"], ["--bundle", "--levels", "--truncated", "--sampling_steps", "--seed", "--classes"]),
        (["evaluate", "--help"], ["--references", "--detector"]),
        (["search", "--help"], ["--levels", "--repeats"]),
        (["fit", "--help"], ["--data.root", "--config"]),
    ],
)
def test_help(capsys, arguments, words):
    try:
        main(arguments)
    except SystemExit as stop:
        assert not stop.code
    out = " ".join(capsys.readouterr().out.split())
    assert all(word in out for word in words), out


def test_print_config_shows_every_default_and_overrides(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *configs(SR16), "--model.lr=0.5", "--print_config"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for line in (
        "lr: 0.5",
        "blur_probability: 0.5",
        "low_res_timesteps: 4000",
        "save_dir: runs/fashion/sr16",
        "flip: false",
    ):
        assert line in out


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["train"], "'train' is no command of cdm: known are fit, validate, test, predict, prepare"),
        (fit_command("--data.root=nowhere"), "nowhere/train does not exist"),
        (fit_command("--model.resolution=64"), "no shards for resolution 64"),
        (fit_command("--model.image_channels=3"), "has 1 channels, the model takes 3"),
        (fit_command("--model.num_classes=9"), "has 10 classes, the model takes 9"),
        (fit_command("--model.resolution=16", "--model.channel_mult=[1,1,1,1,1,1]"), "cannot be halved 5 times"),
        (fit_command("--model.norm_groups=3"), "norm_groups 3 does not divide"),
        (fit_command("--data.batch_size=3", "--trainer.accumulate_grad_batches=2"), "batch_size 3 cannot be shared"),
        (fit_command("--model.low_res_timesteps=null", config=SR16), "needs low_res_timesteps"),
        (fit_command("--model.low_resolution=6", config=SR16), "resolution 6 cannot be reached from 16"),
        (["sample", "--bundle", "nowhere", "--out", "x", "--count", "1"], "nowhere is not a bundle"),
        (["bundle", "--checkpoints", "[nowhere.ckpt]", "--out", "x"], "nowhere.ckpt does not exist"),
        (["prepare", "folder", "--source", "nowhere", "--out", "x"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence(capsys, tmp_path, arguments, sentence):
    if arguments[0] == "fit":
        arguments = [*arguments, f"--trainer.default_root_dir={tmp_path}"]
    assert sentence in sentence_of_refusal(capsys, arguments)
    assert not (ROOT / "x").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (fit_command("--model.no_such_key=1"), "no_such_key"),
        (fit_command("--trainer.max_stepz=1"), "max_stepz"),
        (fit_command("--model.schedule=square"), "square"),
        (["fit", "--config", "experiments/imagenet/sr65.yaml"], "sr65.yaml"),
        (["sample", "--bundle", "b", "--out", "o", "--cuont", "3"], "cuont"),
    ],
)
def test_unknown_names_are_refused_by_name(capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and words in said and "Traceback" not in said


def test_a_checkpoint_of_another_kind_is_refused(capsys, stages, tmp_path):
    for name, content in {"lightning": {"state_dict": {}}, "other": {"stage": "ResNet", "state_dict": {}}}.items():
        torch.save(content, tmp_path / f"{name}.ckpt")
        sentence = sentence_of_refusal(
            capsys, ["bundle", "--checkpoints", f"[{tmp_path}/{name}.ckpt]", "--out", str(tmp_path / "b")]
        )
        assert "is not a checkpoint of a stage" in sentence
    main(fit_command(f"--trainer.default_root_dir={tmp_path}/sr", "--trainer.limit_val_batches=0", config=SR16))
    sentence = sentence_of_refusal(
        capsys, ["bundle", "--checkpoints", f"[{tmp_path}/sr]", "--out", str(tmp_path / "b")]
    )
    assert "starts with a base stage" in sentence
    resumed = fit_command(
        f"--trainer.default_root_dir={tmp_path}/x", f"--ckpt_path={tmp_path}/sr/checkpoints/last.ckpt"
    )
    assert "its kind is 'SuperResolutionStage', and the configuration says 'BaseStage'" in sentence_of_refusal(
        capsys, resumed
    )
    retargeted = fit_command(f"--trainer.default_root_dir={tmp_path}/sr", "--model.prediction=epsilon", config=SR16)
    assert "its prediction is 'v_prediction', and the configuration says 'epsilon'" in sentence_of_refusal(
        capsys, retargeted
    )
    assert not (tmp_path / "b").exists()


def test_sampling_refuses_what_the_cascade_cannot_do(capsys, stages, tmp_path):
    write_bundle(tmp_path / "b", stages, {"levels": [0, 0]})
    sample = ["sample", "--bundle", str(tmp_path / "b"), "--out", str(tmp_path / "out"), "--count", "2"]
    for options, sentence in (
        (["--levels", "[4000,0]"], "level 4000 of stage sr16 lies outside"),
        (["--levels", "[0,3]"], "takes only 0"),
        (["--classes", "[10]"], "class 10 lies outside 0 ... 9"),
        (["--sampling_steps", "[5000,4,4]"], "sampling_steps 5000 lies outside 1 ... T = 4000"),
        (["--sampling_steps", "[4]"], "has 1 entries for 3 stages"),
        (["--per_class", "1"], "give one of count and per_class"),
        (["--block_size", "0"], "block_size 0 is less than 1"),
    ):
        assert sentence in sentence_of_refusal(capsys, [*sample, *options])
    assert not (tmp_path / "out").exists()
    other_clock = SuperResolutionStage(
        resolution=16, low_resolution=8, low_res_timesteps=1000, low_res_schedule="cosine", **SMALL
    )
    write_bundle(tmp_path / "b", [stages[0], other_clock, stages[2]], {})
    assert "the clocks disagree" in sentence_of_refusal(capsys, sample)


def test_a_full_disk_leaves_nothing_half_written(capsys, stages, tmp_path, monkeypatch):
    write_bundle(tmp_path / "b", stages, {"levels": [0, 0]})
    real = Path.write_bytes

    def full(self, data):
        if "train" in self.parts:
            real(self, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    sample = ["sample", "--bundle", str(tmp_path / "b"), "--out", str(tmp_path / "out"), "--count", "2"]
    assert "No space left on device" in sentence_of_refusal(capsys, sample)
    assert not list((tmp_path / "out").rglob("*.tar*")) and not list((tmp_path / "out").rglob("*.partial"))
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    main(sample)
    assert len(list((tmp_path / "out").rglob("*.tar"))) == 3


def test_weights_that_nothing_trained_are_not_measured(capsys, tmp_path):
    arguments = ["validate", *fit_command(f"--trainer.default_root_dir={tmp_path}/never")[1:]]
    assert "checkpoints holds no whole checkpoint, and ckpt_path last" in sentence_of_refusal(capsys, arguments)


def test_predict_samples_for_the_validation_classes(tmp_path, monkeypatch):
    options = [
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.limit_predict_batches=1",
        "--model.sampling_steps=2",
    ]
    main(fit_command(*options, config=SR16))
    seen = []
    monkeypatch.setattr(SuperResolutionStage, "on_predict_batch_end", lambda self, outputs, *_: seen.append(outputs))
    main(["predict", *fit_command(*options, config=SR16)[1:]])
    assert [(tuple(x.shape), x.dtype) for x in seen] == [((2, 1, 16, 16), torch.uint8)]


def test_the_last_step_is_kept_whatever_the_interval(tmp_path):
    options = [f"--trainer.default_root_dir={tmp_path}"]
    shipped = ["fit", *configs(BASE8)[:-2], *QUICK, *options, "--trainer.max_steps=63", "--trainer.limit_val_batches=0"]
    main(shipped)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 63
    averaged, raw = saved["state_dict"], saved["current_model_state"]
    assert any(not torch.equal(value, raw[f"module.{name}"] if f"module.{name}" in raw else raw[name])
               for name, value in averaged.items())  # fmt: skip
    assert [p.name for p in (tmp_path / "checkpoints").glob("last*")] == ["last.ckpt"]


def test_shards_cut_short_or_missing(capsys, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(ROOT / "data" / "fashion" / "val", tmp_path / "data" / split)
    victim = tmp_path / "data" / "train" / "32" / "001.tar.gz"
    whole = victim.read_bytes()
    options = [f"--data.root={tmp_path / 'data'}", f"--trainer.default_root_dir={tmp_path}/run"]
    victim.write_bytes(whole[:-1000])
    assert "it was cut or changed" in sentence_of_refusal(capsys, fit_command(*options))
    victim.write_bytes(whole[: len(whole) // 2] + b"\0" * (len(whole) - len(whole) // 2))
    assert "001.tar.gz is not the file its manifest lists: its SHA-256 is another" in sentence_of_refusal(
        capsys, fit_command(*options, "--trainer.max_steps=40")
    )
    victim.unlink()
    assert "001.tar.gz is missing" in sentence_of_refusal(capsys, fit_command(*options))
    (victim.parent / "manifest.json").unlink()
    assert "holds no manifest.json" in sentence_of_refusal(capsys, fit_command(*options))


def test_defects_keep_their_traceback(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("cdm_lightning.__main__.run", broken)
    with pytest.raises(ZeroDivisionError):
        main(["fit"])
    assert randomise_weights(BaseStage(resolution=8, **SMALL)).name == "base8"
