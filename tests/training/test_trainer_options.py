"""Every option of Lightning's trainer is honoured or refused; a new one of a later version has to be looked at."""

import inspect
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
from commands import ROOT, fit_command
from dealt_images import Recorder, flat, record_run
from folders import make_folder
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy
from refusals import sentence_of_error, sentence_of_refusal
from small_models import SMALLEST, smallest_stages

from cdm_lightning.cascade.bundle import read_bundle, write_bundle
from cdm_lightning.data import ShardDataModule
from cdm_lightning.stages import SuperResolutionStage
from cdm_lightning.training.fit_checks import check_callbacks, check_options, check_together
from cdm_lightning.training.pictures import LossCurve, SampleGrid

pytestmark = pytest.mark.filterwarnings("ignore")

REFUSED = {  # values that check_options refuses
    "overfit_batches": [2, 0.1],
    "limit_train_batches": [0],
    "max_steps": [0],
    "max_epochs": [0],
    "accumulate_grad_batches": [0, -1],
    "val_check_interval": [0],
    "gradient_clip_val": [-1.0],
    "log_every_n_steps": [-1],
    "barebones": [True],
    "model_registry": ["a/b/c"],
}
SAME_IMAGES = [  # 7 steps of 12 images, each with options that must not change which images are seen, or how often
    {"limit_train_batches": 3},
    {"limit_train_batches": 0.5},
    {"limit_train_batches": 2, "reload_dataloaders_every_n_epochs": 1},
    {"use_distributed_sampler": False},
    {"num_sanity_val_steps": 2},
    {"accumulate_grad_batches": 3},
    {"limit_train_batches": 4, "check_val_every_n_epoch": 1, "val_check_interval": 0.5},
    {"limit_train_batches": 2, "max_epochs": 3, "max_steps": -1, "images": 72},
    {"max_epochs": 1, "max_steps": -1, "images": 48},  # the whole batches of 53 images
    {"fast_dev_run": 2, "images": 24},
    {"max_time": {"milliseconds": 1}, "images": 12},
    {"max_time": {"milliseconds": 1}, "min_steps": 3, "min_epochs": 0, "images": 36},
    {"max_time": {"milliseconds": 1}, "min_epochs": 2, "limit_train_batches": 2, "images": 48},
    {"inference_mode": False, "deterministic": True, "benchmark": False, "detect_anomaly": True},
    {"sync_batchnorm": True, "enable_autolog_hparams": False, "limit_val_batches": 0},
    {"val_check_interval": "00:00:01:00"},
    {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
]  # fmt: skip
ELSEWHERE = {  # honoured by Lightning or the command line: which test shows it, or why there is nothing to show
    "accelerator": "test_resume, test_two_processes",
    "strategy": "test_resume, test_two_processes; a strategy without its device is Lightning's own sentence",
    "devices": "test_resume, test_two_processes",
    "num_nodes": "test_two_processes",
    "precision": "below",
    "logger": "test_progress, test_run_folder",
    "callbacks": "below, test_lightning_cli",
    "enable_checkpointing": "false beside a callback that saves is Lightning's own sentence",
    "enable_progress_bar": "test_progress",
    "enable_model_summary": "off by default, Lightning's table where it is asked for",
    "limit_test_batches": "test_cli",
    "limit_predict_batches": "of Lightning's own loop of predictions",
    "profiler": "of Lightning's own hooks",
    "plugins": "a CheckpointIO: test_full_disk",
    "default_root_dir": "test_run_folder",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    make_folder(root / "train/8", [30, 23])
    make_folder(root / "val/8", [9])
    return root


def test_every_option_of_the_trainer_is_accounted_for():
    tried = {name for options in SAME_IMAGES for name in options} - {"images"}
    assert {*REFUSED, *tried, *ELSEWHERE} == set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in REFUSED.items() for value in values])
def test_an_option_that_cannot_be_honoured_is_refused_by_name(name, value):
    sentence_of_error(lambda: check_options({name: value}), f"trainer.{name} {value} is refused: ")


