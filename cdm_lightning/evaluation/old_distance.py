"""The Fréchet distance between real and generated images, from torchmetrics, on the features of a detector of ours.

"FID" is the name of this distance on the canonical Inception network alone; on any other detector it is written
"Fréchet distance (<detector>)", and its values compare with those of the same detector only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from cdm_lightning import InputError
from cdm_lightning.evaluation.detectors import Detector, load_detector


def frechet_metric(detector: Detector) -> FrechetInceptionDistance:
    """d^2 = ||mu_r - mu_g||^2 + Tr(S_r + S_g - 2 (S_r S_g)^(1/2)), summed in float64, summed over processes too.

    Its reset() forgets the generated images and keeps the real ones, so that one reference serves many sets.
    """
    return FrechetInceptionDistance(feature=detector, reset_real_features=False)


@torch.no_grad()
def add_images(metric: FrechetInceptionDistance, image: torch.Tensor, real: bool) -> None:
    """Add uint8 images (B, C, H, W), real or generated ones, to the metric; features stay float32 under autocast."""
    with torch.autocast(image.device.type, enabled=False):
        metric.update(image, real=real)


def frechet_distance(metric: FrechetInceptionDistance, n_real: int, n: int) -> float:
    """The distance between what was added, >= 0 up to rounding; n_real and n count the images over all processes."""
    if min(n_real, n) < 2:
        raise InputError(f"a Fréchet distance takes 2 images or more on each side, not {n_real} real and {n} generated")
    return float(metric.compute())


class FrechetDistance(L.Callback):
    """Logs the Fréchet distance of a cascade's test as `test/fd_<detector>`, and the number of images as `..._n`.

    Takes what CascadeModule.test_step returns: {"real", "generated"}, uint8 (B, C, R, R). The metric lives here, not in
    the module. Every process adds its own images and the sums are added up, so each image must be dealt out once.

    Args:
        detector: Name of a detector, or the path of its .safetensors file.
    """

    def __init__(self, detector: str | Path = "fashion-cnn-64") -> None:
        self.detector = load_detector(detector)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.metric = frechet_metric(self.detector).to(pl_module.device)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not isinstance(outputs, dict) or not {"real", "generated"} <= outputs.keys():
            maker = type(pl_module).__name__
            raise InputError(f"FrechetDistance belongs to the test of a cascade: {maker} makes no images")
        add_images(self.metric, outputs["real"], real=True)
        add_images(self.metric, outputs["generated"], real=False)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        counts = (self.metric.real_features_num_samples, self.metric.fake_features_num_samples)
        n_real, n = (int(trainer.strategy.reduce(count.clone(), reduce_op="sum")) for count in counts)
        name = f"test/fd_{self.detector.name}"
        distance = frechet_distance(self.metric, n_real, n)  # the same number in every process
        pl_module.log_dict({name: distance, f"{name}_n": float(n)}, rank_zero_only=False)
