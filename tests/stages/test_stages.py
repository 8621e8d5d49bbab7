"""Stages: what a training example sees is what sampling sees, draws are keyed, weights come back whole."""

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_models import SMALL, batch_of, randomise_weights, record_calls
from torch.utils.data import DataLoader

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import downscale, to_float, to_uint8
from cdm_lightning.foundation.randomness import KeyedStreams
from cdm_lightning.network import UNet
from cdm_lightning.stages import BaseStage, SuperResolutionStage
from cdm_lightning.stages.loading import load_stage
from cdm_lightning.training import EMA


def test_conditioning_is_the_same_bits_in_training_and_in_sampling(stages):
    for stage in stages[1:]:
        image, label, index = batch_of(stage)
        calls = record_calls(stage)
        stage.losses((image, label, index), "train")
        x, t, _, seen, level = calls[0]
        assert torch.equal(calls[0].label, label)
        # sampling draws its own strength; given the one that training drew, the network gets the same bits
        streams = KeyedStreams(index, "cpu", stage.seed, "train")
        streams.rand()  # t
        strength = stage.augmentation.draw(streams)
        low_res = to_float(downscale(to_uint8(image), stage.low_resolution))
        augmented = stage.augment(low_res, strength, streams)
        stage.conditioned_predictor(label, augmented, strength)(x, t)
        assert torch.equal(calls[1].low_res, seen)
        takes = stage.augmentation.takes_level
        assert torch.equal(calls[1].level, level) if takes else calls[1].level is level is None


def test_sampling_feeds_the_network_its_level_and_its_low_resolution_image(stages):
    stage = stages[1]
    calls = record_calls(stage)
    low_res = torch.rand(2, 1, 8, 8) * 2 - 1
    stage.sample(torch.tensor([1, 2]), low_res, 501, 0, KeyedStreams([0, 1], "cpu", "x"))
    assert len(calls) == 4
    expected = torch.nn.functional.interpolate(low_res, (16, 16), mode="bilinear")
    for call in calls:
        assert torch.equal(call.low_res, expected) and call.level.tolist() == [501.0, 501.0]
        assert call.label.tolist() == [1, 2]
    assert [float(call.t[0]) for call in calls] == [4000.0, 2667.0, 1334.0, 1.0]


def test_examples_are_drawn_per_image_and_from_their_index_alone(stages):
    stage = stages[1]
    image, label, index = batch_of(stage, 256)
    calls = record_calls(stage)
    stage.losses((image, label, index), "train")
    x, t, _, conditioning, level = calls[0]
    assert len(set(t.tolist())) > 200 and len(set(level.tolist())) > 200
    assert abs(float(torch.corrcoef(torch.stack([t, level]))[0, 1])) < 0.2
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))[:32]
    stage.losses((image[order], label[order], index[order]), "train")
    for whole, part in zip(calls[0], calls[1], strict=True):
        assert torch.equal(whole[order], part)


def test_the_loss_is_the_mean_over_what_the_diffusion_says(stages):
    stage = stages[0]
    image, label, index = batch_of(stage)
    streams = KeyedStreams(index, "cpu", stage.seed, "val")
    t = stage.diffusion.time_from_uniform(streams.rand())
    eps = streams.randn(image.shape[1:])
    output = stage.unet(stage.diffusion.diffuse(image, t, eps), t, label)
    by_hand = (output[:, :1] - eps).square().flatten(1).mean(1)
    torch.testing.assert_close(stage.losses((image, label, index), "val")["simple"], by_hand)


def fit(tmp_path, steps, resume=None, **callbacks):
    stage = BaseStage(resolution=8, **{**SMALL, "dropout": 0.1}, lr=1e-2, warmup_steps=2, seed=5)
    if resume is None:
        torch.manual_seed(0)
        randomise_weights(stage).train().requires_grad_(True)
    image, label, _ = batch_of(stage, 8)
    batches = [(image, label, torch.arange(8 * i, 8 * i + 8)) for i in range(12)]
    ema = EMA(0.9)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last=True, save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, callbacks=[ema, saver], enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    raw = []
    original = stage.on_train_batch_end
    stage.on_train_batch_end = lambda *a: (
        raw.append([p.detach().clone() for p in stage.unet.parameters()]),
        original(*a),
    )
    trainer.fit(stage, DataLoader(batches, batch_size=None), ckpt_path=resume)
    return stage, raw


def test_ema_equals_its_recursion_and_is_what_a_checkpoint_gives(tmp_path):
    stage, raw = fit(tmp_path, 6)
    expected = raw[0]
    for n, weights in enumerate(raw[1:], 1):
        decay = min(0.9, (1 + n) / (10 + n))
        expected = [decay * e + (1 - decay) * w for e, w in zip(expected, weights, strict=True)]
    loaded = load_stage(tmp_path / "last.ckpt")
    for mine, e in zip(loaded.unet.parameters(), expected, strict=True):
        torch.testing.assert_close(mine, e, rtol=1e-5, atol=1e-7)
    assert max(float((a - b).abs().max()) for a, b in zip(expected, raw[-1], strict=True)) > 1e-4
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded.hparams == stage.hparams


