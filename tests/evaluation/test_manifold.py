"""Precision, recall and nearest neighbours against brute force, and against cases with a known answer."""

import numpy as np
import pytest
import torch

from cdm_lightning.evaluation.metrics import manifold
from cdm_lightning.evaluation.metrics.manifold import copy_threshold, nearest, precision_recall
from cdm_lightning.foundation.errors import InputError


def points(n, seed, shift=0.0, d=5):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def brute_force(real, generated, k):
    """Shares inside the balls, one pair of points at a time, in float64."""

    def share(inside, centres):
        inside, centres = inside.double().numpy(), centres.double().numpy()
        radius = [np.sort(np.linalg.norm(centres - c, axis=1))[k] for c in centres]  # the 0th is itself
        return np.mean([(np.linalg.norm(centres - p, axis=1) <= radius).any() for p in inside])

    return share(generated, real), share(real, generated)


@pytest.mark.parametrize("shift", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("chunk", [1000, 13])
def test_precision_and_recall_are_those_of_brute_force(shift, chunk, monkeypatch):
    monkeypatch.setattr(manifold, "CHUNK", chunk)
    real, generated = points(70, 0), points(50, 1, shift)
    assert precision_recall(real, generated) == pytest.approx(brute_force(real, generated, 3))


def test_known_answers():
    real = points(60, 0)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, points(60, 1, 100.0)) == (0.0, 0.0)
    modes = torch.cat([points(40, 2), points(40, 3, 50.0)])
    precision, recall = precision_recall(modes, points(80, 4))  # one of two modes: precise, half the recall
    assert precision > 0.8 and 0.4 < recall <= 0.5


def test_neighbours_are_those_of_brute_force():
    real, generated = points(90, 0), points(30, 1)
    distance, row = nearest(real, generated, 4)
    every = np.linalg.norm(real.double().numpy()[None] - generated.double().numpy()[:, None], axis=2)
    assert np.array_equal(row, np.argsort(every, axis=1)[:, :4])
    np.testing.assert_allclose(distance, np.sort(every, axis=1)[:, :4], rtol=1e-4)


def test_a_planted_image_is_found_and_honest_ones_are_as_rare_as_they_should_be():
    real, generated = points(2000, 0), points(2000, 1)
    limit = copy_threshold(real)
    honest = (nearest(real, generated, 1)[0] <= limit).float().mean()
    assert 0.002 < honest < 0.025  # 1 % is expected
    generated[17] = real[1234]
    distance, row = nearest(real, generated, 1)
    assert int(row[17]) == 1234 and float(distance[17]) < 1e-2 < limit and int(distance.argmin()) == 17


def test_too_few_images_are_refused():
    with pytest.raises(
        InputError, match="k = 3 neighbours need more than 3 images on each side, not 3 real and 9 generated"
    ):
        precision_recall(points(3, 0), points(9, 1))
