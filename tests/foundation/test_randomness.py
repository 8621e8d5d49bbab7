"""Keyed randomness: stable keys, and generators of neighbouring images that know nothing of each other."""

import numpy as np
import pytest
import torch
from scipy import stats

from cdm_lightning.foundation import randomness
from cdm_lightning.foundation.randomness import generators, key, rand, randn, randn_ahead

COUNT = 100_000


@pytest.fixture(scope="module")
def draws():
    """(uniform (N,), normals (N, 4)) of N consecutive images, drawn as a training example draws them."""
    uniform, normal = [], []
    for first in range(0, COUNT, 10_000):
        generator = generators(range(first, first + 10_000), "cpu", 0, "train")
        uniform.append(rand(generator))
        normal.append(randn((4,), generator))
    return torch.cat(uniform).numpy(), torch.cat(normal).double().numpy()


def test_key_is_a_constant_of_its_parts():
    assert key(0, "train") == 7193855067464343746  # a change here changes every run and every sample
    assert key(12, "window", 3, 8) == 6432919975413598274


def test_key_tells_parts_apart_and_takes_any_integer():
    parts = [(), (0,), ("0",), (0, 0), ("train",), (0, "train"), (1, 23), (12, 3), ("a", "b"), ("a', 'b",)]
    assert len({key(*p) for p in parts}) == len(parts)
    assert all(0 <= key(i) < 2**63 for i in range(100))
    assert key(np.int64(7), "x") == key(torch.tensor(7), "x") == key(7, "x")
    with pytest.raises(TypeError):
        key(1.5)


def test_generators_are_keyed_by_parts_and_index_and_by_no_neighbour():
    def draw(index, *parts):
        generator = generators(index, "cpu", *parts)
        return torch.cat([rand(generator)[:, None], randn((2, 3), generator).flatten(1).double()], 1)

    whole = draw(range(20), 0, "train")
    torch.manual_seed(5)  # the global generator takes no part
    assert torch.equal(draw([7, 3, 19], 0, "train"), whole[[7, 3, 19]])
    assert torch.equal(draw(torch.tensor([7]), 0, "train"), whole[[7]])
    for other in [(1, "train"), (0, "val"), (0, "train", 0)]:
        assert not (draw(range(20), *other) == whole).any()
    assert len(whole.flatten().unique()) == whole.numel()


def test_generators_take_any_index():
    last, beyond = generators([2**40, 2**63 + 5], "cpu", 0, "train")
    assert last.initial_seed() == (key(0, "train") + 2**40) % 2**63
    assert beyond.initial_seed() == (key(0, "train") + 5) % 2**63


def test_shapes_and_types():
    generator = generators(range(3), "cpu", 0)
    assert rand(generator).shape == (3,) and rand(generator).dtype == torch.float64
    assert randn((1, 4, 4), generator).shape == (3, 1, 4, 4) and randn((2,), generator).dtype == torch.float32


def test_first_uniforms_of_consecutive_seeds_are_uniform(draws):
    uniform, _ = draws
    assert uniform.min() >= 0 and uniform.max() < 1 and len(np.unique(uniform)) == COUNT
    assert stats.chisquare(np.histogram(uniform, 1000, (0, 1))[0]).pvalue > 1e-4
    assert stats.kstest(uniform, "uniform").pvalue > 1e-4


def test_first_normals_of_consecutive_seeds_are_normal(draws):
    _, normal = draws
    for column in normal.T:
        assert stats.kstest(column, "norm").pvalue > 1e-4
        assert abs(column.mean()) < 5 / COUNT**0.5 and abs(column.var() - 1) < 5 * (2 / COUNT) ** 0.5
        assert abs(stats.skew(column)) < 5 * (6 / COUNT) ** 0.5
        assert abs(stats.kurtosis(column)) < 5 * (24 / COUNT) ** 0.5


@pytest.mark.parametrize("lag", [1, 2, 64])
def test_neighbouring_images_are_independent(draws, lag):
    columns = np.column_stack([draws[0], *draws[1].T])
    both = np.corrcoef(columns[:-lag].T, columns[lag:].T)
    assert np.abs(both[:5, 5:]).max() < 5 / COUNT**0.5  # of every draw of an image with every draw of its neighbour
    assert np.abs(both[:5, :5] - np.eye(5)).max() < 5 / COUNT**0.5  # and of the draws of one image
    cells = np.histogram2d(draws[0][:-lag], draws[0][lag:], 20, ((0, 1), (0, 1)))[0]
    assert stats.chisquare(cells.ravel()).pvalue > 1e-4


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 4), (3, 6, 6), (1, 1, 5)])  # in sixteens, and not
def test_noise_drawn_ahead_is_that_of_plain_generators_step_by_step(shape, monkeypatch):
    monkeypatch.setattr(randomness, "NUMBERS_PER_DRAW", 3 * np.prod(shape) + 1)  # three steps at once, the last alone
    ahead, plain = (generators([4, 9, 70], "cpu", 0, "sample", 1) for _ in range(2))
    drawn = list(randn_ahead((3, *shape), 7, torch.device("cpu"), ahead))
    assert len(drawn) == 7
    for z in drawn:
        assert torch.equal(z, randn(shape, plain))


def test_noise_without_generators_is_the_global_one():
    torch.manual_seed(3)
    drawn = torch.stack(list(randn_ahead((2, 1, 4, 4), 5, torch.device("cpu"), None)))
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.randn(5, 2, 1, 4, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose calls for one step and many differ")
def test_noise_drawn_ahead_on_a_gpu_is_keyed_by_the_image_alone():
    device = torch.device("cuda")
    three, one = (
        torch.stack(list(randn_ahead((len(index), 3, 6, 6), 7, device, generators(index, device, 0, "sample"))))
        for index in ([4, 9, 70], [9])
    )
    assert torch.equal(three[:, 1:2], one) and len(three.unique()) > 0.99 * three.numel()
