"""StageDistance: the figures of `cdm sample` and `cdm evaluate` while a stage trains, and a best checkpoint by them."""

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from evaluations import CNN, CPU
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from refusals import sentence_of_error
from small_models import smallest_stages
from small_training import smallest_stage

from cdm_lightning.cascade import CascadeModule
from cdm_lightning.cascade.bundle import write_bundle
from cdm_lightning.data import ShardDataModule
from cdm_lightning.evaluation import StageDistance, stage_distance
from cdm_lightning.evaluation.cas.classifier import Classifier
from cdm_lightning.evaluation.detectors import load_detector
from cdm_lightning.evaluation.evaluate import evaluate
from cdm_lightning.evaluation.metrics.distance import Moments, frechet_distance
from cdm_lightning.evaluation.real_images import read_images
from cdm_lightning.evaluation.references.cards import read_card
from cdm_lightning.evaluation.references.reference import reference
from cdm_lightning.foundation.images import to_float, to_uint8
from cdm_lightning.foundation.randomness import KeyedStreams
from cdm_lightning.sampling.sample import sample
from cdm_lightning.stages.loading import load_stage
from cdm_lightning.training import EMA, Checkpoint, LossCurve
from cdm_lightning.training.checkpoint_files import Trainer
from cdm_lightning.training.progress import RunSummary

pytestmark = pytest.mark.filterwarnings("ignore")
FD = f"val/fd_{CNN}"
FEW = {"n": 21, "sampling_steps": 3, "batch_size": 8}
TWO = {"strategy": "ddp_spawn" if torch.cuda.is_available() else "ddp_fork", "devices": 2}


@pytest.fixture(scope="module")
def toy(few_real, tmp_path_factory):
    """Cards at 8x8 and 16x16, a stage for each, and a bundle of both."""
    root = tmp_path_factory.mktemp("toy")
    cards = [root / f"{size}.safetensors" for size in (8, 16)]
    for card, size in zip(cards, (8, 16), strict=True):
        reference(few_real, card, size, "val", CNN, **CPU)
    base, upsampler = smallest_stages(sampling_steps=5, seed=3)
    write_bundle(root / "bundle", [base, upsampler], {})
    return SimpleNamespace(root=root, real=few_real, cards=cards, base=base, upsampler=upsampler)


