"""Conditioning augmentation: identities, per-image draws, moments, and the clock it runs on."""

import math

import pytest
import torch
from small_models import batch_of, record_calls, smallest_stages

from cdm_lightning.diffusion import Diffusion
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.randomness import KeyedStreams
from cdm_lightning.stages.augmentation import BlurAugmentation, GaussianAugmentation, NoAugmentation
from cdm_lightning.training import SampleGrid


def keyed(count, seed=0):
    return KeyedStreams(range(count), "cpu", seed, "test")


def test_strength_zero_is_the_identity_to_the_bit():
    z = torch.rand(5, 3, 8, 8) * 2 - 1
    for augmentation in (GaussianAugmentation(4000, "cosine"), BlurAugmentation((0.4, 0.6), 0.5), NoAugmentation()):
        assert torch.equal(augmentation(z, torch.zeros(5), keyed(5)), z)


def test_probability_zero_never_blurs_and_one_always_does():
    assert float(BlurAugmentation((0.4, 0.6), 0.0).draw(keyed(256)).max()) == 0
    assert float(BlurAugmentation((0.4, 0.6), 1.0).draw(keyed(256)).min()) >= 0.4


def test_levels_are_drawn_per_image_and_uniformly():
    levels = GaussianAugmentation(4000, "cosine").draw(keyed(256))
    assert len(set(levels.tolist())) > 200
    assert torch.equal(levels, GaussianAugmentation(4000, "cosine").draw(keyed(256)))
    many = GaussianAugmentation(10, "cosine").draw(keyed(22_000))
    counts = torch.bincount(many.long())
    assert len(counts) == 11  # 0 and T included
    assert float((counts - 2000).abs().max()) < 5 * math.sqrt(2000)
    assert float(GaussianAugmentation(4000, "cosine", max_level=100).draw(keyed(500)).max()) <= 100
    between = GaussianAugmentation(4000, "cosine", max_level=7, min_level=5).draw(keyed(500))
    assert set(between.tolist()) == {5, 6, 7}
    assert set(GaussianAugmentation(4000, "cosine", max_level=9, min_level=9).draw(keyed(50)).tolist()) == {9}


def test_half_of_a_batch_is_blurred_each_with_its_own_sigma():
    sigma = BlurAugmentation((0.4, 0.6), 0.5).draw(keyed(256))
    blurred = sigma[sigma > 0]
    assert 96 < len(blurred) < 160
    assert len(set(blurred.tolist())) > 0.9 * len(blurred)
    assert float(blurred.min()) >= 0.4 and float(blurred.max()) <= 0.6


def test_noise_follows_the_low_resolution_clock():
    """paper: at T = 4000, cosine, the noise of s = 101, 501, 1001 has std .050, .206, .392."""
    augmentation = GaussianAugmentation(4000, "cosine")
    z = torch.full((3, 1, 128, 128), 0.5)
    noised = augmentation(z, torch.tensor([101.0, 501.0, 1001.0]), keyed(3))
    for image, std in zip(noised, (0.050, 0.206, 0.392), strict=True):
        assert abs(float(image.std()) - std) < 0.006
        assert abs(float(image.mean()) - 0.5 * math.sqrt(1 - std**2)) < 0.015
    wrong = GaussianAugmentation(1000, "linear")(z, torch.tensor([101.0, 501.0, 1001.0]).clamp(max=1000), keyed(3))
    assert float((wrong.flatten(1).std(1) - noised.flatten(1).std(1)).abs().max()) > 0.1


def test_it_is_the_low_resolution_models_q():
    z, s = torch.rand(4, 1, 8, 8), torch.tensor([1.0, 10.0, 500.0, 1000.0])
    noise = keyed(4).randn((1, 8, 8))
    expected = Diffusion(1000, "linear").diffuse(z, s, noise)
    assert torch.equal(GaussianAugmentation(1000, "linear")(z, s, keyed(4)), expected)


@pytest.mark.parametrize("sigma", [0.4, 0.5, 0.6, 3.0])
def test_blur_equals_an_explicit_convolution(sigma):
    z = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    offsets = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    kernel = torch.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = torch.nn.functional.pad(z, (1, 1, 1, 1), mode="reflect")
    expected = torch.nn.functional.conv2d(padded, kernel.expand(3, 1, 3, 3), groups=3)
    got = BlurAugmentation((0.4, 0.6), 0.5)(z, torch.full((2,), sigma, dtype=torch.float64), keyed(2))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "build, sentence",
    [
        (lambda: BlurAugmentation((0.6, 0.4), 0.5), "blur_sigma"),
        (lambda: BlurAugmentation((0.4, 0.6), 1.5), "blur_probability 1.5 lies outside"),
        (lambda: GaussianAugmentation(100, "cosine", 101), "max_level 101 lies outside"),
        (lambda: GaussianAugmentation(100, "cosine", 50, 51), "min_level 51 lies outside 0 ... max_level = 50"),
        (lambda: GaussianAugmentation(100, "cosine", 100, 100), "min_level 100 lies outside .* below T = 100"),
    ],
)
def test_bad_ranges_are_refused(build, sentence):
    with pytest.raises(InputError, match=sentence):
        build()


def test_a_stage_with_a_least_level_is_sampled_there_from_noisy_input():
    """Sample grids and `cdm predict` give it z_s and s at its least level; others get the clean image and 0."""
    for least in (0, 6):
        stage = smallest_stages(min_level=least, max_level=15)[1]
        calls = record_calls(stage)
        batch = batch_of(stage)
        stage.sample_like(batch, KeyedStreams(batch[2], "cpu", 0, "predict"))
        streams = KeyedStreams(batch[2], "cpu", 0, "predict")
        clean = stage.low_res_of(batch[0])
        given = stage.augment(clean, least, streams) if least else clean
        expected = torch.nn.functional.interpolate(given, (16, 16), mode="bilinear")
        assert all(torch.equal(call.low_res, expected) and set(call.level.tolist()) == {least} for call in calls)
        calls.clear()
        SampleGrid(rows=2, columns=1, sampling_steps=2).draw(stage, batch)
        assert {level for call in calls for level in call.level.tolist()} == {least}
        _, shares = stage.training_predictor(batch[0], batch[1], keyed(4))
        assert float(shares["s"].min()) > 0 and float(shares["s"].max()) <= 1
