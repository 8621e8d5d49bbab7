"""What a training shows of itself: what runs, one bar over all steps, and at the end what came of it."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from contextlib import ExitStack, redirect_stderr
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks import ProgressBar as ProgressBarCallback
from lightning.pytorch.loggers import WandbLogger
from tqdm.contrib import DummyTqdmFile

from cdm_lightning.data import ShardDataModule
from cdm_lightning.foundation.progress_bar import ProgressBar
from cdm_lightning.foundation.terminal import whole_console, whole_table
from cdm_lightning.stages import SuperResolutionStage
from cdm_lightning.training.finite_steps import folders

TERMINAL = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}, {elapsed} gone, {remaining} left{postfix}"
LINE = "{desc}: {n_fmt}/{total_fmt} {unit} ({percentage:.0f}%), {elapsed} gone, {remaining} left{postfix}"
WINDOW = 100  # optimizer steps that images a second are taken over


class Progress(ProgressBarCallback):
    """One bar over all steps of a training: elapsed and remaining time, images a second, and the loss.

    A validation in between is a word on it. Images are counted over all processes and accumulated batches, and without
    the time of validations. `validate`, `test` and `predict` have a bar over their batches, which goes when they end.
    Where output is no terminal, there are lines instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.bar: ProgressBar | None = None
        self.looks: deque[float] = deque(maxlen=WINDOW + 1)  # when the last optimizer steps ended
        self.rate = 0.0  # images a second
        self.undo = ExitStack()

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    # -- the bar, or the lines

    def begin(self, name: str, total: float, unit: str, done: int = 0, stays: bool = False) -> None:
        """Show a new bar, or be ready to print lines."""
        self.close()
        if not self.enabled:
            return
        count = int(total) if math.isfinite(total) else None
        self.bar = ProgressBar(
            desc=name, total=count, initial=done, unit=unit, leave=stays, words=self.words, line=LINE, file=sys.stdout,
            bar_format=TERMINAL, smoothing=0, miniters=1, mininterval=0.25, dynamic_ncols=True,
        )  # fmt: skip
        if sys.stdout.isatty() and sys.stderr.isatty():
            self.lead_around(sys.stderr)

    def lead_around(self, stream: Any) -> None:
        """Write what goes to a stream of this terminal above the bar, until it closes."""
        above = DummyTqdmFile(sys.stdout)
        self.undo.enter_context(redirect_stderr(above))
        for name in ("lightning.pytorch", "lightning.fabric"):
            for handler in logging.getLogger(name).handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                    handler.setStream(above)
                    self.undo.callback(handler.setStream, stream)

    def words(self) -> str:
        """Images a second and the loss, where there are some."""
        rate = [f"{self.rate:,.0f} images/s" if self.rate >= 10 else f"{self.rate:.2g} images/s"] if self.rate else []
        loss = self.trainer.callback_metrics.get("train/loss")
        return ", ".join(rate + ([] if loss is None else [f"loss {float(loss):#.3g}"]))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        self.undo.close()

    # -- training

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.looks.clear()  # before the first step, data are awaited and networks compiled
        self.rate = 0.0
        self.begin(name_of(pl_module), trainer.estimated_stepping_batches, "steps", trainer.global_step, stays=True)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        if self.bar is None or trainer.global_step == self.bar.n:
            return  # amid accumulated batches
        self.looks.append(time.monotonic())
        batch = getattr(trainer.datamodule, "batch_size", 0)  # type: ignore[attr-defined]  # set by a connector
        if len(self.looks) > 1:
            self.rate = batch * (len(self.looks) - 1) / (self.looks[-1] - self.looks[0])
        self.bar.update(trainer.global_step - self.bar.n)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.close()

    # -- validation, test, prediction

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "validate":
            self.begin("validating", total(trainer.num_val_batches), "batches")
        elif self.bar is not None:
            self.looks.clear()
            self.bar.set_description_str(f"{name_of(pl_module)}, validating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "validate":
            self.close()
        elif self.bar is not None:
            self.bar.set_description_str(name_of(pl_module))

    def on_test_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.begin("testing", total(trainer.num_test_batches), "batches")

    def on_predict_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.begin("predicting", total(trainer.num_predict_batches), "batches")

    def count_batch(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn != "fit" and self.bar is not None:
            self.bar.update()

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = count_batch

    def over(self, *args: Any) -> None:
        self.close()

    on_test_end = on_predict_end = on_exception = over  # type: ignore[assignment]


class FirstAndLastWords(Callback):
    """What runs on what, printed when it starts; at its end, where a training left what, or the figures of a test."""

    def __init__(self) -> None:
        self.began: tuple[float, int] | None = None  # when, and at which step

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.began = time.monotonic(), trainer.global_step
        say(trainer, *about(trainer, pl_module, "train"), plan(trainer), *wandb_mode(trainer))

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        name, done, most = name_of(pl_module), trainer.global_step, trainer.max_steps
        if self.began is None:
            happened = f"{name}: all {done:,} steps were done before"
        else:
            seconds, first = time.monotonic() - self.began[0], self.began[1]
            here = f" ({done - first:,} of them now)" if first else ""
            happened = f"{name} is trained: {done:,} steps{here} in {timedelta(seconds=round(seconds))}"
            if done < most:
                happened = happened.replace("is trained", f"stopped before step {most:,}")
        root = run(trainer)
        files = [*(folder / "last.ckpt" for folder in folders(trainer)), *(root / file for file in RESULTS)]
        there = [str(f.relative_to(root) if f.is_relative_to(root) else f) for f in files if f.exists()]
        holds = f"; {root} holds {', '.join(there)}" if there else ""
        say(trainer, ", ".join([happened, *losses(trainer)]) + holds)

    def before(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit":
            weights = [f"weights of {trainer.ckpt_path}"] if trainer.ckpt_path else []
            say(trainer, *about(trainer, pl_module, "val"), *weights, *wandb_mode(trainer))

    def after(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit" and trainer.is_global_zero:
            table = whole_table("figure", "value")
            for name, value in sorted(trainer.callback_metrics.items()):
                table.add_row(name, f"{float(value):.4g}")
            whole_console().print(table)

    on_validation_start = on_test_start = on_predict_start = before
    on_validation_end = on_test_end = after


RESULTS = ("loss.png", "grids")  # what the callbacks of a training leave in its folder


def say(trainer: L.Trainer, *lines: str) -> None:
    """Print lines, in the first process."""
    if trainer.is_global_zero:
        print(*lines, sep="\n", flush=True)


def about(trainer: Any, module: Any, split: str) -> list[str]:
    """A line of the model, and one of the images of a split where shards hold them."""
    what, classes = type(module).__name__, getattr(module, "num_classes", None)
    if stages := getattr(module, "stages", None):
        what = f"{what}, {' -> '.join(stage.name for stage in stages)}"
    elif isinstance(module, SuperResolutionStage):
        low, high, kind = module.low_resolution, module.resolution, module.hparams["augmentation"]
        what = f"{what}, {low}x{low} -> {high}x{high}, conditioning augmentation {kind}"
    elif size := getattr(module, "resolution", None):
        what = f"{what}, {f'{classes} classes -> ' if classes else ''}{size}x{size}"
    parameters = sum(parameter.numel() for parameter in module.parameters())
    named = f"{module.name}: " if hasattr(module, "name") else ""
    lines = [f"{named}{what}, {parameters / 1e6:.2f} M parameters"]
    if isinstance(trainer.datamodule, ShardDataModule):
        folder, images = trainer.datamodule.manifest(split)
        size, kinds = images.resolution, len(images.classes)
        lines.append(f"{folder}: {images.count:,} images of {size}x{size} in {kinds:,} class{'es' * (kinds != 1)}")
    return lines


def plan(trainer: Any) -> str:
    """Steps, batch, devices, precision and folder of a training, and where it begins."""
    steps = trainer.estimated_stepping_batches
    batch, parts = getattr(trainer.datamodule, "batch_size", None), trainer.accumulate_grad_batches
    of = f" of {batch:,} images" if batch else ""
    split = f" in {parts} accumulated batches" if parts > 1 else ""
    device, number = trainer.strategy.root_device, trainer.world_size
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    where = f"{number} x {kind}" if number > 1 else kind
    done = trainer.global_step
    start = f"goes on after step {done:,} of {trainer.ckpt_path}" if done else "begins"
    count = f"{steps:,} steps" if math.isfinite(steps) else "steps without end"
    return f"{count}{of}{split} on {where} in {trainer.precision}: the run in {run(trainer)} {start}"


def wandb_mode(trainer: L.Trainer) -> list[str]:
    """Where Weights & Biases has the run, a line for each of its loggers."""
    lines = []
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, WandbLogger):
            made: Any = logger.experiment
            if url := getattr(made, "url", None):
                lines.append(f"W&B: online, {url}")
            elif getattr(made, "offline", False):
                lines.append(f"W&B: offline, `wandb sync {shown(Path(made.dir).parent)}` sends it later")
    return lines


def losses(trainer: Any) -> list[str]:
    """The newest losses of training and validation, in words."""
    known = {what: trainer.callback_metrics.get(f"{split}/loss") for split, what in SPLITS.items()}
    return [f"{what} {float(value):#.3g}" for what, value in known.items() if value is not None]


SPLITS = {"train": "training loss", "val": "validation loss"}


def total(batches: list[int | float]) -> float:
    return sum(batches)


def run(trainer: Any) -> Path:
    """The folder of a run, as it was given."""
    return Path(trainer.default_root_dir)


def shown(path: Path) -> Path:
    """A path as short as it can be written from here."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def name_of(module: Any) -> str:
    """base8, sr16, ... of a stage; of another module its class."""
    return str(getattr(module, "name", None) or type(module).__name__)
