"""Distances against closed forms, float64 references and torchmetrics on the same features."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torchmetrics.image.fid import FrechetInceptionDistance

from cdm_lightning.evaluation.metrics.distance import (
    FrechetDistanceTo,
    Moments,
    feature_passthrough,
    frechet_distance,
    kernel_distance,
)
from cdm_lightning.foundation.errors import InputError


def gaussian(n, d, seed, scale=1.0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale + shift


def reference(a, b):
    """Fréchet distance in float64 by numpy and scipy."""
    a, b = a.double().numpy(), b.double().numpy()
    root = sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    traces = np.trace(np.cov(a, rowvar=False)) + np.trace(np.cov(b, rowvar=False)) - 2 * np.trace(root)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + traces


@pytest.mark.parametrize("n, m, d", [(500, 400, 64), (100, 90, 256)])  # the second has singular covariances
def test_both_forms_agree_with_float64_and_with_torchmetrics(n, m, d):
    a, b = gaussian(n, d, 0), gaussian(m, d, 1, 1.3, 0.2)
    real, generated = Moments.from_features(a.split(70)), Moments.from_features(b.split(33))
    metric = FrechetInceptionDistance(feature=feature_passthrough(d))
    metric.update(a.double(), real=True)
    metric.update(b.double(), real=False)
    expected = reference(a, b)
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(real, generated) == pytest.approx(float(metric.compute()), rel=1e-9)
    assert FrechetDistanceTo(real)(generated) == pytest.approx(expected, rel=1e-6)


def test_identical_sets_have_no_distance():
    moments = Moments.from_features([gaussian(300, 32, 0)])
    assert frechet_distance(moments, moments) == pytest.approx(0, abs=1e-9)
    assert FrechetDistanceTo(moments)(moments) == pytest.approx(0, abs=1e-9)


def test_a_shift_and_a_scale_of_a_gaussian_have_the_known_distance():
    """||shift||^2 + Tr S (1 - a)^2, exactly, for the same draws."""
    a = gaussian(400, 16, 0)
    b = 1.5 * a + 0.25
    real, generated = Moments.from_features([a]), Moments.from_features([b])
    shift = (b.double().mean(0) - a.double().mean(0)).square().sum()
    expected = float(shift + real.covariance.trace() * 0.5**2)
    assert frechet_distance(real, generated) == pytest.approx(expected, rel=1e-6)
    assert FrechetDistanceTo(real)(generated) == pytest.approx(expected, rel=1e-6)


def test_moments_are_means_and_unbiased_covariances():
    a = gaussian(101, 8, 3, 2.0, 5.0)
    moments = Moments.from_features(a.split(10))
    np.testing.assert_allclose(moments.mean, a.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(a.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12)
    again = Moments.from_covariance(moments.n, moments.mean, moments.covariance)
    torch.testing.assert_close(again.outer, moments.outer, rtol=1e-12, atol=1e-9)


def polynomial_mmd(x, y):
    """Unbiased MMD^2 with the kernel (x.y / d + 1)^3, by its definition (KID: Binkowski et al., 2018)."""
    x, y = x.double().numpy(), y.double().numpy()
    m, d = x.shape
    xx, yy, xy = ((p @ q.T / d + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    own = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (m * (m - 1))
    return own - 2 * xy.mean()


def test_the_kernel_distance_is_the_mean_over_subsets():
    a, b = gaussian(40, 6, 0), gaussian(44, 6, 1, 1.0, 1.0)
    value, deviation, size = kernel_distance(a, b, seed=5)
    torch.manual_seed(5)
    parts = []
    for _ in range(100):
        x = a[torch.randperm(40)[:20]]
        parts.append(polynomial_mmd(x, b[torch.randperm(44)[:20]]))
    assert size == 20
    assert value == pytest.approx(np.mean(parts), rel=1e-9) and deviation == pytest.approx(np.std(parts), rel=1e-9)
    assert kernel_distance(a, b, seed=5) == (value, deviation, size) != kernel_distance(a, b, seed=6)


def test_the_kernel_distance_leaves_the_global_stream_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    kernel_distance(gaussian(8, 2, 0), gaussian(8, 2, 1), seed=0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (
            lambda: frechet_distance(
                Moments.from_features([gaussian(1, 4, 0)]), Moments.from_features([gaussian(9, 4, 0)])
            ),
            "not 1 real and 9",
        ),
        (
            lambda: frechet_distance(
                Moments.from_features([gaussian(9, 4, 0)]), Moments.from_features([gaussian(9, 5, 0)])
            ),
            "4 and 5 numbers",
        ),
        (lambda: kernel_distance(gaussian(9, 4, 0), gaussian(3, 4, 0), 0), "takes 4 images or more, not 9 real and 3"),
    ],
)
def test_what_is_refused(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()
