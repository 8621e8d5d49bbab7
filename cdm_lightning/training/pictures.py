"""Pictures during training: sample grids, with metrics of agreement with the low-resolution input, and loss curves."""

from __future__ import annotations

import csv
import gc
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import downscale, save_grid, to_uint8
from cdm_lightning.foundation.randomness import KeyedStreams
from cdm_lightning.stages import BaseStage, DiffusionStage, SuperResolutionStage


class SampleGrid(Callback):
    """At every validation, saves a grid of samples drawn with the averaged weights: as grids/*.png, and in W&B.

    For a base stage, every row shows one class. For a super-resolution stage, every row shows a real low-resolution
    image, samples conditioned on it, and the real image. How well these samples agree with their input is logged as
    `val/channel_drift` and `val/low_pass_agreement`.

    Args:
        rows: Rows of the grid.
        columns: Samples per row.
        sampling_steps: Network calls per sample. A few are enough to watch the progress of a training.
    """

    def __init__(self, rows: int = 10, columns: int = 6, sampling_steps: int = 25) -> None:
        for name, value in {"rows": rows, "columns": columns, "sampling_steps": sampling_steps}.items():
            if value < 1:
                raise InputError(f"{name} {value} of the sample grid is less than 1")
        self.rows, self.columns, self.sampling_steps = rows, columns, sampling_steps

    def check_before_start(self, trainer: L.Trainer, module: Any, data: Any, stage: str) -> None:
        """Refuse steps that the stage's sampler cannot take, before the training and not at its first validation."""
        if isinstance(module, DiffusionStage):
            with self.few_steps(module):
                module.diffusion.sampling_grid(0)

    @contextmanager
    def few_steps(self, stage: DiffusionStage) -> Iterator[None]:
        """Sample with the grid's number of network calls, at most T; the stage's own comes back."""
        diffusion, steps = stage.diffusion, stage.diffusion.sampling_steps
        diffusion.sampling_steps = min(self.sampling_steps, diffusion.timesteps)
        try:
            yield
        finally:
            diffusion.sampling_steps = steps

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx or trainer.sanity_checking or not trainer.is_global_zero:
            return  # one picture per validation; it is drawn here because the module now holds the averaged weights
        with self.few_steps(pl_module):
            pictures = self.draw(pl_module, batch)
        if isinstance(pl_module, SuperResolutionStage):
            low_res = torch.stack([row[0] for row in pictures for _ in row[1:-1]])
            samples = torch.stack([sample for row in pictures for sample in row[1:-1]])
            metrics = input_agreement(samples, low_res)
            pl_module.log_dict(metrics, on_epoch=True, rank_zero_only=True, batch_size=len(samples))
        path = Path(trainer.default_root_dir) / "grids" / f"step_{trainer.global_step:07d}.png"
        save_grid(pictures, path, cell=max(64, pl_module.resolution))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [str(path)], step=trainer.global_step)

    @torch.no_grad()
    def draw(self, stage: DiffusionStage, batch: Any) -> list[list[torch.Tensor]]:
        """Rows of uint8 (C, H, W) images. Every validation uses the same noise, so that grids can be compared."""
        image, label, _ = (part[: self.rows] for part in batch)
        columns = self.columns
        if isinstance(stage, SuperResolutionStage):
            streams = KeyedStreams(range(len(image) * columns), image.device, stage.seed, "grid")
            low_res = stage.low_res_of(image)
            repeated = (label.repeat_interleave(columns), low_res.repeat_interleave(columns, 0))
            samples = stage.sample_at_least_level(*repeated, streams)
            inputs_and_truth = zip(low_res, image, strict=True)
        else:
            label = torch.arange(min(self.rows, stage.num_classes or self.rows), device=image.device)
            streams = KeyedStreams(range(len(label) * columns), image.device, stage.seed, "grid")
            assert isinstance(stage, BaseStage)
            samples = stage.sample(label.repeat_interleave(columns), 0, streams)
            inputs_and_truth = None
        rows = [list(row) for row in to_uint8(samples).split(columns)]
        if inputs_and_truth is not None:
            rows = [[to_uint8(z), *row, to_uint8(x)] for (z, x), row in zip(inputs_and_truth, rows, strict=True)]
        return rows


