"""A warm start: the function at step 0 is the other stage's, whatever was added, and what does not fit is refused."""

import pytest
import safetensors.torch
import torch
from commands import fit_command
from refusals import sentence_of_error, sentence_of_refusal
from small_models import SMALLEST, randomise_weights, smallest_stages

from cdm_lightning.__main__ import main
from cdm_lightning.cascade.bundle import read_bundle, write_bundle
from cdm_lightning.stages import BaseStage, SuperResolutionStage
from cdm_lightning.stages.checkpoints import write_checkpoint
from cdm_lightning.stages.loading import load_stage

GAUSSIAN = {"augmentation": "gaussian", "low_res_timesteps": 20, "low_res_schedule": "cosine"}
LINEAR = {"augmentation": "gaussian", "low_res_timesteps": 99, "low_res_schedule": "linear"}


def upsampler(**options) -> SuperResolutionStage:
    """8x8 to 16x16, random in all its weights."""
    torch.manual_seed(1)
    return SuperResolutionStage(
        **{**SMALLEST, "resolution": 16, "low_resolution": 8, "augmentation": "none", **options}
    )


def stored(path, stage) -> str:
    """The stage as a checkpoint."""
    table = {"stage": type(stage).__name__, "hyper_parameters": dict(stage.hparams), "state_dict": stage.state_dict()}
    write_checkpoint({**table, "global_step": 0}, path)
    return str(path)


def outputs(stage, level=None) -> torch.Tensor:
    """What the network says of fixed inputs of three classes."""
    g = torch.Generator().manual_seed(3)
    x, low_res = torch.randn(3, 1, 16, 16, generator=g), torch.randn(3, 1, 16, 16, generator=g)
    level = torch.tensor([0.0, 7.0, 19.0]) if stage.unet.level_embedding is not None else None
    with torch.no_grad():
        return stage.unet(x, torch.tensor([1.0, 9.0, 20.0]), torch.tensor([0, 3, 9]), low_res, level)


@pytest.mark.parametrize(
    "before, after",
    [
        ({}, GAUSSIAN),
        ({"augmentation": "blur"}, GAUSSIAN),
        ({"num_classes": None}, {}),
        ({"num_classes": None}, GAUSSIAN),
        ({}, {"num_classes": 14}),
        (GAUSSIAN, {**GAUSSIAN, "max_level": 5}),
    ],
)
def test_the_function_at_the_first_step_is_the_other_stage_s(tmp_path, before, after):
    source = randomise_weights(upsampler(**before))
    expected = outputs(source)
    assert float(expected.std()) > 0.01
    path = stored(tmp_path / "source.ckpt", source)
    started = upsampler(**after, init_from=path)
    assert torch.equal(outputs(started), expected)
    assert float((outputs(upsampler(**after)) - expected).abs().max()) > 0.01
    if after.get("num_classes") == 14:
        rows = started.unet.label_embedding.weight
        torch.testing.assert_close(rows[10:], rows[:10].mean(0).expand(4, -1))
    if started.unet.level_embedding is not None and "augmentation" not in before:
        first, _, last = started.unet.level_embedding
        assert float(first.weight.abs().max()) > 0 and not last.weight.any()  # it can learn


def test_every_kind_of_source_is_read(tmp_path):
    base, sr = smallest_stages()
    write_bundle(tmp_path / "bundle", [base, sr], {"levels": [0], "truncated": False, "classes": None}, torch.float16)
    (base_read, sr_read), _ = read_bundle(tmp_path / "bundle")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    table = {"optimizer_states": [], "global_step": 4, "hyper_parameters": dict(sr.hparams), "stage": type(sr).__name__}
    write_checkpoint({**table, "state_dict": sr.state_dict()}, tmp_path / "run/checkpoints/last.ckpt")
    sources = {"bundle": sr_read, "bundle/sr16.safetensors": sr_read, "run": sr, "run/checkpoints/last.ckpt": sr}
    for source, expected in sources.items():
        started = upsampler(**GAUSSIAN, init_from=str(tmp_path / source))
        for mine, theirs in zip(started.state_dict().values(), expected.state_dict().values(), strict=True):
            assert torch.equal(mine, theirs)
    started = BaseStage(resolution=8, **SMALLEST, init_from=str(tmp_path / "bundle"))
    assert torch.equal(started.unet.conv_in.weight, base_read.unet.conv_in.weight)


