"""The training recipe of a stage, read from its configuration files as `cdm fit` reads them."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ActionConfigFile, set_parsing_settings
from lightning.pytorch.cli import instantiate_class

from cdm_lightning.data import ShardDataModule
from cdm_lightning.foundation.errors import InputError, split_arguments
from cdm_lightning.foundation.parser import nearest
from cdm_lightning.stages import DiffusionStage
from cdm_lightning.training import EMA
from cdm_lightning.training.checkpoint_files import Trainer
from cdm_lightning.training.lightning_cli import (
    LightningParser,
    add_callback_options,
    merge_callback_options,
    refuse_old_class_paths,
)

EXPERIMENTS = Path("experiments")


@dataclass(frozen=True)
class Recipe:
    """A training's settings: the stage's class and arguments, the batch over all devices, steps and precision.

    average: whether an EMA of the weights is kept. checkpointing: whether the recipe recomputes activations.
    """

    model: dict[str, Any]
    batch: int
    max_steps: int
    precision: str
    average: bool
    checkpointing: bool

    def stage(self, device: str) -> DiffusionStage:
        """The stage, untrained and without checkpointing. On the meta device it takes no memory."""
        with torch.device(device):
            return instantiate_class((), self.model)


def configurations(stage: str, experiment: str) -> list[Path]:
    """The configuration files that `make train-stage` passes to `cdm fit`, from general to specific."""
    folder = EXPERIMENTS / experiment
    if not folder.is_dir():
        known = sorted(path.parent.name for path in EXPERIMENTS.glob("*/defaults.yaml"))
        raise InputError(f"experiment {experiment!r} is no folder of {EXPERIMENTS.absolute()}: known are {known}")
    if stage == "defaults" or not (folder / f"{stage}.yaml").is_file():
        known = sorted({path.stem for path in folder.glob("*.yaml")} - {"defaults", "cas", "cascade", "distance"})
        close = f", the nearest is {near}" if (near := nearest(stage, known)) else ""
        raise InputError(f"stage {stage!r} is none of {folder}: known are {', '.join(known)}{close}")
    return [EXPERIMENTS / "defaults.yaml", folder / "defaults.yaml", folder / f"{stage}.yaml"]


def read_recipe(configs: list[Path], arguments: str = "") -> Recipe:
    """Parse configuration files and then arguments as `cdm fit` does: later ones override earlier ones."""
    for path in configs:
        if not path.is_file():
            raise InputError(f"configuration {path} does not exist")
    refuse_old_class_paths([*map(str, configs), *split_arguments(arguments)])
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    parser = LightningParser(parser_mode="omegaconf+", prog="cdm plan")
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_lightning_class_args(DiffusionStage, "model", subclass_mode=True)
    parser.add_lightning_class_args(ShardDataModule, "data")
    add_callback_options(parser)
    for name, kind in (("seed_everything", bool | int), ("ckpt_path", str | None), ("weights_only", bool | None)):
        parser.add_argument(f"--{name}", type=kind)  # options of `cdm fit` that a plan does not use
    words = [word for path in configs for word in ("--config", str(path))]
    read = parser.parse_args([*words, *split_arguments(arguments)])
    if read.model is None:
        raise InputError(f"{', '.join(map(str, configs))} name no model")
    merge_callback_options(read)
    model = read.model.as_dict()
    arguments_of_stage = dict(model.get("init_args", {}))
    checkpointing = bool(arguments_of_stage.pop("checkpointing", False))  # the plan decides about it
    steps = read.trainer.max_steps
    if steps < 1:
        raise InputError(f"max_steps {steps} says no length of the training: a plan needs at least 1")
    return Recipe(
        model={"class_path": model["class_path"], "init_args": arguments_of_stage},
        batch=read.data.batch_size,
        max_steps=steps,
        precision=str(read.trainer.precision),
        average=any(issubclass(pkgutil.resolve_name(call.class_path), EMA) for call in read.trainer.callbacks),
        checkpointing=checkpointing,
    )
