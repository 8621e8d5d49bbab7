"""The figures of sets of features: each equals an independent call, and says what its name and its spread are."""

from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
import torch

from cdm_lightning.evaluation.detectors import Detector
from cdm_lightning.evaluation.metrics.distance import Moments, frechet_distance, kernel_distance
from cdm_lightning.evaluation.metrics.manifold import precision_recall
from cdm_lightning.evaluation.metrics.measure import inception_score, log_key, measure
from cdm_lightning.evaluation.references.cards import ReferenceCard
from cdm_lightning.evaluation.report.figure_tables import figures_table
from cdm_lightning.evaluation.report.results import print_figures
from cdm_lightning.foundation.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:.*will save all extracted features")
N, KEPT, SEED = 40, 30, 5


class StandIn(Detector):
    """No network at all: a name, whether it is canonical, and a classifier's head of 7 classes."""

    num_features = 8

    def __init__(self, name, canonical=False, head=None):
        super().__init__()
        self.name, self.sha256, self.canonical, self.head = name, name, canonical, head


SMALL, CANONICAL = StandIn("x"), StandIn("inception-2015-12-05", True)


def gaussian(seed, n=N, d=8, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def card_of(real, kept=KEPT, **facts):
    about = dict.fromkeys(ReferenceCard.__dataclass_fields__) | {"split": "val", "count": len(real), "path": Path("c")}
    tensors = {"features": real[:kept], "places": torch.arange(kept)} if kept else {}
    return ReferenceCard(**about | {"moments": Moments.from_features([real])} | tensors | facts)


CARD = card_of(gaussian(0, 50))
SETS = [gaussian(seed, shift=0.3) for seed in (1, 2, 3)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_figures_are_those_of_independent_calls(count):
    sets = SETS[:count]
    found = {figure.key: figure for figure in measure(sets, CARD, SMALL, SEED)}
    distances = [frechet_distance(CARD.moments, Moments.from_features([features])) for features in sets]
    kernel = [kernel_distance(CARD.features, features, SEED) for features in sets]
    pairs = [precision_recall(CARD.features, features) for features in sets]
    expected = {"fd": distances, "kd": [k[0] for k in kernel], "precision": [p for p, _ in pairs],
                "recall": [r for _, r in pairs]}  # fmt: skip
    assert list(found) == list(expected) and len(set(distances)) == count
    for key, values in expected.items():
        assert found[key].value == pytest.approx(mean(values), rel=1e-12)
        assert (found[key].against, found[key].n) == ("val", N)
        assert found[key].n_reference == (50 if key == "fd" else KEPT)  # sums of all, features of some
        if count == 3:
            assert found[key].spread == pytest.approx(stdev(values), rel=1e-9)
            assert found[key].spread_of == "3 disjoint seeds"
        elif key == "kd":  # over subsets of half of the smaller set
            assert found[key].spread == pytest.approx(mean(k[1] for k in kernel), rel=1e-12)
            assert found[key].spread_of == f"100 subsets of {KEPT // 2}"
        else:
            assert (found[key].spread, found[key].spread_of) == (None, "")


def test_the_quick_form_leaves_out_precision_and_recall_alone():
    whole, quick = (measure(SETS, CARD, SMALL, SEED, quick=q) for q in (False, True))
    assert [f.key for f in quick] == ["fd", "kd"] and quick[1] == whole[1]
    assert quick[0].value == pytest.approx(whole[0].value, rel=1e-6) and quick[0].n_reference == 50


def test_fid_and_kid_are_the_canonical_detectors_alone():
    canonical, other = (measure(SETS[:1], CARD, detector) for detector in (CANONICAL, SMALL))
    assert [f.name for f in canonical] == [
        "FID", "KID", "precision (inception-2015-12-05)", "recall (inception-2015-12-05)"
    ]  # fmt: skip
    assert [f.name for f in other] == ["Fréchet distance (x)", "kernel distance (x)", "precision (x)", "recall (x)"]
    assert [log_key(f.key, CANONICAL) for f in canonical] == ["fid", "kid", "precision", "recall"]
    assert [log_key(f.key, SMALL) for f in other] == ["fd_x", "kd_x", "precision_x", "recall_x"]


def test_the_bias_of_a_small_n_is_said_beside_the_frechet_distance():
    notes = {n: measure([gaussian(1, n, 2)], card_of(gaussian(0, 50, 2)), SMALL, quick=True) for n in (49_999, 50_000)}
    assert "n = 49,999 is less than 50,000, which makes the distance larger" in notes[49_999][0].note
    assert notes[50_000][0].note == "" and notes[49_999][1].note == ""  # the kernel distance has no bias


@pytest.mark.parametrize("n, real, is_result", [(9, 50, True), (8, 50, False), (50, 8, False)])
def test_a_distance_of_no_more_images_than_features_is_marked_beside_its_value(capsys, n, real, is_result):
    figures = measure([gaussian(1, n, 8)], card_of(gaussian(0, real, 8), kept=8), SMALL, quick=True)
    assert [figure.is_result for figure in figures] == [is_result, True]  # the kernel distance needs no covariance
    print_figures(figures)
    (table,) = figures_table(figures)[:1]
    assert ("NOT A RESULT" in capsys.readouterr().out) == ("NOT A RESULT" in str(table.rows[0])) == (not is_result)
    assert "NOT A RESULT" not in str(table.rows[1])


def test_statistics_of_others_give_the_frechet_distance_alone():
    card = card_of(gaussian(0, 50), kept=0, split=None, count=None)
    (figure,) = measure(SETS, card, CANONICAL)
    assert (figure.key, figure.name, figure.against, figure.n_reference) == ("fd", "FID", "c", 0)  # the file's name
    assert figure.spread is not None and figure.value == measure(SETS, CARD, CANONICAL)[0].value


def test_sets_of_unequal_size_are_refused():
    with pytest.raises(InputError, match=r"sets of \[39, 40\] images do not compare: n must be the same"):
        measure([SETS[0], SETS[1][:-1]], CARD, SMALL)


# -- the Inception Score


def score_by_numpy(features, head, seed, splits=10):
    """exp E KL(p(y|x) || p(y)) of every split in float64: mean and standard deviation over the splits."""
    logits = features.double().numpy() @ head.double().numpy().T
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed)).numpy()
    p = np.exp(logits - logits.max(1, keepdims=True))[order]
    p /= p.sum(1, keepdims=True)
    parts = np.split(p, splits)
    scores = [np.exp((q * (np.log(q) - np.log(q.mean(0)))).sum(1).mean()) for q in parts]
    return np.mean(scores), np.std(scores, ddof=1)


