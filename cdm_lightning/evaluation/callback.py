"""The figures of a cascade in `cdm test`: the same numbers that `cdm evaluate` gives for the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from cdm_lightning import InputError
from cdm_lightning.evaluation.cards import check_card, read_card
from cdm_lightning.evaluation.detectors import load_detector
from cdm_lightning.evaluation.evaluate import check_counts
from cdm_lightning.evaluation.features import features_of
from cdm_lightning.evaluation.measure import log_key, measure
from cdm_lightning.evaluation.report import write_test

SHOWN = 20  # samples of the first batch, on the page


class CascadeFigures(L.Callback):
    """Measures the samples of a cascade's test against reference cards, and logs every figure.

    `test/fid`, `test/kid`, ... with the canonical detector, else `test/fd_<detector>`, ... are figures against the
    first card; the same names with `_train` or `_val` behind them belong to the card of that split; `test/n` counts the
    images. Leaves results.json and report.html in the run's folder. The detector lives here, not in the module. Every
    process works on its own images, each dealt out once, and their features are gathered and put in order, so that the
    number of processes changes nothing but the rounding of another micro-batch.

    Args:
        references: Cards written by `cdm reference`.
        detector: Name of a detector, or the path of its file; null for the first card's.
        seed: Draws the subsets of the kernel distance.
    """

    def __init__(self, references: list[Path], detector: str | None = None, seed: int = 0) -> None:
        if not references:
            raise InputError("references [] names no card, which `cdm reference` writes")
        self.detector, self.seed = load_detector(detector or read_card(references[0]).detector), seed
        self.cards = [read_card(path, self.detector) for path in references]

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not hasattr(pl_module, "stages"):
            raise InputError(f"CascadeFigures belongs to the test of a cascade: {type(pl_module).__name__} is none")
        for card in self.cards:
            check_card(card, self.detector, pl_module.resolution, pl_module.image_channels, None, None, None)
        self.detector.to(pl_module.device)
        self.found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the features of a batch, and the first batch's images for the page."""
        features = features_of(self.detector, outputs["generated"])
        if not batch_idx:
            classes = (outputs["index"] % (pl_module.num_classes or 1)).tolist()
            named = self.cards[0].classes or [str(c) for c in range(max(classes) + 1)]
            pairs = zip(classes, outputs["generated"].cpu(), strict=True)
            self.shown = [(named[c], [image]) for c, image in pairs][:SHOWN]
        self.found.append((outputs["index"].cpu(), features.cpu()))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Gather the features of all processes in the order of their indices, measure, log and write the page."""
        index, features = (torch.cat(part) for part in zip(*self.found, strict=True))
        if torch.distributed.is_initialized():
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, (index, features))
            index, features = (torch.cat(part) for part in zip(*parts, strict=True))
        features = features[index.argsort()]
        classes = pl_module.num_classes or 1
        for card in self.cards:
            check_counts(card, (index % classes).bincount(minlength=classes).tolist())
        logged, figures = {"test/n": float(len(features))}, []
        for card in self.cards:
            for figure in measure([features], card, self.detector, self.seed):
                figures.append(figure)
                name = f"test/{log_key(figure, self.detector)}"
                logged.setdefault(name, figure.value)
                logged[f"{name}_{card.split}"] = figure.value
        pl_module.log_dict(logged, rank_zero_only=False)
        if trainer.is_global_zero:
            detector = {"name": self.detector.name, "sha256": self.detector.sha256}
            about = {"detector": detector, "seed": self.seed, "references": [card.about() for card in self.cards]}
            write_test(Path(trainer.default_root_dir), figures, about, self.shown)
