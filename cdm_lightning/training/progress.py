"""What a run prints: the model, data and plan at its start, a progress bar, and a summary at its end."""

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
from cdm_lightning.foundation.terminal import folding_table, table_console
from cdm_lightning.stages import SuperResolutionStage
from cdm_lightning.training.finite_steps import checkpoint_folders

BAR_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}, {elapsed} gone, {remaining} left{postfix}"
LINE_FORMAT = "{desc}: {n_fmt}/{total_fmt} {unit} ({percentage:.0f}%), {elapsed} gone, {remaining} left{postfix}"
RATE_STEPS = 100  # optimizer steps over which images per second are averaged


class Progress(ProgressBarCallback):
    """One progress bar over all optimizer steps: elapsed and remaining time, images per second and the loss.

    The rate counts the images of all processes and accumulated batches, and leaves out the time of validations.
    `validate`, `test` and `predict` have a bar over their batches, which disappears at the end. Where the output is not
    a terminal, lines are printed instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.bar: ProgressBar | None = None
        self.step_times: deque[float] = deque(maxlen=RATE_STEPS + 1)  # when each of the last optimizer steps ended
        self.rate = 0.0  # images per second
        self.cleanup = ExitStack()

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    # -- opening and closing the bar

    def open_bar(self, name: str, total: float, unit: str, done: int = 0, stays: bool = False) -> None:
        """Start a new bar. stays: leave it on the screen when it closes."""
        self.close_bar()
        if not self.enabled:
            return
        self.bar = ProgressBar(
            desc=name,
            total=int(total) if math.isfinite(total) else None,
            initial=done,
            unit=unit,
            leave=stays,
            status=self.status,
            line_format=LINE_FORMAT,
            bar_format=BAR_FORMAT,
            file=sys.stdout,
            smoothing=0,
            miniters=1,
            mininterval=0.25,
            dynamic_ncols=True,
        )
        if sys.stdout.isatty() and sys.stderr.isatty():
            self.print_above_bar(sys.stderr)

    def print_above_bar(self, stream: Any) -> None:
        """Print what is written to `stream` above the bar instead of over it, until the bar closes."""
        above = DummyTqdmFile(sys.stdout)
        self.cleanup.enter_context(redirect_stderr(above))
        for name in ("lightning.pytorch", "lightning.fabric"):
            for handler in logging.getLogger(name).handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                    handler.setStream(above)
                    self.cleanup.callback(handler.setStream, stream)

    def status(self) -> str:
        """Images per second and the latest loss, as far as they are known."""
        parts = []
        if self.rate:
            parts.append(f"{self.rate:,.0f} images/s" if self.rate >= 10 else f"{self.rate:.2g} images/s")
        loss = self.trainer.callback_metrics.get("train/loss")
        if loss is not None:
            parts.append(f"loss {float(loss):#.3g}")
        return ", ".join(parts)

    def close_bar(self, *args: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        self.cleanup.close()

    # -- training

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.step_times.clear()  # the first step is not timed: it waits for data and compilation
        self.rate = 0.0
        name, total = model_name(pl_module), trainer.estimated_stepping_batches
        self.open_bar(name, total, "steps", trainer.global_step, stays=True)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        if self.bar is None or trainer.global_step == self.bar.n:
            return  # the optimizer step still accumulates batches
        self.step_times.append(time.monotonic())
        batch = getattr(trainer.datamodule, "batch_size", 0)  # type: ignore[attr-defined]  # set by a connector
        if len(self.step_times) > 1:
            self.rate = batch * (len(self.step_times) - 1) / (self.step_times[-1] - self.step_times[0])
        self.bar.update(trainer.global_step - self.bar.n)

    # -- validation, test, prediction

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "validate":
            self.open_bar("validating", sum(trainer.num_val_batches), "batches")
        elif self.bar is not None:
            self.step_times.clear()
            self.bar.set_description_str(f"{model_name(pl_module)}, validating")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "validate":
            self.close_bar()  # before RunSummary prints its table
        elif self.bar is not None:
            self.bar.set_description_str(model_name(pl_module))

    def on_test_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.open_bar("testing", sum(trainer.num_test_batches), "batches")

    def on_predict_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.open_bar("predicting", sum(trainer.num_predict_batches), "batches")

    def count_batch(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn != "fit" and self.bar is not None:
            self.bar.update()

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = count_batch
    on_train_end = on_test_epoch_end = on_predict_end = on_exception = close_bar  # type: ignore[assignment]  # one for all


class RunSummary(Callback):
    """Prints the model, the data and the plan when a run starts; at the end, the files of a training or the metrics."""

    def __init__(self) -> None:
        self.start: tuple[float, int] | None = None  # time and optimizer step at which training started

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.start = time.monotonic(), trainer.global_step
        lines = [*model_and_data(trainer, pl_module, "train"), training_plan(trainer), *wandb_lines(trainer)]
        print_once(trainer, *lines)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        name, done, target = model_name(pl_module), trainer.global_step, trainer.max_steps
        if self.start is None:
            outcome = f"{name}: all {done:,} steps are already done"
            if done < target:
                outcome = f"{name}: max_time is used up at step {done:,} of {target:,}, and a longer one trains on"
        else:
            seconds, first = time.monotonic() - self.start[0], self.start[1]
            reached = f"stopped after {done:,} of {target:,} steps" if done < target else f"trained {done:,} steps"
            now = f" ({done - first:,} of them now)" if first else ""
            outcome = f"{name}: {reached}{now} in {timedelta(seconds=round(seconds))}"
        root, whole = Path(trainer.default_root_dir), Path(trainer.default_root_dir).resolve()
        savers: list[Any] = trainer.checkpoint_callbacks
        best = [saver.best_model_path for saver in savers if getattr(saver, "monitor", None)]  # "": none yet
        files = [folder / "last.ckpt" for folder in checkpoint_folders(trainer)] + [Path(file) for file in best if file]
        there = [f.resolve() for f in files + [root / file for file in PICTURES] if f.exists()]
        written = dict.fromkeys(str(f.relative_to(whole) if f.is_relative_to(whole) else f) for f in there)
        holds = f"; {root} holds {', '.join(written)}" if written else ""
        print_once(trainer, ", ".join([outcome, *latest_losses(trainer)]) + holds)

    def print_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit":
            weights = [f"weights from {trainer.ckpt_path}"] if trainer.ckpt_path else []
            print_once(trainer, *model_and_data(trainer, pl_module, "val"), *weights, *wandb_lines(trainer))

    def print_metrics(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit" and trainer.is_global_zero:
            table = folding_table("metric", "value")
            for name, value in sorted(trainer.callback_metrics.items()):
                table.add_row(name, f"{float(value):.4g}")
            table_console().print(table)

    on_validation_start = on_test_start = on_predict_start = print_start
    on_validation_end = on_test_end = print_metrics


PICTURES = ("loss.png", "grids")  # written by the callbacks of a training into the run's folder


def print_once(trainer: L.Trainer, *lines: str) -> None:
    """Print lines, in the first process only."""
    if trainer.is_global_zero:
        print(*lines, sep="\n", flush=True)


def model_and_data(trainer: Any, module: Any, split: str) -> list[str]:
    """One line about the model, and one about the images of a split if they come from shards."""
    description, classes = type(module).__name__, getattr(module, "num_classes", None)
    if stages := getattr(module, "stages", None):
        description += f", {' -> '.join(stage.name for stage in stages)}"
    elif isinstance(module, SuperResolutionStage):
        low, high, augmentation = module.low_resolution, module.resolution, module.hparams["augmentation"]
        description += f", {low}x{low} -> {high}x{high}, conditioning augmentation {augmentation}"
    elif size := getattr(module, "resolution", None):
        description += f", {f'{classes} classes -> ' if classes else ''}{size}x{size}"
    parameters = sum(parameter.numel() for parameter in module.parameters())
    prefix = f"{module.name}: " if hasattr(module, "name") else ""
    lines = [f"{prefix}{description}, {parameters / 1e6:.2f} M parameters"]
    if isinstance(trainer.datamodule, ShardDataModule):
        folder, manifest = trainer.datamodule.manifest(split)
        size, classes = manifest.resolution, len(manifest.classes)
        plural = "class" if classes == 1 else "classes"
        lines.append(f"{folder}: {manifest.count:,} images of {size}x{size} in {classes:,} {plural}")
    return lines


def training_plan(trainer: Any) -> str:
    """One line: steps, batch, devices, precision and folder of a training, and the step at which it resumes."""
    steps = trainer.estimated_stepping_batches
    count = f"{steps:,} steps" if math.isfinite(steps) else "steps without limit"
    batch, parts = getattr(trainer.datamodule, "batch_size", None), trainer.accumulate_grad_batches
    images = f" of {batch:,} images" if batch else ""
    accumulated = f" in {parts} accumulated batches" if parts > 1 else ""
    device, processes = trainer.strategy.root_device, trainer.world_size
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    devices = f"{processes} x {name}" if processes > 1 else name
    done, folder = trainer.global_step, trainer.default_root_dir
    run = f"resuming {folder} after step {done:,} from {trainer.ckpt_path}" if done else f"new run in {folder}"
    return f"{count}{images}{accumulated} on {devices}, precision {trainer.precision}; {run}"


def wandb_lines(trainer: L.Trainer) -> list[str]:
    """For each Weights & Biases logger, one line that says where the run is."""
    lines = []
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, WandbLogger):
            run: Any = logger.experiment
            if url := getattr(run, "url", None):
                lines.append(f"W&B: online, {url}")
            elif getattr(run, "offline", False):
                lines.append(f"W&B: offline; to upload the run, `wandb sync {relative_path(Path(run.dir).parent)}`")
    return lines


def latest_losses(trainer: Any) -> list[str]:
    """The latest training and validation loss as text, as far as they are known."""
    losses = {text: trainer.callback_metrics.get(name) for name, text in LOSSES.items()}
    return [f"{text} {float(value):#.3g}" for text, value in losses.items() if value is not None]


LOSSES = {"train/loss": "training loss", "val/loss": "validation loss"}


def relative_path(path: Path) -> Path:
    """The path relative to the current folder, if it lies in it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def model_name(module: Any) -> str:
    """The name of a stage (base8, sr16, ...), or the class name of another module."""
    return str(getattr(module, "name", None) or type(module).__name__)
