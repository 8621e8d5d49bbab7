"""The callback that measures a cascade in `cdm test`, with the same figures as `cdm evaluate` for equal samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from cdm_lightning.evaluation.detectors import features_of, load_detector
from cdm_lightning.evaluation.metrics.measure import log_key, measure_all
from cdm_lightning.evaluation.references.cards import card_summaries, read_card
from cdm_lightning.evaluation.report.evaluation_pages import write_test
from cdm_lightning.evaluation.samples import check_counts, check_images
from cdm_lightning.foundation.errors import InputError

SHOWN = 20  # samples of the first batch, shown in the report


class CascadeFigures(L.Callback):
    """Measures the samples of a cascade against reference cards in `cdm test`, and logs every figure.

    Figures against the first card are logged as `test/fid`, `test/kid`, ..., or `test/fd_<detector>`, ... if the
    detector is not the canonical one. Each figure is also logged with the name of its card: `_train`, `_val`, or the
    name of the card's file. `test/n` is the number of images. Writes results.json and report.html to the run's folder.

    Every process measures its own images, and the features are gathered and sorted by index. The number of processes
    changes the figures only by the float error of another batch size.

    Args:
        references: Cards written by `cdm reference`.
        detector: Name of a detector, or the path of its file; null for that of the first card.
        seed: Seed of the subsets of the kernel distance.
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
            check_images(card, self.detector, pl_module.resolution, pl_module.image_channels, **pl_module.origin)
        self.detector.to(pl_module.device)
        self.measured: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the features of a batch, and the images of the first batch for the report."""
        features = features_of(self.detector, outputs["generated"])
        if not batch_idx:
            pairs = zip(outputs["index"].tolist(), outputs["generated"].cpu(), strict=True)
            self.shown = [(self.class_name(pl_module, index), [image]) for index, image in pairs][:SHOWN]
        self.measured.append((outputs["index"].cpu(), features.cpu()))

    def class_name(self, pl_module: Any, index: int) -> str:
        """The class name of an image, or its number if neither the cascade nor the first card knows the name."""
        if pl_module.num_classes is None:
            return f"image {index}"
        label = index % pl_module.num_classes
        names = pl_module.origin["classes"] or self.cards[0].classes
        return names[label] if names and label < len(names) else str(label)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Gather the features of all processes in order of their indices; measure, log and write the report."""
        index, features = (torch.cat(part) for part in zip(*self.measured, strict=True))
        if torch.distributed.is_initialized():
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, (index, features))
            index, features = (torch.cat(part) for part in zip(*parts, strict=True))
        features = features[index.argsort()]
        classes = pl_module.num_classes
        counts = None if classes is None else (index % classes).bincount(minlength=classes).tolist()
        for card in self.cards:
            check_counts(card, counts)
        logged = {"test/n": float(len(features))}
        figures = measure_all([features], self.cards, self.detector, self.seed)
        for figure in figures:
            name = f"test/{log_key(figure.key, self.detector)}"
            logged.setdefault(name, figure.value)
            logged[f"{name}_{figure.against}"] = figure.value
        pl_module.log_dict(logged, rank_zero_only=False)
        if trainer.is_global_zero:
            detector = {"name": self.detector.name, "sha256": self.detector.sha256}
            metadata = {"detector": detector, "seed": self.seed, "references": card_summaries(self.cards)}
            write_test(Path(trainer.default_root_dir), figures, metadata, self.shown)