def trainer_of(folder, *callbacks, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
    return Trainer(
        default_root_dir=folder, callbacks=list(callbacks), use_distributed_sampler=False, num_sanity_val_steps=0,
        limit_val_batches=1, check_val_every_n_epoch=None, val_check_interval=2, **{**quiet, **options},
    )  # fmt: skip


def data_of(toy):
    return ShardDataModule(toy.real, batch_size=8, num_workers=0)


def fit(toy, folder, steps, distance, resume=None, name="best", kept=1):
    """Train the smallest base stage, with a validation every other step and a checkpoint after every third."""
    best = ModelCheckpoint(folder / "checkpoints", name, FD, save_top_k=kept, enable_version_counter=False)
    callbacks = EMA(0.9), distance, Checkpoint(every_n_train_steps=3), best, LossCurve(), RunSummary()
    trainer = trainer_of(folder, *callbacks, max_steps=steps, logger=CSVLogger(folder, name="logs"))
    stage = smallest_stage(lr=0.3)
    trainer.fit(stage, data_of(toy), ckpt_path=resume, weights_only=True)
    assert (stage.diffusion.sampler, stage.diffusion.sampling_steps) == ("ddpm", 4)
    return best


def logged(folder):
    """Optimizer steps and their distances, from the logs of all starts."""
    found = {}
    for file in sorted(folder.glob("logs/version_*/metrics.csv")):
        with file.open() as lines:
            found |= {int(row["step"]) + 1: float(row[FD]) for row in csv.DictReader(lines) if row.get(FD)}
    return found


def stored_figure(out, bundle, card, **options):
    """The Fréchet distance that `cdm evaluate` gives of stored samples."""
    sample(bundle, out / "samples", count=FEW["n"], block_size=7, seed=3, sampler="dpm++", **options, **CPU)
    figures = evaluate([out / "samples"], [card], out / "figures", **CPU)["figures"]
    return next(figure["value"] for figure in figures if figure["key"] == "fd")


def test_a_training_logs_the_distance_of_its_averages_and_keeps_the_best(toy, tmp_path, capsys):
    best = fit(toy, tmp_path, 10, StageDistance(toy.cards[0], **FEW))
    found, stage = logged(tmp_path), load_stage(tmp_path / "checkpoints/best.ckpt")
    least = min(found, key=found.get)
    assert list(found) == [2, 4, 6, 8, 10] and stage.trained["steps"] == least != 10  # the steps are far too large
    assert float(best.best_model_score) == pytest.approx(found[least])
    assert load_stage(tmp_path / "checkpoints/last.ckpt").trained["steps"] == 10
    assert f"{tmp_path} holds checkpoints/last.ckpt, checkpoints/best.ckpt, loss.png" in capsys.readouterr().out
    write_bundle(tmp_path / "bundle", [stage], {})  # of the checkpoint's averaged weights
    expected = stored_figure(tmp_path, tmp_path / "bundle", toy.cards[0], sampling_steps=[3])
    assert found[least] == pytest.approx(expected, rel=1e-4)


def real_figure(toy, level):
    """The distance on real input, image by image: the first training images of each class."""
    low_res, classes = (torch.cat(part) for part in zip(*read_images(toy.real, "train", 8, 60), strict=True))
    stage, detector, features = toy.upsampler, load_detector(CNN), []
    stage.diffusion.sampler, stage.diffusion.sampling_steps = "dpm++", 3
    for i in range(FEW["n"]):
        z, g = low_res[classes == i % 10][i // 10, None], KeyedStreams([i], "cpu", 3, "sample", 1)
        image = stage.sample(torch.tensor([i % 10]), stage.augment(to_float(z), level, g), level, 0, g)
        features.append(detector(to_uint8(image)))
    stage.diffusion.sampler, stage.diffusion.sampling_steps = "ddpm", 5
    return frechet_distance(read_card(toy.cards[1]).moments, Moments.from_features(features))


@pytest.mark.parametrize("options", [{}, TWO])
def test_super_resolution_is_measured_on_real_and_generated_input(toy, tmp_path, options):
    callback = StageDistance(toy.cards[1], bundle=toy.root / "bundle", level=5, **FEW)
    trainer = trainer_of(tmp_path, callback, **options)
    [found] = trainer.validate(toy.upsampler, data_of(toy), verbose=False)
    expected = stored_figure(tmp_path, toy.root / "bundle", toy.cards[1], sampling_steps=[3, 3], levels=[5])
    assert found[f"{FD}_generated"] == pytest.approx(expected, rel=1e-4)
    assert found[f"{FD}_real"] == pytest.approx(real_figure(toy, 5), rel=1e-4) != pytest.approx(expected, rel=1e-3)
    assert {name for name in found if name.startswith(FD)} == {f"{FD}_real", f"{FD}_generated"}
    assert toy.upsampler.diffusion.sampler == "ddpm" and toy.upsampler.diffusion.sampling_steps == 5


def test_the_generated_input_is_drawn_once_and_without_a_bundle_there_is_none(toy, tmp_path, monkeypatch):
    callback = StageDistance(toy.cards[1], bundle=toy.root / "bundle", **FEW)
    trainer, draws, draw = trainer_of(tmp_path, callback), [], CascadeModule.sample
    monkeypatch.setattr(CascadeModule, "sample", lambda *args: draws.append(0) or draw(*args))
    callback.setup(trainer_with(trainer, toy), toy.upsampler, "fit")
    for _ in range(3):
        callback.draw_low_res(toy.upsampler)
    assert len(draws) == 3 and callback.lower is None  # 21 images in batches of 8
    assert callback.inputs[f"{FD}_generated"].dtype == torch.uint8
    alone = StageDistance(toy.cards[1], **FEW)
    alone.setup(trainer, toy.upsampler, "fit")
    assert list(alone.inputs) == [f"{FD}_real"]


def trainer_with(trainer, toy, stage=None):
    """The trainer as callbacks find it in setup."""
    trainer.datamodule, trainer.strategy._lightning_module = data_of(toy), stage or toy.upsampler
    trainer.datamodule.trainer = trainer
    return trainer


def test_no_checkpoint_is_chosen_by_an_old_distance_and_a_resumed_run_keeps_count(toy, tmp_path, monkeypatch):
    """Measured after steps 2, 6 and 10; the run ends once before an unmeasured validation."""
    values = iter([5.0, 3.0, 4.0])
    monkeypatch.setattr(stage_distance, "FrechetDistanceTo", lambda moments: lambda generated: next(values))
    monkeypatch.setattr(StageDistance, "features", lambda *_: torch.zeros(2, 2))
    two = {"name": "{step}", "kept": 2}
    fit(toy, tmp_path, 3, StageDistance(toy.cards[0], every_n_validations=2), **two)
    last = tmp_path / "checkpoints/last.ckpt"
    best = fit(toy, tmp_path, 10, StageDistance(toy.cards[0], every_n_validations=2), last, **two)
    assert logged(tmp_path) == {2: 5.0, 6: 3.0, 10: 4.0}
    assert float(best.best_model_score) == 3.0 and load_stage(best.best_model_path).trained["steps"] == 6
    assert {Path(file).name for file in best.best_k_models} == {"step=6.ckpt", "step=10.ckpt"}


def test_a_run_goes_on_from_its_best_checkpoint_in_the_same_bits(toy, tmp_path):
    """It is saved at the end of a validation, and may be the newest that a killed run leaves."""
    fit(toy, tmp_path / "whole", 6, StageDistance(toy.cards[0], **FEW))
    fit(toy, tmp_path / "parts", 2, StageDistance(toy.cards[0], **FEW))
    (tmp_path / "parts/checkpoints/last.ckpt").unlink()
    newest = tmp_path / "parts/checkpoints/best.ckpt"
    fit(toy, tmp_path / "parts", 6, StageDistance(toy.cards[0], **FEW), resume=newest)
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts") and len(logged(tmp_path / "parts")) == 3
    whole, parts = (torch.load(tmp_path / name / "checkpoints/last.ckpt") for name in ("whole", "parts"))
    for state in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, parts[state][name]) for name, value in whole[state].items())


