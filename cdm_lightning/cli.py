"""`cdm COMMAND`: Lightning's fit, validate, test and predict, and the commands around them."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import lightning.pytorch as L
import torch
from jsonargparse import auto_cli, set_parsing_settings
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from omegaconf.errors import OmegaConfBaseException

from cdm_lightning import __version__
from cdm_lightning.cascade.bundle import write_bundle
from cdm_lightning.cascade.cascade import CascadeModule, check_stages
from cdm_lightning.data.datamodule import ShardDataModule
from cdm_lightning.data.preparation.prepare import prepare_folder, prepare_imagenet
from cdm_lightning.evaluation.cas.cas import cas
from cdm_lightning.evaluation.detectors.inception import detector
from cdm_lightning.evaluation.evaluate import evaluate
from cdm_lightning.evaluation.references.adm import npz
from cdm_lightning.evaluation.references.reference import reference
from cdm_lightning.evaluation.search.search import search
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.process_group import broken_off, fail, together, understood
from cdm_lightning.planning.plan import plan
from cdm_lightning.planning.sweep import sweep
from cdm_lightning.sampling.sample import sample
from cdm_lightning.stages.loading import check_checkpoint, load_stage, newest_checkpoint
from cdm_lightning.training.checkpoints import Trainer, WholeCheckpoints
from cdm_lightning.training.resume import run_id

LIGHTNING = {
    "fit": "Train one stage.",
    "validate": "Loss of a stage on the validation images.",
    "test": "Run a stage or a cascade over the validation images, with the callbacks that measure it.",
    "predict": "Sample for the classes of the validation images; a prediction writer among the callbacks keeps them.",
}


class CLI(LightningCLI):
    """Lightning's command line with one seed for everything that draws."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.seed")

    def after_instantiate_classes(self) -> None:
        """Refuse a file that is no whole checkpoint, which nothing in Lightning has a sentence for."""
        given = self.config[self.subcommand]
        if given.ckpt_path and given.ckpt_path not in ("last", "best", "hpc"):
            if not Path(given.ckpt_path).is_file():
                raise InputError(f"ckpt_path {given.ckpt_path} is no file: a checkpoint is expected, or the word last")
            check_checkpoint(given.ckpt_path)

    def newest(self) -> Path | None:
        """The checkpoint that `ckpt_path: last` means."""
        savers = [saver for saver in self.trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
        root = Path(self.trainer.default_root_dir) / "checkpoints"
        return newest_checkpoint({root, *(Path(saver.dirpath) for saver in savers if saver.dirpath)})

    def before_fit(self) -> None:
        """Refuse what would not be done as it was asked for, and settle where the run goes on."""
        precision = str(self.config.fit.trainer.precision)
        if precision.startswith("16") and isinstance(self.trainer.accelerator, CPUAccelerator):
            raise InputError(f"precision {precision} needs a GPU: on a CPU, 32-true and bf16-mixed are there")
        options = getattr(self.trainer.strategy, "_ddp_kwargs", {})
        if options.get("static_graph") and self.trainer.accumulate_grad_batches > 1:
            number = self.trainer.accumulate_grad_batches
            raise InputError(f"accumulate_grad_batches {number} and DDP's static_graph exclude each other in torch")
        mode, number = getattr(self.model, "compiled_as", None), self.trainer.accumulate_grad_batches
        if mode is not None and mode != "default" and number > 1:
            raise InputError(
                f"compile {mode} and accumulate_grad_batches {number} exclude each other: CUDA graphs reuse memory"
            )
        if self.config.fit.ckpt_path == "last" and not self.config.fit.trainer.fast_dev_run:
            self.config_init.fit.ckpt_path = self.newest()
        elif self.config.fit.ckpt_path is None and (older := self.newest()):
            rank_zero_warn(f"ckpt_path is null beside {older}: of both runs, `last` will mean the one of more steps")
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger) and self.trainer.is_global_zero and "WANDB_RUN_ID" not in os.environ:
                logger._wandb_init["id"] = logger._wandb_init.get("id") or run_id(Path(self.trainer.default_root_dir))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The trainer, its checkpoints written whole; a CheckpointIO among the configured plugins stays."""
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpoints()
        return trainer

    def before_validate(self) -> None:
        """Refuse to measure weights that nothing has trained, where Lightning would only warn."""
        if self.config[self.subcommand].ckpt_path == "last":
            if (newest := self.newest()) is None:
                folder = Path(self.trainer.default_root_dir) / "checkpoints"
                raise InputError(f"{folder} holds no whole checkpoint, and ckpt_path last asks for the newest of them")
            check_checkpoint(newest)
            self.config_init[self.subcommand].ckpt_path = newest

    before_test = before_predict = before_validate

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except (OmegaConfBaseException, UnicodeDecodeError) as error:  # jsonargparse has a sentence for all others
            raise InputError(f"a configuration cannot be read: {str(error).splitlines()[0]}") from error

    def _prepare_subcommand_parser(self, *args: Any, **kwargs: Any) -> LightningArgumentParser:
        """Unpickle nothing unless told to, whatever configurations are given."""
        parser = super()._prepare_subcommand_parser(*args, **kwargs)
        parser.set_defaults({"weights_only": True})
        return parser

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone, where Lightning would pour a checkpoint's hyper-parameters into it."""