class LossCurve(Callback):
    """Plots training and validation loss over optimizer steps from the CSV logs, as loss.png in the run's folder.

    A second panel shows the Fréchet distances, if the run logs any, and a low one the learning rate.
    """

    panels = {  # noqa: RUF012, read only: quantity -> the names of its metrics, and the panel's height
        "loss": (r"(train|val)/(loss|simple)", 4),
        "Fréchet distance": (r"val/(fid|fd_).*", 4),
        "learning rate": (r"train/lr", 1),
    }

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            self.plot(Path(trainer.default_root_dir))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.plot(Path(trainer.default_root_dir))

    def plot(self, folder: Path) -> None:
        """Plot the logs of all starts of this run. Where they overlap, the newer log counts."""
        curves: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
        for file in sorted(folder.glob("logs/version_*/metrics.csv"), key=lambda f: f.stat().st_mtime):
            with file.open() as lines:
                for row in csv.DictReader(lines):
                    for name, value in row.items():
                        quantity = self.quantity(name)
                        if value and quantity:
                            curves[quantity][name][int(row["step"])] = float(value)
        if not curves:
            return
        shown = [(quantity, height) for quantity, (_, height) in self.panels.items() if quantity in curves]
        heights = [height for _, height in shown]
        figure = Figure(figsize=(7, sum(heights)))  # not pyplot, which would keep every figure in memory
        axes = figure.subplots(len(shown), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for panel, (quantity, height) in zip(axes, shown, strict=True):
            for name, points in sorted(curves[quantity].items()):
                steps = sorted(points)
                steps = steps[:: -(-len(steps) // 2000)]  # more points than pixels cannot be seen
                style = "o-" if name.startswith("val") else "-"
                panel.plot(steps, [points[s] for s in steps], style, label=name, linewidth=1, markersize=3)
            panel.set(ylabel=quantity, yscale="log" if height > 1 else "linear")
            if height > 1:
                panel.legend()
        axes[0].set_title(folder.name)
        axes[-1].set_xlabel("optimizer step")
        figure.savefig(folder / "loss.partial.png", dpi=120, bbox_inches="tight")
        del figure, axes
        gc.collect()  # a figure is full of reference cycles, and Python alone would free it much later
        (folder / "loss.partial.png").replace(folder / "loss.png")

    def quantity(self, metric: str) -> str | None:
        """The panel that shows a metric; None if none does."""
        return next((quantity for quantity, (names, _) in self.panels.items() if re.fullmatch(names, metric)), None)


def channel_drift(samples: torch.Tensor, low_res: torch.Tensor) -> torch.Tensor:
    """|mean over pixels of a sample - mean over pixels of its input|, float64 (B, C), on the scale of [-1, 1].

    samples: uint8 (B, C, R, R). low_res: uint8 (B, C, r, r). 2 is the difference between black and white. For the true
    image only rounding remains: less than half a grey level, 0.004, per halving, and far less over many pixels.
    """
    means = (image.double().mean((2, 3)) / 127.5 for image in (samples, low_res))
    return (next(means) - next(means)).abs()


def low_pass_agreement(samples: torch.Tensor, low_res: torch.Tensor) -> float:
    """PSNR in dB between samples, downscaled as in training, and their low-resolution input.

    10 log10(255^2 / MSE) over all images, pixels and channels, uint8 as in `channel_drift`. The MSE counts as at least
    1/12, the variance of rounding to a grey level, so that the true image gets the maximum of 58.9 dB.
    """
    difference = downscale(samples, low_res.shape[-1]).double() - low_res.double()
    return float(10 * torch.log10(255**2 / difference.square().mean().clamp(min=1 / 12)))


def input_agreement(samples: torch.Tensor, low_res: torch.Tensor) -> dict[str, float]:
    """Both metrics under their logged names, averaged over images; the drift also per channel if there are several."""
    drift = channel_drift(samples, low_res).mean(0)
    each = {f"val/channel_drift_{number}": float(value) for number, value in enumerate(drift)} if len(drift) > 1 else {}
    return {
        "val/channel_drift": float(drift.mean()),
        **each,
        "val/low_pass_agreement": low_pass_agreement(samples, low_res),
    }
