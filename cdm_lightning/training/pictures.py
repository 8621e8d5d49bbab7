"""Pictures of a training: grids of samples with how well they keep to their input, and the loss curve."""

from __future__ import annotations

import csv
import gc
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure

from cdm_lightning.foundation.images import downscale, save_grid, to_uint8
from cdm_lightning.foundation.randomness import generators
from cdm_lightning.stages import BaseStage, DiffusionStage, SuperResolutionStage


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


def channel_drift(samples: torch.Tensor, low_res: torch.Tensor) -> torch.Tensor:
    """|mean over pixels of a sample - mean over pixels of its input|, float64 (B, C), in units of [-1, 1].

    samples: uint8 (B, C, R, R). low_res: uint8 (B, C, r, r). A drift of 2 leads from black to white. For the true image
    only rounding is left: less than half a grey level per halving, 0.004, and far less where many pixels average it.
    """
    means = (image.double().mean((2, 3)) / 127.5 for image in (samples, low_res))
    return (next(means) - next(means)).abs()


def low_pass_agreement(samples: torch.Tensor, low_res: torch.Tensor) -> float:
    """PSNR in dB between samples brought down to the low resolution and their input, as the stage's training does it.

    10 log10(255^2 / MSE) over all images, pixels and channels, uint8 as in `channel_drift`. The MSE is taken to be at
    least 1/12, the variance of rounding to a grey level: the true image gets 58.9 dB, and nothing gets more.
    """
    difference = downscale(samples, low_res.shape[-1]).double() - low_res.double()
    return float(10 * torch.log10(255**2 / difference.square().mean().clamp(min=1 / 12)))


def adherence(samples: torch.Tensor, low_res: torch.Tensor) -> dict[str, float]:
    """Both figures as a validation logs them; the drift also channel by channel where there are several."""
    drift = channel_drift(samples, low_res).mean(0)
    each = {f"val/channel_drift_{number}": float(value) for number, value in enumerate(drift)} if len(drift) > 1 else {}
    return {
        "val/channel_drift": float(drift.mean()),
        **each,
        "val/low_pass_agreement": low_pass_agreement(samples, low_res),
    }
