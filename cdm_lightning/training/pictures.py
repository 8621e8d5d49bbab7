"""What happens beside training: averaged weights, grids of samples, and a picture of the loss."""

from __future__ import annotations

import csv
import gc
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import to_uint8
from cdm_lightning.foundation.pictures import save_grid
from cdm_lightning.foundation.randomness import generators
from cdm_lightning.stages.kinds import BaseStage, DiffusionStage, SuperResolutionStage
from cdm_lightning.training.finite_steps import FiniteSteps
from cdm_lightning.training.health import adherence


class EMA(WeightAveraging):
    """Averaged weights: ema <- d ema + (1 - d) w after every optimizer step, d = min(decay, (1 + n) / (10 + n)).

    n counts the updates. The rise of d lets a short run forget its start; a long one is at `decay` soon. Validation,
    sample grids and the checkpoint's state_dict use the averaged weights.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"decay {decay} of the averaged weights lies outside 0 <= decay < 1")
        self.decay, self.skipped = decay, 0
        super().__init__(use_buffers=False, multi_avg_fn=self.average)

    def decay_after(self, updates: int) -> float:
        """The decay in force for the update after `updates` earlier ones."""
        return min(self.decay, (1 + updates) / (10 + updates))

    def average(self, averaged: Any, current: Any, updates: torch.Tensor | int) -> None:
        torch._foreach_lerp_(averaged, current, 1 - self.decay_after(int(updates)))

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """After optimizer steps, but for those that FiniteSteps skipped. step_idx: of the last one, from 0."""
        return step_idx is not None and step_idx + 1 != self.skipped

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        finite = next((callback for callback in trainer.callbacks if isinstance(callback, FiniteSteps)), None)  # type: ignore[attr-defined]  # untyped there
        self.skipped = finite.last if finite else 0
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # untyped there
        if every and trainer.global_step % every == 0:  # to ask the device for the number of updates takes time
            assert self._average_model is not None
            updates = int(self._average_model.n_averaged)
            pl_module.meter.latest["ema_decay"] = self.decay_after(max(0, updates - 1))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the raw weights in the module, so that a checkpoint written from here on holds both kinds."""


class SampleGrid(Callback):
    """At every validation, a picture of samples drawn with the averaged weights, on disk and in W&B where it logs.

    A base stage: one class a row. A super-resolution stage: the real low-resolution input, samples given it, and the
    truth, side by side; how well these samples keep to their input is logged (`val/channel_drift`,
    `val/low_pass_agreement`).

    Args:
        rows: Rows of the picture.
        columns: Samples a row.
        sampling_steps: Network calls per sample; few, since this is a look and not a measurement.
    """

    def __init__(self, rows: int = 10, columns: int = 6, sampling_steps: int = 25) -> None:
        self.rows, self.columns, self.sampling_steps = rows, columns, sampling_steps

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx or trainer.sanity_checking or not trainer.is_global_zero:
            return  # one picture per validation, while Lightning has the averaged weights in the module
        diffusion, steps = pl_module.diffusion, pl_module.diffusion.sampling_steps
        diffusion.sampling_steps = min(self.sampling_steps, diffusion.timesteps)
        try:
            pictures = self.draw(pl_module, batch)
        finally:
            diffusion.sampling_steps = steps
        if isinstance(pl_module, SuperResolutionStage):
            low_res = torch.stack([row[0] for row in pictures for _ in row[1:-1]])
            samples = torch.stack([sample for row in pictures for sample in row[1:-1]])
            figures = adherence(samples, low_res)
            pl_module.log_dict(figures, on_epoch=True, rank_zero_only=True, batch_size=len(samples))
        path = Path(trainer.default_root_dir) / "grids" / f"step_{trainer.global_step:07d}.png"
        save_grid(pictures, path, cell=max(64, pl_module.resolution))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [str(path)], step=trainer.global_step)

    @torch.no_grad()
    def draw(self, stage: DiffusionStage, batch: Any) -> list[list[torch.Tensor]]:
        """Rows of uint8 (C, H, W) images; the same draws at every validation, so that grids can be compared."""
        image, label, _ = (part[: self.rows] for part in batch)
        columns = self.columns
        if isinstance(stage, SuperResolutionStage):
            generator = generators(range(len(image) * columns), image.device, stage.seed, "grid")
            low_res = stage.low_res_of(image)
            samples = stage.sample(
                label.repeat_interleave(columns), low_res.repeat_interleave(columns, 0), 0, 0, generator
            )
            around = zip(low_res, image, strict=True)
        else:
            label = torch.arange(min(self.rows, stage.num_classes or self.rows), device=image.device)
            generator = generators(range(len(label) * columns), image.device, stage.seed, "grid")
            assert isinstance(stage, BaseStage)
            samples = stage.sample(label.repeat_interleave(columns), 0, generator)
            around = None
        rows = [list(row) for row in to_uint8(samples).split(columns)]
        if around is not None:
            rows = [[to_uint8(z), *row, to_uint8(x)] for (z, x), row in zip(around, rows, strict=True)]
        return rows


class LossCurve(Callback):
    """loss.png in the run's folder: training and validation loss against the optimizer step, from the CSV logs."""

    drawn = ("train/loss", "train/simple", "val/loss", "val/simple")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            self.plot(Path(trainer.default_root_dir))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.plot(Path(trainer.default_root_dir))

    def plot(self, folder: Path) -> None:
        """Draw what the logs of every start of this run hold; where they overlap, the newer start's."""
        curves: dict[str, dict[int, float]] = defaultdict(dict)
        for file in sorted(folder.glob("logs/version_*/metrics.csv"), key=lambda f: f.stat().st_mtime):
            with file.open() as lines:
                for row in csv.DictReader(lines):
                    for name, value in row.items():
                        if value and name in self.drawn:
                            curves[name][int(row["step"])] = float(value)
        if not curves:
            return
        figure = Figure(figsize=(7, 4))  # pyplot keeps every figure until it is told, and a run draws thousands
        axes = figure.subplots()
        for name, points in sorted(curves.items()):
            steps = sorted(points)
            steps = steps[:: -(-len(steps) // 2000)]  # more than the picture's pixels cannot be seen
            style = "o-" if name.startswith("val") else "-"
            axes.plot(steps, [points[s] for s in steps], style, label=name, linewidth=1, markersize=3)
        axes.set(xlabel="optimizer step", ylabel="loss", yscale="log", title=folder.name)
        axes.legend()
        figure.savefig(folder / "loss.partial.png", dpi=120, bbox_inches="tight")
        del figure, axes
        gc.collect()  # its parts hold one another, and among torch's many objects Python would wait long with it
        (folder / "loss.partial.png").replace(folder / "loss.png")
