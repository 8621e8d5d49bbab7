"""`cdm fit`, `cdm validate`, `cdm test` and `cdm predict`: Lightning's command line for stages and cascades."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from inspect import signature
from netrc import NetrcParseError, netrc
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from urllib.parse import urlparse

import lightning.pytorch as L
import torch
import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_warn
from omegaconf.errors import OmegaConfBaseException

from cdm_lightning.data import ShardDataModule
from cdm_lightning.data.shards import find_folder, read_manifest, shards_root
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import write_atomically
from cdm_lightning.foundation.parser import Parser, nearest
from cdm_lightning.stages import DiffusionStage, SuperResolutionStage
from cdm_lightning.stages.checkpoints import check_checkpoint, newest_checkpoint
from cdm_lightning.training.averaging import EMA
from cdm_lightning.training.checkpoint_files import AtomicCheckpointIO, Trainer
from cdm_lightning.training.finite_steps import FiniteSteps
from cdm_lightning.training.fit_checks import (
    check_callbacks,
    check_data_and_callbacks,
    check_folder,
    check_options,
    check_together,
    finished,
)
from cdm_lightning.training.pictures import SampleGrid
from cdm_lightning.training.progress import Progress, RunSummary, model_name, print_once
from cdm_lightning.training.resume import Checkpoint, run_id

MOVED_CLASSES = {  # class paths of version 0.1 -> today's
    "callbacks.EMA": "training.EMA",
    "callbacks.LossCurve": "training.LossCurve",
    "callbacks.SampleGrid": "training.SampleGrid",
    "faults.FiniteSteps": "training.FiniteSteps",
    "resume.Checkpoint": "training.Checkpoint",
    "datamodule.ShardDataModule": "data.ShardDataModule",
    "classifier.Classifier": "evaluation.cas.classifier.Classifier",
    "checkpoints.WholeCheckpoints": "training.checkpoint_files.AtomicCheckpointIO",
    "checkpoints.Trainer": "training.checkpoint_files.Trainer",
    "meter.TrainingLog": "stages.training_log.TrainingLog",
    "damage.Damage": "data.damaged_images.Damage",
    "diffusion_stage.DiffusionStage": "stages.DiffusionStage",
}


def refuse_old_class_paths(arguments: Iterable[str]) -> None:
    """Raise InputError for a class path of version 0.1 in the arguments or the files they name; it names the new path.

    Comments in a file are not searched.
    """
    for argument in arguments:
        where, text = "", argument
        path = Path(argument.rpartition("=")[2])
        with suppress(OSError, ValueError):  # no file, or no text: the parser reports these errors
            if path.is_file():
                where, text = f"{path}: ", re.sub(r"(^|\s)#.*", "", path.read_text())
        for old, new in MOVED_CLASSES.items():
            if re.search(rf"\bcdm_lightning\.{re.escape(old)}\b", text):
                raise InputError(f"{where}cdm_lightning.{old} is cdm_lightning.{new} now")


class LightningParser(Parser, LightningArgumentParser):
    """The parser of Lightning's commands."""

    example = "fit --config experiments/defaults.yaml --config experiments/fashion/defaults.yaml " + (
        "--config experiments/fashion/base8.yaml"
    )

    def names(self) -> list[str]:
        """Those of the parser, and the arguments of a stage."""
        stage = {**signature(DiffusionStage).parameters, **signature(SuperResolutionStage).parameters}
        return [*super().names(), *(f"model.{name}" for name in stage if "--model" in self._option_string_actions)]

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """Read a configuration. A seed of model or data is refused: Lightning would drop it for seed_everything."""
        settings = super().parse_path(path, *args, **kwargs)
        for key in ("model.seed", "model.init_args.seed", "data.seed"):
            if key in settings:
                name = key.partition(".")[0]
                raise InputError(f"{path}: {name}.seed has no effect: give seed_everything for model and data")
        return settings

    def add_argument(self, *names: Any, **options: Any) -> Any:
        """Add an argument. The seed is a number: every draw is keyed by it."""
        if names[0] == "--seed_everything":
            options["type"] = int
        return super().add_argument(*names, **options)