@pytest.mark.parametrize(
    "before, after, parts",
    [
        ({"num_classes": 12}, {}, ["unet.label_embedding.weight of shape (12, 16)", "(10, 16)", "init_skip"]),
        ({}, {"num_classes": None}, ["holds unet.label_embedding.weight", "init_skip"]),
        (GAUSSIAN, {}, ["holds unet.level_embedding", "init_skip"]),
        ({"image_channels": 3}, {}, ["unet.conv_in.weight of shape (4, 6, 3, 3)", "(4, 2, 3, 3)"]),
        ({}, {"channel_mult": [1, 1]}, ["has no unet.down.1.0"]),
        ({}, {"prediction": "v_prediction"}, ["has prediction epsilon", "says v_prediction", "another function"]),
        ({}, {"num_heads": 2}, ["has num_heads 1", "says 2"]),
        ({}, {"norm_groups": 4}, ["has norm_groups 2"]),
        ({}, {"timesteps": 40}, ["has timesteps 20"]),
        ({}, {"upsampling": "bicubic"}, ["has upsampling bilinear", "says bicubic", "another function"]),
        ({"variance": "fixed_large"}, {"variance": "fixed_large", "continuous": True}, ["has continuous False"]),
        (GAUSSIAN, {**GAUSSIAN, "low_res_timesteps": 30}, ["has low_res_timesteps 20", "says 30"]),
        ({**GAUSSIAN, "low_res_timesteps": 99}, LINEAR, ["has low_res_schedule cosine", "says linear"]),
        ({"timesteps": 1000, "schedule": "linear"}, {"timesteps": 1000}, ["has schedule linear", "says cosine"]),
        ({}, {"init_skip": ["unet.conf_in"]}, ["init_skip unet.conf_in names no weight"]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, before, after, parts):
    path = stored(tmp_path / "source.ckpt", upsampler(**before))
    sentence_of_error(lambda: upsampler(**after, init_from=path), str(path), *parts)


@pytest.mark.parametrize(
    "before, after, skip",
    [
        ({"num_classes": 12}, {}, ["unet.label_embedding"]),
        (GAUSSIAN, {}, ["unet.level_embedding"]),
        ({"image_channels": 3}, {}, ["unet.conv_in", "unet.conv_out"]),
        ({}, {"prediction": "v_prediction"}, ["prediction"]),
    ],
)
def test_what_is_skipped_keeps_its_random_start(tmp_path, before, after, skip):
    source = randomise_weights(upsampler(**before))
    path = stored(tmp_path / "source.ckpt", source)
    started, fresh = upsampler(**after, init_from=path, init_skip=skip), upsampler(**after)
    theirs = source.state_dict()
    for name, value in started.state_dict().items():
        kept = any(name.startswith(word) for word in skip)
        assert torch.equal(value, fresh.state_dict()[name] if kept else theirs[name])


@pytest.mark.parametrize(
    "content",
    [
        b"text",
        {"state_dict": 3},
        [1],
        {"state_dict": {"unet.conv_in.bias": torch.zeros(4)}, "hyper_parameters": {}},
        {"state_dict": {"unet.conv_in.bias": 3}, "hyper_parameters": {"channels": 4}},
        {"state_dict": {"unet.conv_in.bias": torch.full((4,), torch.nan)}, "hyper_parameters": {"channels": 4}},
    ],
)
def test_a_source_that_is_no_stage_is_refused(tmp_path, content):
    path = tmp_path / "source.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    sentence_of_error(lambda: upsampler(init_from=str(path)), str(path))


def test_a_weight_file_that_is_not_the_bundle_s_is_refused(tmp_path):
    write_bundle(tmp_path / "bundle", smallest_stages(), {"levels": [0], "truncated": False})
    state = {name: value.contiguous() for name, value in upsampler().state_dict().items()}
    (tmp_path / "bundle/sr16.safetensors").write_bytes(safetensors.torch.save(state))
    sentence_of_error(lambda: upsampler(init_from=str(tmp_path / "bundle")), "sr16.safetensors", "SHA-256 differs")


def test_a_source_that_is_gone_is_needed_to_begin_alone(tmp_path):
    stage = upsampler(init_from=str(tmp_path / "gone"))
    sentence_of_error(lambda: stage.check_source(None), f"init_from {tmp_path / 'gone'} does not exist")
    stage.check_source(tmp_path / "run/checkpoints/last.ckpt")


def test_a_training_begins_there_and_its_result_needs_it_no_more(tmp_path, capsys):
    """With a rate of 0 the averaged weights are still those of the source; steps and optimizer begin anew."""
    options = [f"--trainer.default_root_dir={tmp_path / 'first'}", "--model.num_classes=null"]
    main(fit_command(*options))
    source = load_stage(tmp_path / "first/checkpoints/last.ckpt")
    more = [f"--trainer.default_root_dir={tmp_path / 'second'}", f"--model.init_from={tmp_path / 'first'}"]
    main(fit_command(*more, "--model.lr=0"))
    checkpoint = torch.load(tmp_path / "second/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 1 and checkpoint["optimizer_states"][0]["state"][0]["step"] == 1
    (tmp_path / "first").rename(tmp_path / "gone")
    tuned = load_stage(tmp_path / "second/checkpoints/last.ckpt")
    assert tuned.trained["init_from"] == str(tmp_path / "first")
    mine, theirs = tuned.state_dict(), source.state_dict()
    assert not mine.pop("unet.label_embedding.weight").any() and mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    main(fit_command(*more, "--model.lr=0", "--trainer.max_steps=2"))  # goes on without it
    assert load_stage(tmp_path / "second/checkpoints/last.ckpt").trained["steps"] == 2
    anew = [f"--trainer.default_root_dir={tmp_path / 'third'}", f"--model.init_from={tmp_path / 'first'}"]
    assert "does not exist" in sentence_of_refusal(capsys, fit_command(*anew))
    assert not (tmp_path / "third").exists()
