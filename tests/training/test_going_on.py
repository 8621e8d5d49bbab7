"""What may change when a training goes on is in force from the next step, and the rest is refused by name."""

import csv
import inspect
import re
from types import SimpleNamespace

import pytest
import torch
from commands import ROOT, fit_command
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from refusals import sentence_of_error, sentence_of_refusal
from small_models import SMALLEST

from cdm_lightning.__main__ import main
from cdm_lightning.data import ShardDataModule
from cdm_lightning.evaluation import StageDistance
from cdm_lightning.stages import DiffusionStage, SuperResolutionStage
from cdm_lightning.stages.diffusion_stage import RESUMABLE_CHANGES, check_same_stage
from cdm_lightning.training import EMA, Checkpoint, FiniteSteps, SampleGrid
from cdm_lightning.training.checkpoint_files import Trainer
from cdm_lightning.training.fit_checks import finished

pytestmark = pytest.mark.filterwarnings("ignore")

SECTION = "## Going on with other options"
FIXED = {"save_last", "enable_version_counter"}  # arguments of ModelCheckpoint that Checkpoint sets itself
CLASSES = {
    "model": [DiffusionStage, SuperResolutionStage],
    "data": [ShardDataModule],
    "ema": [EMA],
    "finite_steps": [FiniteSteps],
    "checkpoint": [Checkpoint, ModelCheckpoint],
    "sample_grid": [SampleGrid],
    "StageDistance": [StageDistance],
}
TRAINER = {  # options of the trainer that a run in the same folder may want to change
    *("max_steps", "max_epochs", "max_time", "precision", "devices", "num_nodes", "strategy", "accelerator"),
    *("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "log_every_n_steps", "logger"),
    *("val_check_interval", "check_val_every_n_epoch", "limit_train_batches", "limit_val_batches", "callbacks"),
}  # fmt: skip
BEFORE = {  # option -> (first value, value of the second start), for one small training
    "model.sampler": ("ddpm", "ddim"), "model.sampling_steps": (2, 5), "model.sampling_schedule": (None, "cosine"),
    "model.lr": (1e-3, 1e-5), "model.warmup_steps": (0, 1), "model.decay_fraction": (0.0, 1.0),
    "model.seed": (3, 4), "model.dropout": (0.0, 0.1), "model.max_level": (None, 10), "model.min_level": (0, 2),
    "model.blur_sigma": ([0.4, 0.6], [0.1, 0.2]), "model.blur_probability": (0.5, 0.6),
    "model.checkpointing": (False, True),
    "data.batch_size": (8, 16), "data.num_workers": (0, 1), "data.flip": (False, True), "data.window": (4, 2),
    "data.seed": (0, 1), "data.on_damage": ("refuse", "skip"),
    "ema.decay": (0.05, 0.01), "finite_steps.max_skipped": (10, 2),
    "checkpoint.every_n_train_steps": (2, 3), "checkpoint.filename": (None, "{step}"),
    "sample_grid.rows": (1, 2), "sample_grid.columns": (1, 2), "sample_grid.sampling_steps": (2, 5),
    "trainer.max_steps": (4, 6), "trainer.precision": ("32-true", "bf16-mixed"),
    "trainer.accumulate_grad_batches": (1, 2), "trainer.gradient_clip_val": (1.0, 1e-6),
    "trainer.log_every_n_steps": (2, 1), "trainer.limit_val_batches": (1, 2), "trainer.val_check_interval": (2, 4),
}  # fmt: skip
IN_USE = {  # how the running training shows the value that it uses, where the name of an attribute does not say it
    "model.lr": lambda run: run.rates[4] / (1.0 - 4 / 6),  # of a rate that falls from the first to the last step
    "model.warmup_steps": lambda run: run.model.warmup_steps,
    "model.sampler": lambda run: run.model.diffusion.sampler,
    "model.sampling_steps": lambda run: run.model.diffusion.sampling_steps,
    "model.sampling_schedule": lambda run: run.model.hparams["sampling_schedule"],
    "model.dropout": lambda run: max(m.p for m in run.model.modules() if isinstance(m, torch.nn.Dropout)),
    "model.max_level": lambda run: run.model.augmentation.max_level,
    "model.min_level": lambda run: run.model.augmentation.min_level,
    "model.blur_sigma": lambda run: run.model.hparams["blur_sigma"],
    "model.blur_probability": lambda run: run.model.hparams["blur_probability"],
    "model.checkpointing": lambda run: any(getattr(m, "checkpointing", False) for m in run.model.modules()),
    "data.batch_size": lambda run: (run.data.images_seen() - 4 * 8) // 2,
    "ema.decay": lambda run: run.ema.decay_after(int(run.ema._average_model.n_averaged)),
    "checkpoint.filename": lambda run: "{step}" if run.files == ["last.ckpt", "step=6.ckpt"] else run.files,
    "checkpoint.every_n_train_steps": lambda run: run.checkpoint._every_n_train_steps,
    "trainer.log_every_n_steps": lambda run: run.logged[-1] - run.logged[-2],
    "trainer.precision": lambda run: run.trainer.precision_plugin.precision,
}


def table():
    """option -> what the page says of it when a training goes on."""
    text = (ROOT / "docs/imagenet.md").read_text().partition(SECTION)[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    return {option: effect.strip() for cell, effect in rows for option in re.findall(r"`([\w.]+)`", cell)}


def options_of_the_code():
    found = {f"trainer.{name}" for name in TRAINER}
    for group, kinds in CLASSES.items():
        names = {name for kind in kinds for name in inspect.signature(kind.__init__).parameters}
        found |= {
            f"{group}.{name}" for name in names - {"self", "kwargs"} - (FIXED if group == "checkpoint" else set())
        }
    return found


def test_the_table_names_every_option_once_and_says_in_force_or_refused():
    assert set(table()) == options_of_the_code()
    assert all(effect.startswith(("in force", "refused")) for effect in table().values())


def start(folder, root, number, resume=None):
    """One start of a small training, with the first or the second values of BEFORE."""
    groups = {}
    for option, values in BEFORE.items():
        group, _, name = option.partition(".")
        groups.setdefault(group, {})[name] = values[number]
    model = {**SMALLEST, "timesteps": 50, "variance": "fixed_small", "continuous": True, "schedule": "linear"}
    stage = SuperResolutionStage(
        resolution=16, low_resolution=8, low_res_timesteps=20, low_res_schedule="cosine", **{**model, **groups["model"]}
    )
    kinds = {"ema": EMA, "finite_steps": FiniteSteps, "checkpoint": Checkpoint, "sample_grid": SampleGrid}
    callbacks = {name: kind(**groups[name]) for name, kind in kinds.items()}
    data = ShardDataModule(root, **groups["data"])
    trainer = Trainer(
        default_root_dir=folder, accelerator="cpu", devices=1, logger=CSVLogger(folder, name="logs"),
        enable_progress_bar=False, enable_model_summary=False, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        callbacks=list(callbacks.values()), **groups["trainer"],
    )  # fmt: skip
    trainer.fit(stage, data, ckpt_path=resume, weights_only=True)
    return SimpleNamespace(trainer=trainer, model=stage, data=data, **callbacks)


@pytest.fixture(scope="module")
def gone_on(few_real, tmp_path_factory):
    """A run of four steps that went on for two more with other values of all options that may change."""
    folder = tmp_path_factory.mktemp("run")
    start(folder, few_real, 0)
    run = start(folder, few_real, 1, folder / "checkpoints/last.ckpt")
    rows = {}
    for version in (0, 1):
        with (folder / f"logs/version_{version}/metrics.csv").open() as lines:
            rows |= {int(row["step"]): float(row["train/lr"]) for row in csv.DictReader(lines) if row["train/lr"]}
    run.rates, run.logged = rows, sorted(rows)
    run.files = sorted(file.name for file in (folder / "checkpoints").iterdir())
    run.folder = folder
    return run


@pytest.mark.parametrize("option", BEFORE)
def test_what_may_change_is_in_force_from_the_next_step(gone_on, option):
    group, _, name = option.partition(".")
    in_use = IN_USE[option](gone_on) if option in IN_USE else getattr(getattr(gone_on, group), name)
    before, now = BEFORE[option]
    assert in_use == pytest.approx(now) != before and table()[option].startswith("in force")


def test_rate_warm_up_and_decay_are_those_of_the_new_configuration(gone_on):
    """Logged as they were in force at each step: lr 1e-3 before, then 1e-5 that falls from step 0 to 6."""
    rates = {1: 1e-3, 3: 1e-3, 4: 1e-5 * (1 - 4 / 6), 5: 1e-5 * (1 - 5 / 6)}
    assert gone_on.rates == pytest.approx(rates)
    saved = torch.load(gone_on.folder / "checkpoints/last.ckpt", weights_only=True)
    assert saved["lr_schedulers"][0]["base_lrs"] == [1e-5] == [saved["hyper_parameters"]["lr"]]


def test_whatever_else_a_stage_takes_is_refused_by_name(gone_on):
    arguments = dict(gone_on.model.hparams)
    checkpoint = {"stage": "SuperResolutionStage", "hyper_parameters": arguments}
    for option, effect in table().items():
        group, _, name = option.partition(".")
        if group != "model":
            continue
        changed = {**arguments, name: "another"}
        if effect.startswith("refused"):
            call = lambda: check_same_stage("SuperResolutionStage", "sr16", changed, checkpoint)  # noqa: B023, E731
            sentence_of_error(call, f"its {name} is {arguments[name]!r}, and the configuration says 'another'")
        else:
            assert name in RESUMABLE_CHANGES
            check_same_stage("SuperResolutionStage", "sr16", changed, checkpoint)


def test_averages_are_not_dropped_unasked(gone_on):
    """Without the callback, Lightning would train the averages on, with Adam's state of the raw weights."""
    trainer = Trainer(accelerator="cpu", logger=False, max_steps=9, enable_model_summary=False, devices=1)
    path = gone_on.folder / "checkpoints/last.ckpt"
    sentence = "holds averaged weights, and the configuration has no EMA"
    sentence_of_error(lambda: finished(trainer, gone_on.model, path), sentence)


OPTIONS = ["--trainer.limit_val_batches=0", "--trainer.callbacks=cdm_lightning.training.Checkpoint"]


def options(folder, steps, *more):
    wanted = [word for word in fit_command() if "max_steps" not in word]
    return [*wanted, *OPTIONS, f"--trainer.default_root_dir={folder}", f"--trainer.max_steps={steps}", *more]


def test_a_finished_run_says_so_and_does_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    main(options(tmp_path, 2))
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    capsys.readouterr()
    main(options(tmp_path, 2))
    said = capsys.readouterr()
    way = "a higher --trainer.max_steps trains on, and another --trainer.default_root_dir begins anew"
    assert said.out == f"base8: finished at step 2, nothing is left to train: {way}\n"
    for more, steps, sentence in [
        (["--model.lr=0.5"], 2, f"the training is finished at step 2, and model.lr 0.5 has no effect: {way}"),
        ([], 1, f"max_steps 1 is below step 2 of {tmp_path}/checkpoints/last.ckpt"),
        ([f"--ckpt_path={tmp_path}/checkpoints/last.ckpt"], 1, "max_steps 1 is below step 2 of "),
        (["--model.channels=16"], 9, "its channels is 8, and the configuration says 16"),
    ]:
        assert sentence in sentence_of_refusal(capsys, options(tmp_path, steps, *more))
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == files