def check_values(settings: Any) -> None:
    """Refuse a seed, a strategy, an accelerator or a profiler that Lightning does not know."""
    if not 0 <= settings.seed_everything < 2**32:
        raise InputError(f"--seed_everything {settings.seed_everything} lies outside 0 ... {2**32 - 1}")
    known = {
        "strategy": ["auto", *StrategyRegistry.available_strategies()],
        "accelerator": ["auto", "gpu", *AcceleratorRegistry.available_accelerators()],
        "profiler": ["simple", "advanced", "pytorch", "xla"],
    }
    for name, words in known.items():
        if isinstance(given := settings.trainer.get(name), str) and given not in words:
            close = nearest(given, words)
            known_words = f"the nearest is --trainer.{name} {close}" if close else f"known are {', '.join(words)}"
            raise InputError(f"Lightning knows no {name} {given!r}: {known_words}")


def take_from_data(config: Any) -> None:
    """Put the channels and the number of classes of the shards where a stage's configuration says "data".

    Shards that cannot be read are left to the data module, which refuses them.
    """
    stage = config.model.get("init_args") or {}
    asked = [name for name in ("image_channels", "num_classes") if stage.get(name) == "data"]
    if not asked or config.data.root is None:
        return
    with suppress(InputError):
        manifest = read_manifest(find_folder(shards_root(config.data.root), "train", stage["resolution"]))
        known = {"image_channels": manifest.channels, "num_classes": len(manifest.classes)}
        for name in asked:
            stage[name] = known[name]


SHIPPED = {  # the name on the command line of each callback of the room
    "ema": EMA,
    "finite_steps": FiniteSteps,
    "checkpoint": Checkpoint,
    "sample_grid": SampleGrid,
}


def add_callback_options(parser: LightningArgumentParser) -> None:
    """Options such as --ema.decay, each for one argument of a callback; null, the default, changes nothing."""
    for name, kind in SHIPPED.items():
        added = parser.add_class_arguments(kind, name, instantiate=False)
        parser.set_defaults(dict.fromkeys(added))


def merge_callback_options(config: Any) -> None:
    """Put the options of `add_callback_options` that are given into trainer.callbacks, and clear them.

    A callback that is not there is added.
    """
    listed = config.trainer.callbacks or []
    callbacks = config.trainer.callbacks = list(listed) if isinstance(listed, list) else [listed]
    for name, kind in SHIPPED.items():
        given = {argument: value for argument, value in config.pop(name).items() if value is not None}
        if not given:
            continue
        there = next((entry for entry in callbacks if resolve_name(entry.class_path) is kind), None)
        if there is None:
            callbacks.append(there := Namespace(class_path=f"{kind.__module__}.{kind.__qualname__}"))
        there.init_args = Namespace(**{**vars(there.get("init_args") or Namespace()), **given})


