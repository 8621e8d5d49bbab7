"""The callback that measures a stage while it trains: the Fréchet distance of a few of its samples to real images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from cdm_lightning.cascade import CascadeModule
from cdm_lightning.cascade.cascade import check_level, check_stages
from cdm_lightning.data import ShardDataModule
from cdm_lightning.diffusion import Diffusion, Sampler
from cdm_lightning.evaluation.detectors import features_of, load_detector
from cdm_lightning.evaluation.metrics.distance import FrechetDistanceTo, Moments
from cdm_lightning.evaluation.metrics.measure import log_key
from cdm_lightning.evaluation.real_images import first_images, real_images_for_labels
from cdm_lightning.evaluation.references.cards import read_card
from cdm_lightning.evaluation.samples import check_manifest
from cdm_lightning.foundation.class_names import NO_CLASSES
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import to_float, to_uint8
from cdm_lightning.foundation.randomness import KeyedStreams
from cdm_lightning.stages import DiffusionStage, SuperResolutionStage


class StageDistance(L.Callback):
    """Logs d^2 = ||mu_r - mu_g||^2 + Tr(S_r + S_g - 2 (S_r S_g)^(1/2)) of samples g of a stage to a card r in training.

    Measured with the averaged weights at the first validation and at every n-th after it. Logged as `val/fid`, or as
    `val/fd_<detector>` if the detector is not the canonical one. A super-resolution stage has one distance on real
    low-resolution images (`..._real`) and, if a bundle is given, one on samples of its lower stages
    (`..._generated`). The real ones are of the training images: with a card of these, that distance is too small.

    Image i has class i mod num_classes and the noise of image i in `cdm sample` (without a bundle: of a second stage),
    at each validation and on any number of processes. Few images make every distance larger, and few network calls make
    other images: the values compare with values of the same arguments only.

    At a validation without a measurement, callbacks find the value inf, so that no checkpoint is chosen by an old one;
    the log has no value there. EarlyStopping then takes `check_finite: false`.

    Args:
        reference: A card that `cdm reference` wrote, of images of the stage's resolution.
        detector: Name of the card's detector, or the path of its file; null for the name that the card states.
        n: Number of samples.
        every_n_validations: Measure at one validation out of so many.
        bundle: A bundle with the stages below a super-resolution stage; other stages in it are not used. Their samples
            are drawn once, with the bundle's levels.
        level: s of a super-resolution stage, on real and generated input alike.
        sampler: ddpm, ddim or dpm++, for all stages.
        sampling_steps: Network calls per image, for all stages.
        batch_size: Images per network call.
    """

    def __init__(
        self,
        reference: Path,
        detector: str | None = None,
        n: int = 500,
        every_n_validations: int = 1,
        bundle: Path | None = None,
        level: int = 0,
        sampler: Sampler = "dpm++",
        sampling_steps: int = 10,
        batch_size: int = 50,
    ) -> None:
        counts = {"every_n_validations": every_n_validations, "sampling_steps": sampling_steps}
        for name, value in {"n": n, **counts, "batch_size": batch_size}.items():
            if value < 1:
                raise InputError(f"{name} {value} of StageDistance is less than 1")
        self.card = read_card(reference)
        self.detector = load_detector(detector or self.card.detector)
        self.n, self.every_n_validations, self.bundle, self.level = n, every_n_validations, bundle, level
        self.sampler: Sampler = sampler
        self.sampling_steps, self.batch_size = sampling_steps, batch_size
        self.validations = 0  # of this run, over all its starts
        self.checked: Any = None  # the stage that was looked at

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if stage not in ("fit", "validate"):
            return
        if self.checked is not pl_module:
            self.check_before_start(trainer, pl_module, trainer.datamodule, stage)  # type: ignore[attr-defined]  # set by a connector
        self.checked = None  # what was read is used once
        self.index = torch.arange(trainer.global_rank, self.n, trainer.world_size)  # what this process draws
        self.inputs: dict[str, torch.Tensor | None] = {self.key: None}  # a base takes none, low_res uint8 (B, C, r, r)
        if self.real is not None:
            self.inputs = {f"{self.key}_real": self.real[self.index]}
            if self.lower is not None:
                self.inputs[f"{self.key}_generated"] = None

    def check_before_start(self, trainer: L.Trainer, pl_module: Any, data: Any, stage: str) -> None:
        """Refuse what does not fit the stage, and read the real input, before the training begins."""
        if stage not in ("fit", "validate"):
            return
        if not (isinstance(pl_module, DiffusionStage) and isinstance(data, ShardDataModule)):
            given = f"{type(pl_module).__name__} with {type(data).__name__}"
            raise InputError(f"StageDistance measures a stage that trains with ShardDataModule, not {given}")
        if self.n < max(2, trainer.world_size):
            raise InputError(f"n {self.n} is too small: a distance takes 2 images, and each process draws one")
        classes, label = pl_module.num_classes, torch.arange(self.n) % (pl_module.num_classes or 1)
        _, images = data.find("val", pl_module)
        samples = replace(
            images, resolution=pl_module.resolution, classes=images.classes if classes else NO_CLASSES,
            counts=label.bincount(minlength=classes or 1).tolist(),
        )  # fmt: skip
        check_manifest(self.card, self.detector, samples)
        with few_calls(pl_module.diffusion, self.sampler, self.sampling_steps):
            pl_module.diffusion.sampling_grid(0)  # refuses steps without a grid
        self.distance_to, self.key = FrechetDistanceTo(self.card.moments), f"val/{log_key('fd', self.detector)}"
        self.real: torch.Tensor | None = None  # low_res of a super-resolution stage
        self.lower: CascadeModule | None = None
        self.number = 0  # of the stage in its cascade, as the draws of `cdm sample` count them
        if isinstance(pl_module, SuperResolutionStage):
            check_level(pl_module, self.level)
            where = (data.roots["train"], "train", pl_module.low_resolution)
            self.real = first_images(self.n, *where) if classes is None else real_images_for_labels(label, *where)
            self.number = 1
            if self.bundle is not None:
                self.lower = self.stages_below(pl_module, self.bundle)
                if classes is not None:
                    data.check_classes(self.lower.origin["classes"], f"bundle {self.bundle}", pl_module)
                self.number = len(self.lower.stages)
        elif self.bundle is not None or self.level:
            raise InputError(f"bundle {self.bundle} and level {self.level} are not for {pl_module.name}, a base stage")
        self.checked = pl_module

    def stages_below(self, stage: SuperResolutionStage, bundle: Path) -> CascadeModule:
        """The cascade of the bundle's stages below this one. Refuses a bundle that lacks them or has others."""
        whole = CascadeModule(bundle)
        below = [lower for lower in whole.stages if lower.resolution < stage.resolution]
        try:
            check_stages([*below, stage])
        except InputError as error:
            raise InputError(f"bundle {bundle} does not fit: {error}") from error
        lower = CascadeModule.from_stages(below, stage.seed)
        lower.origin = whole.origin
        lower.set_levels(whole.levels[: len(below) - 1], whole.truncated)
        lower.set_sampler(self.sampler, [min(self.sampling_steps, each.diffusion.timesteps) for each in below])
        return lower

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Measure and log, where a measurement is due; elsewhere, give callbacks the value inf."""
        if batch_idx or trainer.sanity_checking:
            return  # once per validation; here, because the module now holds the averaged weights
        fitting = trainer.state.fn == TrainerFn.FITTING
        due = not fitting or self.validations % self.every_n_validations == 0
        self.validations += fitting
        if not due:
            trainer.callback_metrics.update(dict.fromkeys(self.inputs, torch.tensor(math.inf)))
            return
        self.detector.to(pl_module.device)
        self.draw_low_res(pl_module)
        with few_calls(pl_module.diffusion, self.sampler, self.sampling_steps):
            features = {name: self.features(pl_module, low_res) for name, low_res in self.inputs.items()}
        parts: list[Any] = [features] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(parts, features)
        values = {name: self.distance_to(Moments.from_features(part[name] for part in parts)) for name in self.inputs}
        pl_module.log_dict(values, on_epoch=True, sync_dist=True, batch_size=1)

    def draw_low_res(self, stage: DiffusionStage) -> None:
        """Draw the generated input, once per start of a run; the lower stages then leave the memory."""
        if self.lower is not None:
            lower, parts = self.lower.to(stage.device), self.index.split(self.batch_size)
            drawn = [lower.sample((i % (lower.num_classes or 1)).to(stage.device), i)[-1] for i in parts]
            self.inputs[f"{self.key}_generated"] = to_uint8(torch.cat(drawn)).cpu()
            self.lower = None

    @torch.no_grad()
    def features(self, stage: Any, low_res: torch.Tensor | None) -> torch.Tensor:
        """The detector's features of the samples that this process draws, float32 (B, d)."""
        features = []
        for first in range(0, len(self.index), self.batch_size):
            part = slice(first, first + self.batch_size)
            index, device = self.index[part], stage.device
            label = (index % (stage.num_classes or 1)).to(device)
            streams = KeyedStreams(index, device, stage.seed, "sample", self.number)
            if low_res is None:
                image = stage.sample(label, 0, streams)
            else:
                z = stage.augment(to_float(low_res[part].to(device)), self.level, streams)
                image = stage.sample(label, z, self.level, 0, streams)
            features.append(features_of(self.detector, to_uint8(image)).cpu())
        return torch.cat(features)

    def state_dict(self) -> dict[str, int]:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.validations = state_dict["validations"]


@contextmanager
def few_calls(diffusion: Diffusion, sampler: Sampler, steps: int) -> Iterator[None]:
    """Sample with another sampler and with `steps` network calls, at most T; the stage's own settings come back."""
    before = diffusion.sampler, diffusion.sampling_steps
    diffusion.sampler, diffusion.sampling_steps = sampler, min(steps, diffusion.timesteps)
    try:
        yield
    finally:
        diffusion.sampler, diffusion.sampling_steps = before
