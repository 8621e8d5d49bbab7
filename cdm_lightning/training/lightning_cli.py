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
from typing import Any
from urllib.parse import urlparse

import lightning.pytorch as L
from jsonargparse import set_parsing_settings
from lightning.pytorch.accelerators import AcceleratorRegistry, CPUAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_warn
from omegaconf.errors import OmegaConfBaseException

from cdm_lightning.data import ShardDataModule
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.parser import Parser, nearest
from cdm_lightning.stages import DiffusionStage, SuperResolutionStage
from cdm_lightning.stages.loading import check_checkpoint, newest_checkpoint
from cdm_lightning.training.checkpoint_files import AtomicCheckpointIO, Trainer
from cdm_lightning.training.progress import Progress, RunSummary
from cdm_lightning.training.resume import run_id

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


class CommandLine(LightningCLI):
    """Lightning's command line, with one seed for model and data, and checks of what the user asks for."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.seed")

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

    def before_fit(self) -> None:
        """Refuse settings that cannot work together, resolve `ckpt_path: last`, and set the W&B run id."""
        precision = str(self.config.fit.trainer.precision)
        if precision.startswith("16") and isinstance(self.trainer.accelerator, CPUAccelerator):
            raise InputError(f"precision {precision} needs a GPU: a CPU offers 32-true and bf16-mixed")
        options = getattr(self.trainer.strategy, "_ddp_kwargs", {})
        if options.get("static_graph") and self.trainer.accumulate_grad_batches > 1:
            number = self.trainer.accumulate_grad_batches
            raise InputError(f"accumulate_grad_batches {number} and DDP's static_graph exclude each other in torch")
        mode, number = getattr(self.model, "compile_mode", None), self.trainer.accumulate_grad_batches
        if mode is not None and mode != "default" and number > 1:
            raise InputError(
                f"compile {mode} and accumulate_grad_batches {number} exclude each other: CUDA graphs reuse memory"
            )
        if self.config.fit.ckpt_path == "last" and not self.config.fit.trainer.fast_dev_run:
            self.config_init.fit.ckpt_path = self.last_checkpoint()
        elif self.config.fit.ckpt_path is None and (older := self.last_checkpoint()):
            rank_zero_warn(
                f"ckpt_path is null, but {older} exists: `ckpt_path: last` will resume whichever run has more steps"
            )
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger) and self.trainer.is_global_zero and "WANDB_RUN_ID" not in os.environ:
                logger._wandb_init["id"] = logger._wandb_init.get("id") or run_id(Path(self.trainer.default_root_dir))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The trainer with RunSummary, Progress and AtomicCheckpointIO.

        A progress bar among the configured callbacks, or a CheckpointIO among the plugins, is used instead of ours.
        """
        given = self.config_init[self.subcommand].trainer
        callbacks = given.callbacks if isinstance(given.callbacks, list) else [given.callbacks or ()]
        callbacks = [*filter(None, callbacks), RunSummary()]
        if given.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(Progress())
        trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and not logger._wandb_init.get("anonymous"):
                logger._wandb_init.pop("anonymous", None)  # W&B warns about this option, whatever its value
        return trainer

    def before_validate(self) -> None:
        """Resolve `ckpt_path: last`. Raises InputError if there is none; Lightning would take untrained weights."""
        if self.config[self.subcommand].ckpt_path == "last":
            if (newest := self.last_checkpoint()) is None:
                folder = Path(self.trainer.default_root_dir) / "checkpoints"
                raise InputError(f"{folder} holds no whole checkpoint, and ckpt_path last asks for the newest one")
            check_checkpoint(newest)
            self.config_init[self.subcommand].ckpt_path = newest

    before_test = before_predict = before_validate

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        refuse_old_class_paths(sys.argv[1:])
        try:
            super().parse_arguments(parser, args)
            check_values(self.config[self.config.subcommand])
        except (OmegaConfBaseException, UnicodeDecodeError) as error:  # jsonargparse reports all other errors
            raise InputError(f"a configuration cannot be read: {str(error).splitlines()[0]}") from error

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