def test_what_the_recipes_say_is_not_refused():
    check_options(
        {"overfit_batches": 0.0, "max_steps": -1, "max_epochs": -1, "limit_train_batches": 1.0, "barebones": False}
    )


@pytest.mark.parametrize("options", SAME_IMAGES, ids=str)
def test_an_option_does_what_it_says_on_the_same_images(root, tmp_path, options):
    """Every image once, in the order of the run; the validation before, between or after changes nothing in that."""
    options = dict(options)
    images = options.pop("images", 84)
    module = record_run(root, tmp_path, **{"num_sanity_val_steps": 0, **options})
    assert flat(module.seen) == list(range(images))
    assert module.trainer.global_step == images // 12


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"limit_train_batches": 3, "accumulate_grad_batches": 2}, "makes passes of 3 batches"),
        ({"check_val_every_n_epoch": 1, "val_check_interval": 9}, "val_check_interval 9 exceeds the 7 batches"),
        ({"accumulate_grad_batches": 5}, "batch_size 12 cannot be shared by 1 processes with 5"),
    ],
)  # fmt: skip
def test_a_pass_that_ends_amid_a_step_or_before_its_validation_is_refused(root, options, sentence):
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, max_steps=7, **options)
    sentence_of_error(
        lambda: ShardDataModule(root, 12, 0).check_before_start(trainer, Recorder(), None, "fit"), sentence
    )


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "16-true"])
def test_a_precision_that_no_stage_trains_in_is_refused(precision):
    trainer = L.Trainer(accelerator="cpu", logger=False, precision="32-true")
    check_together(trainer, Recorder())
    fake = SimpleNamespace(precision=precision, accumulate_grad_batches=1, accelerator=None, strategy=None)
    sentence_of_error(lambda: check_together(fake, Recorder()), f"precision {precision}")


def test_a_strategy_that_shards_is_refused():
    trainer = SimpleNamespace(precision="32-true", accumulate_grad_batches=1, accelerator=None, strategy=FSDPStrategy())
    sentence_of_error(lambda: check_together(trainer, Recorder()), "FSDPStrategy shards the gradients")


@pytest.mark.parametrize("options, value", [({"max_level": 1000}, "max_level 1000"), ({"min_level": 3}, "min_level 3")])
def test_a_range_of_levels_without_levels_is_refused_in_training_and_read_in_a_bundle(tmp_path, options, value):
    trainer = L.Trainer(accelerator="cpu", logger=False)
    base, blurred = smallest_stages(["blur"])
    about = {"resolution": 16, "low_resolution": 8, **SMALLEST}
    check_together(trainer, blurred)
    for kind in ("blur", "none"):
        stage = SuperResolutionStage(augmentation=kind, **options, **about)
        sentence_of_error(
            lambda s=stage: check_together(trainer, s), f"{value} has no effect: augmentation {kind} has no level"
        )
        write_bundle(tmp_path / kind, [base, stage], {})
        assert read_bundle(tmp_path / kind)[0][1].name == "sr16"
    clock = {"low_res_timesteps": 4000, "low_res_schedule": "cosine"}
    check_together(trainer, SuperResolutionStage(**clock, **options, **about))


class Twice(Callback):
    """A callback of somebody else's."""


def test_a_callback_of_the_project_acts_once():
    check_callbacks([Twice(), Twice(), SampleGrid(), LossCurve()])
    sentence_of_error(lambda: check_callbacks([SampleGrid(), LossCurve(), SampleGrid()]), "lists SampleGrid twice")


def test_the_command_line_asks(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = f"--trainer.default_root_dir={tmp_path / 'run'}"
    for option, sentence in [
        ("--trainer.overfit_batches=2", "trainer.overfit_batches 2 is refused: the images are one endless sequence"),
        ("--trainer.num_nodes=0", "`num_nodes` must be a positive integer"),
    ]:
        assert sentence in sentence_of_refusal(capsys, [*fit_command(), folder, option])
    assert not (tmp_path / "run").exists()
