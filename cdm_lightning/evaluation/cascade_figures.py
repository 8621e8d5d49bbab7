"""The figures of a cascade in `cdm test`: the same numbers that `cdm evaluate` gives for the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from cdm_lightning.evaluation.detectors import features_of, load_detector
from cdm_lightning.evaluation.metrics.measure import log_key, measure_all
from cdm_lightning.evaluation.references.cards import card_summaries, read_card
from cdm_lightning.evaluation.report.report import write_test
from cdm_lightning.evaluation.samples import check_counts, check_images
from cdm_lightning.foundation.errors import InputError

SHOWN = 20  # samples of the first batch, on the page


class CascadeFigures(L.Callback):
    """Measures the samples of a cascade's test against reference cards, and logs every figure.

    `test/fid`, `test/kid`, ... with the canonical detector, else `test/fd_<detector>`, ... are figures against the
    first card; the same names with `_train` or `_val` behind them belong to the card of that split, with the name of
    its file behind them where that alone tells cards apart; `test/n` counts the images. Leaves results.json and
    report.html in the run's folder. The detector lives here, not in the module. Every process works on its own images,
    each dealt out once, and their features are gathered and put in order, so that the number of processes changes
    nothing but the rounding of another micro-batch.

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
            check_images(card, self.detector, pl_module.resolution, pl_module.image_channels, **pl_module.origin)
        self.detector.to(pl_module.device)
        self.found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the features of a batch, and the first batch's images for the page."""
        features = features_of(self.detector, outputs["generated"])
        if not batch_idx:
            pairs = zip(outputs["index"].tolist(), outputs["generated"].cpu(), strict=True)
            self.shown = [(self.called(pl_module, index), [image]) for index, image in pairs][:SHOWN]
        self.found.append((outputs["index"].cpu(), features.cpu()))

    def called(self, pl_module: Any, index: int) -> str:
        """The class of an image by its name, as far as the cascade or the first card knows it."""
        if pl_module.num_classes is None:
            return f"image {index}"
        label = index % pl_module.num_classes
        named = pl_module.origin["classes"] or self.cards[0].classes
        return named[label] if named and label < len(named) else str(label)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Gather the features of all processes in the order of their indices, measure, log and write the page."""
        index, features = (torch.cat(part) for part in zip(*self.found, strict=True))
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
            name = f"test/{log_key(figure, self.detector)}"
            logged.setdefault(name, figure.value)
            logged[f"{name}_{figure.against}"] = figure.value
        pl_module.log_dict(logged, rank_zero_only=False)
        if trainer.is_global_zero:
            detector = {"name": self.detector.name, "sha256": self.detector.sha256}
            about = {"detector": detector, "seed": self.seed, "references": card_summaries(self.cards)}
            write_test(Path(trainer.default_root_dir), figures, about, self.shown)