def test_warm_up_and_decay_of_the_learning_rate(tmp_path):
    stage = BaseStage(resolution=8, **SMALL, lr=1.0, warmup_steps=4, decay_fraction=0.5)
    stage.trainer = type("T", (), {"estimated_stepping_batches": 20, "precision": "32-true"})()
    factor = stage.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas[0]
    values = [factor(step) for step in range(20)]
    assert values[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert values[9] == 1.0 and abs(values[15] - 0.5) < 1e-9 and 0 < values[19] < 0.11


@pytest.mark.parametrize(("precision", "fused"), [("32-true", True), ("bf16-mixed", True), ("16-mixed", False)])
def test_adam_is_fused_where_no_scaler_stands_between(precision, fused):
    stage = BaseStage(resolution=8, **SMALL)
    stage.trainer = type("T", (), {"estimated_stepping_batches": 20, "precision": precision})()
    assert stage.configure_optimizers()["optimizer"].defaults["fused"] is fused


@pytest.mark.parametrize("algorithm", [None, "norm", "value"])
def test_gradients_are_clipped_as_torch_does(algorithm):
    stage = BaseStage(resolution=8, **SMALL)
    for parameter in stage.unet.parameters():
        parameter.grad = torch.ones_like(parameter)
    count = sum(p.numel() for p in stage.unet.parameters())
    for limit in (None, 0.0, 0.25):
        stage.configure_gradient_clipping(None, limit, algorithm)
        expected = 1.0 if not limit else limit if algorithm == "value" else limit / count**0.5
        for parameter in stage.unet.parameters():
            torch.testing.assert_close(parameter.grad, torch.full_like(parameter, expected), rtol=1e-4, atol=0)


def test_a_stage_learns(tmp_path):
    stage = BaseStage(resolution=8, **{**SMALL, "channels": 16}, lr=3e-3)
    image, label, index = batch_of(stage, 32)
    image = label.view(-1, 1, 1, 1).float().expand_as(image) / 5 - 0.9  # the class decides the image
    optimizer = torch.optim.Adam(stage.parameters(), 3e-3)
    losses = []
    for step in range(80):
        loss = stage.losses((image, label, index + 32 * step), "train")["simple"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.35 * sum(losses[:10])


def test_what_is_not_a_checkpoint_of_a_stage_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"stage": Evil()}, tmp_path / "pickle.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    torch.save(
        {"stage": "BaseStage", "hyper_parameters": {"resolution": 8, **SMALL}, "state_dict": {}, "global_step": 1},
        tmp_path / "empty.ckpt",
    )
    (tmp_path / "torn.ckpt").write_bytes(b"PK\x03\x04 torn")
    for name, sentence in {
        "none.ckpt": "does not exist", "pickle.ckpt": "not a checkpoint that can be loaded safely",
        "foreign.ckpt": "not a checkpoint of a stage", "torn.ckpt": "is cut short",
        "empty.ckpt": "does not fit BaseStage",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=sentence):
            load_stage(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "build, sentence",
    [
        (lambda: SuperResolutionStage(resolution=16, low_resolution=8, **SMALL), "needs low_res_timesteps"),
        (
            lambda: SuperResolutionStage(resolution=24, low_resolution=8, augmentation="none", **SMALL),
            "resolution 8 cannot be reached from 24",
        ),
    ],
)
def test_a_stage_that_makes_no_sense_is_refused(build, sentence):
    with pytest.raises(InputError, match=sentence):
        build()


def test_images_of_another_size_are_refused(stages):
    with pytest.raises(InputError, match=r"images of shape \(1, 16, 16\) do not fit stage base8"):
        stages[0].losses(batch_of(stages[1]), "train")


@pytest.fixture
def compiled(monkeypatch):
    """Compiles by the compiler's front end alone, in one graph, and keeps the modes that were asked for."""
    modes = []

    def compile(network, mode):
        modes.append(mode)
        torch.nn.Module.compile(network, fullgraph=True, backend="eager")

    monkeypatch.setattr(UNet, "compile", compile)
    return modes


def test_a_compiled_training_is_the_plain_one_and_its_checkpoint_too(tmp_path, compiled):
    image, label, index = batch_of(BaseStage(resolution=8, **SMALL), 8)
    states = []
    for mode in (None, "default"):
        torch.manual_seed(0)
        stage = BaseStage(resolution=8, **SMALL, lr=1e-2, compile=mode)
        trainer = L.Trainer(
            max_steps=3, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
            callbacks=[EMA(0.5)], default_root_dir=tmp_path, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(stage, DataLoader([(image, label, index)] * 3, batch_size=None))
        trainer.save_checkpoint(tmp_path / f"{mode}.ckpt")
        states.append(load_stage(tmp_path / f"{mode}.ckpt").state_dict())
    assert compiled == ["default"] and states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5)


def test_a_resumed_training_fuses_as_it_is_told_not_as_the_checkpoint_was(tmp_path):
    stage = BaseStage(resolution=8, **SMALL)
    for precision, fused in (("32-true", True), ("16-mixed", False)):
        stage.trainer = type("T", (), {"precision": precision})()
        group = {"lr": 1.0, "fused": None}
        hparams = {"stage": "BaseStage", "hyper_parameters": dict(stage.hparams)}
        stage.on_load_checkpoint({**hparams, "optimizer_states": [{"state": {}, "param_groups": [group]}]})
        assert group["fused"] is fused