def test_what_does_not_fit_is_one_sentence_before_the_training(toy, tmp_path):
    write_bundle(tmp_path / "other", smallest_stages(timesteps=30)[:1], {})
    write_bundle(tmp_path / "named", smallest_stages(), {"classes": list("abcdefghij")})
    base, upsampler = (toy.cards[0], toy.base), (toy.cards[1], toy.upsampler)
    for (card, stage), options, *parts in [
        ((toy.cards[1], toy.base), {}, "16.safetensors is of images with resolution 16", "resolution 8"),
        (base, {"bundle": toy.root / "bundle"}, f"bundle {toy.root}/bundle and level 0 are not for base8"),
        (base, {"level": 4}, "bundle None and level 4 are not for base8, a base stage"),
        (base, {"n": 5}, "the samples hold 5 of the 10 classes"),
        (base, {"n": 1}, "n 1 is too small"),
        (upsampler, {"level": 21}, "level 21 of stage sr16 lies outside 0 <= s <= 19"),
        (upsampler, {"n": 300}, "n = 300 asks for 30 real images of class"),
        (upsampler, {"bundle": tmp_path / "other"}, f"bundle {tmp_path}/other does not fit: the clocks disagree"),
        (upsampler, {"bundle": tmp_path / "named"}, "calls class 0 'T-shirt', and bundle", "named 'a'"),
        (base, {"sampling_steps": 0}, "sampling_steps 0 of StageDistance is less than 1"),
        (
            (toy.cards[0], Classifier(8, 1, 10, "resnet8")),
            {},
            "measures a stage that trains with ShardDataModule, not Cl",
        ),
    ]:
        trainer = trainer_of(tmp_path, max_steps=1)

        def call():
            trainer.callbacks.append(StageDistance(card, **{**FEW, **options}))  # noqa: B023, called at once
            trainer.fit(stage, data_of(toy))  # noqa: B023

        sentence_of_error(call, *parts)
        assert trainer.global_step == 0