@pytest.mark.parametrize("count", [1, 3])
def test_the_inception_score_is_the_formulas(count):
    head = gaussian(9, 7)
    state = torch.random.get_rng_state()
    figure = inception_score(SETS[:count], StandIn("i", True, head), SEED)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global stream is left alone
    scores = [score_by_numpy(features, head, SEED) for features in SETS[:count]]
    assert figure.value == pytest.approx(mean(score for score, _ in scores), rel=1e-9) and figure.value > 1.5
    assert (figure.key, figure.name, figure.against, figure.n) == ("is", "Inception Score", "", N)
    assert figure.note == "n = 40 is less than 50,000, which makes the score smaller: compare it at equal n only"
    assert figure.spread_of == ("3 disjoint seeds" if count == 3 else "10 splits")
    expected = stdev(score for score, _ in scores) if count == 3 else scores[0][1]
    assert figure.spread == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "detector, n, sentence",
    [
        (StandIn("i", True), N, "which detector i does not hold: give the path of pt_inception-2015-12-05-6726825d"),
        (StandIn("x", False, gaussian(9, 7)), N, "takes the classifier head of the canonical Inception"),
        (StandIn("i", True, gaussian(9, 7)), 9, "over 10 splits takes 10 images or more, not 9"),
    ],
)
def test_what_has_no_inception_score(detector, n, sentence):
    with pytest.raises(InputError, match=sentence):
        inception_score([gaussian(0, n)], detector)