def bundle(
    checkpoints: list[Path], out: Path, levels: list[int] | None = None, truncated: bool = False, half: bool = False
) -> None:
    """Put trained stages into one folder: averaged weights as safetensors, everything else as JSON, all hashed.

    Args:
        checkpoints: One checkpoint or run folder per stage, from low to high resolution; a run folder stands for the
            newest of its checkpoints.
        out: The folder to write.
        levels: The level s of each super-resolution stage that sampling shall use when told none; null for 0.
        truncated: Whether that sampling is truncated.
        half: Round the weights to 16 bits, for half the size.
    """
    stages = []
    for path in map(Path, checkpoints):
        newest = newest_checkpoint([path / "checkpoints"]) if path.is_dir() else path
        stages.append(load_stage(newest or path / "checkpoints" / "last.ckpt"))
    check_stages(stages)
    cascade = CascadeModule.of(stages)
    cascade.set_levels(levels or cascade.levels, truncated)
    classes = next((c for stage in stages if (c := stage.trained.get("classes"))), None)
    dtype = torch.float16 if half else torch.float32
    write_bundle(out, stages, {"levels": cascade.levels, "truncated": truncated, "classes": classes}, dtype)
    total = sum(p.numel() for stage in stages for p in stage.parameters())
    steps = " -> ".join(f"{stage.name} ({stage.trained.get('steps', '?')} steps)" for stage in stages)
    raw = [stage.name for stage in stages if not stage.trained.get("averaged")]
    print(f"{out}: {steps}, {total / 1e6:.2f} M parameters{', NOT averaged: ' + ', '.join(raw) if raw else ''}")


COMMANDS: dict[str, Any] = {
    "prepare": {"imagenet": prepare_imagenet, "folder": prepare_folder},
    "bundle": bundle,
    "sample": sample,
    "evaluate": evaluate,
    "search": search,
    "detector": detector,
    "reference": reference,
    "npz": npz,
    "sweep": sweep,
    "cas": cas,
    "plan": plan,
}

HARMLESS = (  # said by libraries about each other, or about what is so on purpose
    ".*`IterableDataset` has `__len__` defined.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*there is no last checkpoint available.*",
    ".*does not have many workers.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*predict returned None if it was on purpose.*",
    ".*Couldn't infer the batch indices.*",
    ".*(Kernel Inception Distance|InceptionScore). will save all extracted features.*",
    ".*__array__ implementation doesn't accept a copy keyword.*",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; bad input ends in one sentence and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return
    if arguments[0] == "--version":
        print(f"cdm_lightning {__version__}")
        return
    sys.argv[1:] = arguments  # where Lightning looks, and what the processes it starts repeat
    with together():
        try:
            run(arguments)
        except Exception as error:
            cause = understood(error)
            if cause is None and not broken_off():
                raise
            sys.exit(2 if cause is None else fail(cause))


def run(arguments: list[str]) -> None:
    """Hand the arguments to Lightning's command line or to a command of our own."""
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message=message)
    command, rest = arguments[0], arguments[1:]
    chatter = ("litlogger", "litmodels", *(() if command in LIGHTNING else ("GPU available", "TPU available")))
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(word in str(record.msg) for word in chatter)
    )
    if command in LIGHTNING:
        if not logged_in():
            os.environ.setdefault("WANDB_MODE", "offline")
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        CLI(
            L.LightningModule,
            ShardDataModule,
            subclass_mode_model=True,
            trainer_class=Trainer,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"parser_mode": "omegaconf+", "prog": "cdm"},
        )
    elif command in COMMANDS:
        if command == "plan" and rest and not rest[0].startswith("-"):
            rest = ["--stage", *rest]
        auto_cli(COMMANDS[command], args=rest, prog=f"cdm {command}", as_positional=False)
    else:
        known = [*LIGHTNING, *COMMANDS]
        raise InputError(f"{command!r} is no command of cdm: known are {', '.join(known)}")


def logged_in() -> bool:
    """Whether `wandb login` has left a key; asks the file, since asking wandb settles its mode before it can be set."""
    server = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return bool(os.environ.get("WANDB_API_KEY") or netrc().authenticators(server or ""))
    except (OSError, NetrcParseError):
        return False


def overview() -> str:
    lines = ["usage: cdm COMMAND [options], and cdm COMMAND --help", "", "Cascaded diffusion models.", ""]
    about: dict[str, Any] = {**LIGHTNING}
    for name, command in COMMANDS.items():
        first = next(iter(command.values())) if isinstance(command, dict) else command
        about[name] = (inspect.getdoc(first) or "").splitlines()[0]
    return "\n".join([*lines, *(f"  {name:10s}{text}" for name, text in about.items())])
