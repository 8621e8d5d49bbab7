"""What `cdm fit` looks at before it opens a logger or writes a file: its options, its folder and its checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.stages import DiffusionStage, SuperResolutionStage
from cdm_lightning.stages.checkpoints import check_checkpoint
from cdm_lightning.stages.diffusion_stage import RESUMABLE_CHANGES, check_same_stage, kind_of

STREAM = "the images are one endless sequence"
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
REFUSED = {  # options of Lightning's trainer that are not honoured: name -> whether a value is one, and the reason
    "overfit_batches": (lambda n: n > 0, f"{STREAM}, and no pass sees the same ones again: train on a folder of few"),
    "limit_train_batches": (lambda n: n == 0, "nothing would be trained"),
    "max_steps": (lambda n: n == 0, "nothing would be trained"),
    "max_epochs": (lambda n: n == 0, "nothing would be trained"),
    "accumulate_grad_batches": (lambda n: n < 1, "an optimizer step takes at least 1 batch"),
    "val_check_interval": (lambda n: n == 0, "a validation comes after at least 1 batch"),
    "gradient_clip_val": (lambda n: n < 0, "a norm is at least 0"),
    "log_every_n_steps": (lambda n: n < 0, "0 logs nothing, and n logs every n-th step"),
    "barebones": (bool, "it measures Lightning alone, and keeps neither log nor checkpoint"),
    "model_registry": (bool, "checkpoints are files"),
}


def check_options(options: Any) -> None:
    """Refuse options of the trainer that cannot be honoured. options: as they were parsed."""
    for name, (refuses, reason) in REFUSED.items():
        value = options.get(name)
        if value is not None and refuses(value):
            raise InputError(f"trainer.{name} {value} is refused: {reason}")


def check_callbacks(callbacks: Iterable[Any]) -> None:
    """Refuse a callback of this package that is listed twice: it would act twice at every step."""
    kinds = [type(callback) for callback in callbacks if type(callback).__module__.startswith("cdm_lightning.")]
    if twice := next((kind for kind in kinds if kinds.count(kind) > 1), None):
        raise InputError(f"trainer.callbacks lists {twice.__name__} twice: give its arguments to the one that is there")


def check_together(trainer: Any, model: L.LightningModule, asked: str = "") -> None:
    """Refuse options that exclude each other, or that the device or the model cannot honour.

    asked: the precision of the configuration, for which Lightning puts another one where there is no GPU.
    """
    precision, parts = trainer.precision, trainer.accumulate_grad_batches
    if asked.startswith("16") and isinstance(trainer.accelerator, CPUAccelerator):
        raise InputError(f"precision {asked} needs a GPU: a CPU offers 32-true and bf16-mixed")
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision} is none that a stage trains in: {', '.join(PRECISIONS)}")
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        kind = type(trainer.strategy).__name__
        raise InputError(
            f"{kind} shards the gradients, which FiniteSteps and EMA need whole: ddp is for several devices"
        )
    if getattr(trainer.strategy, "_ddp_kwargs", {}).get("static_graph") and parts > 1:
        raise InputError(f"accumulate_grad_batches {parts} and DDP's static_graph exclude each other in torch")
    compiled = getattr(model, "compile_mode", None)
    if compiled is not None and compiled != "default" and parts > 1:
        raise InputError(
            f"compile {compiled} and accumulate_grad_batches {parts} exclude each other: CUDA graphs reuse memory"
        )
    if isinstance(model, SuperResolutionStage) and not model.augmentation.takes_level:
        for name, default in (("max_level", None), ("min_level", 0)):  # a bundle of such a stage is still read
            if (value := model.own_arguments[name]) != default:
                kind = model.own_arguments["augmentation"]
                raise InputError(f"{name} {value} has no effect: augmentation {kind} has no level, so leave it out")


def check_data_and_callbacks(trainer: Any, model: L.LightningModule, data: Any, stage: str) -> None:
    """Let the data module and the callbacks refuse what does not fit, where they have a method check_before_start."""
    for part in (data, *trainer.callbacks):
        if hasattr(part, "check_before_start"):
            part.check_before_start(trainer, model, data, stage)


def check_folder(folder: Path) -> None:
    """Refuse a folder for the run that cannot be made or written to. Makes nothing."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"default_root_dir {folder} cannot be made: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"default_root_dir {folder} cannot be written to: {there} is not ours to write")


def finished(trainer: L.Trainer, model: L.LightningModule, path: Path) -> str | None:
    """The sentence about a run that its checkpoint shows to be finished; None if there is something left to train.

    Raises InputError if the checkpoint does not fit the configuration, or if it asks for a change that would have no
    effect any more.
    """
    checkpoint = check_checkpoint(path)
    step, end, epochs = checkpoint["global_step"], trainer.max_steps, trainer.max_epochs
    if isinstance(model, DiffusionStage):
        check_same_stage(kind_of(model), model.name, dict(model.hparams), checkpoint)
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    averages = any(isinstance(callback, WeightAveraging) for callback in callbacks)
    if "averaging_state" in checkpoint and not averages:
        raise InputError(f"{path} holds averaged weights, and the configuration has no EMA among its callbacks")
    if -1 < end < step:
        raise InputError(f"max_steps {end} is below step {step} of {path}: a training cannot go on to an earlier step")
    passes = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    if step == end:
        limit, reached = "max_steps", f"step {step:,}"
    elif epochs is not None and -1 < epochs <= passes:
        limit, reached = "max_epochs", f"step {step:,}, after {passes:,} passes"
    else:
        return None
    way = f"a higher --trainer.{limit} trains on, and another --trainer.default_root_dir begins anew"
    stored = checkpoint["hyper_parameters"]
    changed = [f"{n} {v}" for n, v in model.hparams.items() if n in RESUMABLE_CHANGES and v != stored.get(n, v)]
    if changed:
        raise InputError(f"the training is finished at {reached}, and model.{changed[0]} has no effect: {way}")
    return f"finished at {reached}, nothing is left to train: {way}"