class SaveConfig(SaveConfigCallback):
    """Saves the configuration; where a logger or callback writes into the run's folder, that folder goes by its name.

    So a new run of the saved configuration writes into its own folder, and not into that of the old run.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        first = not self.already_saved
        super().setup(trainer, pl_module, stage)
        file = Path(trainer.log_dir or "") / self.config_filename  # in every process: log_dir is a broadcast
        if first and trainer.is_global_zero:
            head, _, text = file.read_text().partition("\n")  # a comment on Lightning's version
            config = yaml.safe_load(text)
            name_run_folder(config["trainer"], config["trainer"]["default_root_dir"])
            write_atomically(file, f"{head}\n{yaml.safe_dump(config, sort_keys=False)}".encode())


def name_run_folder(config: Any, folder: str) -> None:
    """Put ${trainer.default_root_dir} for `folder` in every save_dir and dirpath of a nested configuration."""
    if isinstance(config, list):
        for part in config:
            name_run_folder(part, folder)
    elif isinstance(config, dict):
        for key, value in config.items():
            if key in ("save_dir", "dirpath") and f"{value}/".startswith(f"{folder}/"):
                config[key] = "${trainer.default_root_dir}" + str(value).removeprefix(folder)
            else:
                name_run_folder(value, folder)


class CommandLine(LightningCLI):
    """Lightning's command line, with one seed for model and data, and checks of what the user asks for."""

    finished: str | None = None  # the sentence about a run of which nothing is left to train

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.seed")
        add_callback_options(parser)

    def after_instantiate_classes(self) -> None:
        """Raise InputError if the given ckpt_path is not a complete checkpoint."""
        given = self.config[self.subcommand]
        if given.ckpt_path == "best":
            raise InputError("ckpt_path best is known to no new run: give a checkpoint, or --ckpt_path last")
        if given.ckpt_path == "hpc" and not any(Path(self.trainer.default_root_dir).glob("hpc_ckpt_*.ckpt")):
            folder = self.trainer.default_root_dir
            raise InputError(f"ckpt_path hpc finds no hpc_ckpt_*.ckpt of SLURM in {folder}: give --ckpt_path last")
        if given.ckpt_path and given.ckpt_path not in ("last", "hpc"):
            if not Path(given.ckpt_path).is_file():
                raise InputError(f"ckpt_path {given.ckpt_path} is no file: give a checkpoint, or the word last")
            check_checkpoint(given.ckpt_path)

    def last_checkpoint(self) -> Path | None:
        """The checkpoint that `ckpt_path: last` stands for; None if the run has none."""
        savers = [saver for saver in self.trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
        root = Path(self.trainer.default_root_dir) / "checkpoints"
        return newest_checkpoint({root, *(Path(saver.dirpath) for saver in savers if saver.dirpath)})

    def before_instantiate_classes(self) -> None:
        check_options(self.config[self.subcommand].trainer)

    def before_fit(self) -> None:
        """Check all that can be known before a logger opens, resolve `ckpt_path: last`, and set the W&B run id."""
        trainer, root = self.trainer, Path(self.trainer.default_root_dir)
        check_together(trainer, self.model, str(self.config.fit.trainer.precision))
        check_data_and_callbacks(trainer, self.model, self.datamodule, "fit")
        check_folder(root)
        if self.config.fit.ckpt_path == "last":  # a trial run begins anew: it would find its few steps done
            self.config_init.fit.ckpt_path = None if self.config.fit.trainer.fast_dev_run else self.last_checkpoint()
        elif self.config.fit.ckpt_path is None and (older := self.last_checkpoint()):
            rank_zero_warn(
                f"ckpt_path is null, but {older} exists: `ckpt_path: last` will resume whichever run has more steps"
            )
        resumed = self.config_init.fit.ckpt_path
        if isinstance(self.model, DiffusionStage):
            self.model.check_source(resumed)
        self.finished = finished(trainer, self.model, Path(resumed)) if resumed else None
        for logger in trainer.loggers if not self.finished else []:
            if isinstance(logger, WandbLogger) and trainer.is_global_zero and "WANDB_RUN_ID" not in os.environ:
                logger._wandb_init["id"] = logger._wandb_init.get("id") or run_id(root)

    def fit(self, **options: Any) -> None:
        """Train; of a finished run, say so and open nothing."""
        if self.finished:
            print_once(self.trainer, f"{model_name(self.model)}: {self.finished}")
        else:
            self.trainer.fit(**options)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The trainer with RunSummary, Progress and AtomicCheckpointIO.

        A progress bar among the configured callbacks, or a CheckpointIO among the plugins, is used instead of ours.
        """
        if torch.cuda.is_available():  # TF32 for what is left in float32, as torch's convolutions have it by default
            torch.set_float32_matmul_precision("high")
        given = self.config_init[self.subcommand].trainer
        callbacks = given.callbacks if isinstance(given.callbacks, list) else [given.callbacks or ()]
        callbacks = [*filter(None, callbacks), RunSummary()]
        if given.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(Progress())
        check_callbacks(callbacks)
        if given.min_steps is not None and given.min_epochs is None:
            kwargs["min_epochs"] = 0  # Lightning would take 1, and a pass may be the whole training
        try:
            trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except (ValueError, ModuleNotFoundError) as error:  # Lightning's, about options of its own
            raise InputError(" ".join(str(error).split())) from error
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and not logger._wandb_init.get("anonymous"):
                logger._wandb_init.pop("anonymous", None)  # W&B warns about this option, whatever its value
        return trainer

    def before_validate(self) -> None:
        """Check the data, and resolve `ckpt_path: last`. Raises InputError if there is none.

        Lightning would open its loggers before it looks at the data, take untrained weights, and log at step 0.
        """
        check_data_and_callbacks(self.trainer, self.model, self.datamodule, str(self.subcommand))
        if self.config[self.subcommand].ckpt_path == "last":
            if (newest := self.last_checkpoint()) is None:
                folder = Path(self.trainer.default_root_dir) / "checkpoints"
                raise InputError(f"{folder} holds no whole checkpoint, and ckpt_path last asks for the newest one")
            self.config_init[self.subcommand].ckpt_path = newest
        if (path := self.config_init[self.subcommand].ckpt_path) is not None:
            step = check_checkpoint(path)["global_step"]  # the log of a run in the same folder shows its step
            self.trainer.fit_loop.epoch_loop._batches_that_stepped = max(0, step - 1)

    before_test = before_predict = before_validate

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        refuse_old_class_paths(sys.argv[1:])
        if any(re.match(r"--model\.(init_args\.)?seed(=|$)", word) for word in sys.argv[1:]):  # jsonargparse drops it
            raise InputError("--model.seed has no effect: give --seed_everything, a whole number, for model and data")
        try:
            super().parse_arguments(parser, args)
            check_values(self.config[self.config.subcommand])
        except (OmegaConfBaseException, UnicodeDecodeError) as error:  # jsonargparse reports all other errors
            raise InputError(f"a configuration cannot be read: {str(error).splitlines()[0]}") from error
        merge_callback_options(self.config[self.config.subcommand])
        take_from_data(self.config[self.config.subcommand])

    def _prepare_subcommand_parser(self, *args: Any, **kwargs: Any) -> LightningArgumentParser:
        """Set defaults: weights_only true, which unpickles nothing, and verbose false, so that metrics print once."""
        parser = super()._prepare_subcommand_parser(*args, **kwargs)
        parser.set_defaults({"weights_only": True})
        if "verbose" in parser.get_defaults():
            parser.set_defaults({"verbose": False})  # RunSummary prints them
        return parser

    def _parse_ckpt_path(self) -> None:
        """Do nothing; Lightning would overwrite the configuration with the hyper-parameters of the checkpoint."""


def run() -> None:
    """Run the command in sys.argv. Lightning starts further processes with the same sys.argv."""
    if not logged_in():
        os.environ.setdefault("WANDB_MODE", "offline")
    quiet_wandb()
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    CommandLine(
        L.LightningModule,
        ShardDataModule,
        subclass_mode_model=True,
        trainer_class=Trainer,
        trainer_defaults={"enable_model_summary": False},  # RunSummary prints the number of parameters
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        parser_class=LightningParser,
        parser_kwargs={"parser_mode": "omegaconf+", "prog": "cdm"},
    )


def quiet_wandb() -> None:
    """Silence W&B, except if an environment variable sets its verbosity, or if it may have to ask for an API key."""
    offline = os.environ.get("WANDB_MODE", "online") != "online"
    if (offline or logged_in()) and os.environ.keys().isdisjoint(("WANDB_SILENT", "WANDB_QUIET")):
        os.environ["WANDB_SILENT"] = "true"


def logged_in() -> bool:
    """Whether W&B has an API key, in the environment or in .netrc. Importing wandb to ask would fix WANDB_MODE."""
    server = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return bool(os.environ.get("WANDB_API_KEY") or netrc().authenticators(server or ""))
    except (OSError, NetrcParseError):
        return False
