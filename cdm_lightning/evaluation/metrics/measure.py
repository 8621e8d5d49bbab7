"""All metrics of generated images from their features: FID, KID, precision, recall, and the Inception Score."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import torch

from cdm_lightning.evaluation.detectors import Detector
from cdm_lightning.evaluation.metrics.distance import (
    FrechetDistanceTo,
    Moments,
    feature_passthrough,
    frechet_distance,
    kernel_distance,
)
from cdm_lightning.evaluation.metrics.manifold import precision_recall
from cdm_lightning.evaluation.metrics.measurements import Figure
from cdm_lightning.evaluation.references.cards import ENOUGH, ReferenceCard, bias_note, card_names
from cdm_lightning.foundation.errors import InputError

NAMES = {"fd": ("FID", "Fréchet distance"), "kd": ("KID", "kernel distance"), "is": ("Inception Score", "")}
KEYS = {"fd": "fid", "kd": "kid", "is": "inception_score"}
IS_SPLITS = 10


def name_of(key: str, detector: Detector) -> str:
    """The name of a figure. FID, KID and Inception Score are names for the canonical network only."""
    canonical, plain = NAMES.get(key, ("", key))
    return canonical if detector.canonical and canonical else f"{plain} ({detector.name})"


def log_key(key: str, detector: Detector) -> str:
    """The name of a figure in logs: `fid`, or `fd_<detector>` with another detector. key: that of the figure."""
    return KEYS.get(key, key) if detector.canonical else f"{key}_{detector.name}"


def measure(
    sets: Sequence[torch.Tensor],
    card: ReferenceCard,
    detector: Detector,
    seed: int = 0,
    quick: bool = False,
    against: str | None = None,
) -> list[Figure]:
    """Distances, precision and recall of generated images against one card, with their error bars.

    sets: features (n, d) of sets of samples with disjoint seeds, all of one size. The values are means over the sets.
    With three sets or more, the spread is the standard deviation over the sets. With fewer, only the kernel distance
    has a spread, over its subsets. seed: draws those subsets. quick: use FrechetDistanceTo instead of torchmetrics, and
    skip precision and recall. against: the name of the card, from `card_names` if there are several.
    """
    n = len(sets[0])
    if any(len(features) != n for features in sets):
        raise InputError(f"sets of {sorted({len(f) for f in sets})} images do not compare: n must be the same")
    moments = [Moments.from_features(features.split(1000)) for features in sets]
    distance = FrechetDistanceTo(card.moments) if quick else lambda generated: frechet_distance(card.moments, generated)
    values_of: dict[str, list[float]] = {"fd": [distance(m) for m in moments]}
    subsets: tuple[float | None, str] = (None, "")
    if card.features is not None:  # published statistics come without features
        kernel = [kernel_distance(card.features, features, seed) for features in sets]
        values_of["kd"] = [value for value, _, _ in kernel]
        subsets = (mean(deviation for _, deviation, _ in kernel), f"100 subsets of {kernel[0][2]}")
        if not quick:
            pairs = [precision_recall(card.features, features) for features in sets]
            values_of["precision"], values_of["recall"] = ([pair[i] for pair in pairs] for i in (0, 1))
    figures, card_name = [], against or card_names([card])[0]
    for key, values in values_of.items():
        spread = subsets if key == "kd" else (None, "")
        if len(values) >= 3:
            spread = (stdev(values), f"{len(values)} disjoint seeds")
        real = card.count or 0 if key == "fd" else len(card.places if card.places is not None else ())
        least, features = min(n, card.count or n), len(card.moments.total)
        singular = key == "fd" and least <= features
        note = bias_note(n) if key == "fd" else ""
        if singular:
            note = (
                f"NOT A RESULT: the covariance of {least:,} images is singular in {features:,} features; it takes more "
                f"than {features:,} images, and a distance that means something thousands"
            )
        figures.append(
            Figure(key, name_of(key, detector), mean(values), *spread, card_name, n, real, note, not singular)
        )
    return figures


def measure_all(
    sets: Sequence[torch.Tensor], cards: Sequence[ReferenceCard], detector: Detector, seed: int
) -> list[Figure]:
    """The figures of `measure` against each of several cards, which have different names."""
    named = zip(cards, card_names(cards), strict=True)
    return [figure for card, name in named for figure in measure(sets, card, detector, seed, against=name)]


def check_score(detector: Detector, n: int) -> None:
    """Refuse an Inception Score with another detector, or of too few images. Computes nothing."""
    if not detector.canonical:
        raise InputError(
            "the Inception Score takes the classifier head of the canonical Inception, "
            f"which makes nothing of the features of detector {detector.name}"
        )
    if n < IS_SPLITS:
        raise InputError(f"the Inception Score over {IS_SPLITS} splits takes {IS_SPLITS} images or more, not {n}")


def inception_score(sets: Sequence[torch.Tensor], detector: Any, seed: int = 0) -> Figure:
    """Inception Score, exp E KL(p(y|x) || p(y)), by torchmetrics over 10 splits, with the canonical classifier.

    Raises InputError if the detector has no classifier head.
    """
    n = len(sets[0])
    check_score(detector, n)
    if detector.head is None:
        raise InputError(
            f"the Inception Score takes the classifier head of the canonical Inception, which detector {detector.name} "
            "does not hold: give the path of pt_inception-2015-12-05-6726825d.pth as head"
        )
    from torchmetrics.image.inception import InceptionScore

    scores = []
    for features in sets:
        metric = InceptionScore(
            feature=feature_passthrough(len(detector.head)), splits=IS_SPLITS, sync_on_compute=False
        )
        metric.update(features.double() @ detector.head.double().T)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            scores.append([float(part) for part in metric.compute()])
    values = [score for score, _ in scores]
    spread = (stdev(values), f"{len(values)} disjoint seeds") if len(values) >= 3 else (scores[0][1], "10 splits")
    few = f"n = {n:,} is less than {ENOUGH:,}, which makes the score smaller: compare it at equal n only"
    return Figure("is", name_of("is", detector), mean(values), *spread, "", n, 0, few if n < ENOUGH else "")
