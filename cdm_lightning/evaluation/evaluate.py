"""`cdm evaluate`: measure stored samples against reference cards, and write a report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt

from cdm_lightning.data.shards import Manifest
from cdm_lightning.evaluation.detectors import Detector, load_detector, load_head
from cdm_lightning.evaluation.metrics.measurements import Figure
from cdm_lightning.evaluation.references.cards import ReferenceCard, card_summaries, read_card
from cdm_lightning.evaluation.report.memorisation import card_to_search, real_folder
from cdm_lightning.evaluation.report.results import print_figures, read_cas
from cdm_lightning.evaluation.samples import check_manifest, sample_folders
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import check_output_folder
from cdm_lightning.foundation.process_group import Accelerator, first_process, wait_for_all


def evaluate(
    samples: list[Path],
    references: list[Path],
    out: Path,
    detector: str | None = None,
    resolution: PositiveInt | None = None,
    head: Path | None = None,
    real: Path | None = None,
    cas: Path | None = None,
    trust_detector: bool = False,
    batch_size: PositiveInt = 50,
    seed: int = 0,
    devices: PositiveInt = 1,
    accelerator: Accelerator = "auto",
) -> dict[str, Any]:
    """Measure stored samples as the paper does: FID, KID, precision and recall against each reference, and the IS.

    Writes results.json and report.html, and prints a table. If it is stopped, the same command continues. The figures
    do not depend on the number of processes.

    Args:
        samples: Folders written by `cdm sample`; three or more with different seeds give error bars.
        references: Cards written by `cdm reference`, such as one of the training and one of the validation images.
        out: Folder for results.json, report.html and the features.
        detector: Name of a detector, or the path of its file; null for that of the first card.
        resolution: The stored resolution to measure; null for that of the first card.
        head: torch-fidelity's pt_inception-2015-12-05-6726825d.pth, for the classifier of the Inception Score; null
            skips the score.
        real: Root of the shards behind a card, to show the real images nearest to samples; null skips this.
        cas: results.json of `cdm cas`, to show with the other figures.
        trust_detector: Allow a TorchScript that is not the canonical Inception; it is run as a program.
        batch_size: Images per detector call, in each process.
        seed: Seed of the subsets of the kernel distance and of the splits of the score.
        devices: Number of processes.
        accelerator: cpu, gpu or auto.
    """
    if not references:
        raise InputError("references [] names no card, which `cdm reference` writes")
    from cdm_lightning.evaluation.metrics.features import extract_features, read_features
    from cdm_lightning.evaluation.metrics.measure import check_score, inception_score, measure_all
    from cdm_lightning.evaluation.report.evaluation_pages import write_evaluation

    check_output_folder(out)
    network = load_detector(detector or read_card(references[0]).detector, trust_detector)
    cards = [read_card(path, network) for path in references]
    folders, manifests = sample_folders(samples, resolution or cards[0].resolution)
    for card in cards:
        check_manifest(card, network, manifests[0])
    if head is not None:
        check_score(network, manifests[0].count)
        network.head = load_head(head)  # type: ignore[attr-defined]  # an Inception, as was checked
    score = None if cas is None else read_cas(cas, manifests)
    if real is not None and card_to_search(cards).features is not None:
        real_folder(card_to_search(cards), real)
    # All input is checked: from here on time is spent.
    places = [Path(out) / "features" / str(number) for number in range(len(folders))]
    for folder, place in zip(folders, places, strict=True):
        extract_features(folder.parents[1], "train", int(folder.name), network, place, devices, accelerator, batch_size)
    if not first_process():
        wait_for_all()
        return {}
    features = [torch.cat([f for f, _ in read_features(*pair)]) for pair in zip(places, manifests, strict=True)]
    figures = measure_all(features, cards, network, seed)
    if head is not None:
        figures.append(inception_score(features, network, seed))
    print_figures(figures)
    measured = Evaluation(figures, network, cards, manifests, folders, features, seed)
    results = write_evaluation(Path(out), measured, real, score)
    wait_for_all()
    return results


@dataclass(frozen=True)
class Evaluation:
    """The figures, and what they were measured on: everything that a report shows."""

    figures: list[Figure]
    detector: Detector
    cards: list[ReferenceCard]
    manifests: list[Manifest]
    folders: list[Path]  # of the samples, .../train/<resolution>
    features: list[torch.Tensor]
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """The part that goes into results.json."""
        return {
            "figures": [asdict(figure) for figure in self.figures],
            "detector": {"name": self.detector.name, "sha256": self.detector.sha256},
            "references": card_summaries(self.cards),
            "samples": [manifest.extra.get("samples") for manifest in self.manifests],
            "resolution": self.manifests[0].resolution,
            "seed": self.seed,
        }
