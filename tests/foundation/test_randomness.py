"""Keyed randomness: stable keys, Philox as it was published, and streams of images that know nothing of each other."""

import copy

import numpy as np
import pytest
import torch
from launches import Launches
from scipy import stats

from cdm_lightning.foundation.randomness import KeyedStreams, TorchStreams, key, philox, round_keys

COUNT = 100_000
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
    ),
]


@pytest.fixture(scope="module")
def draws():
    """(uniform (N,), normals (N, 8)) of N consecutive images, drawn as a training example draws them."""
    streams = KeyedStreams(range(COUNT), "cpu", 0, "train")
    uniform, normal = streams.rand(), torch.cat([streams.randn((4,)), streams.randn((4,))], 1)
    return uniform.numpy(), normal.double().numpy()


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


# -- Philox


def by_tensors(counter, number, device="cpu"):
    """Philox of one counter, four words, and a key of 64 bits."""
    even, odd = (torch.tensor(counter[first::2], device=device)[:, None, None] for first in (0, 1))
    even, odd = philox(even, odd, round_keys(number, even.device))
    return [int(word) for word in (even[0], odd[0], even[1], odd[1])]


def by_hand(counter, number):
    """The same in plain integers, as in figure 2 of the paper."""
    x0, x1, x2, x3 = counter
    k0, k1 = number % 2**32, number >> 32
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * x0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * x2, 2**32)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [x0, x1, x2, x3]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "counter, words, expected",  # the known answers of Random123
    [
        ([0] * 4, [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, words, expected, device):
    assert by_tensors(counter, words[0] + (words[1] << 32), device) == expected
    assert by_hand(counter, words[0] + (words[1] << 32)) == expected


def test_philox_is_the_plain_one_for_any_counter_and_key():
    rng = np.random.default_rng(0)
    for _ in range(50):
        *counter, low, high = (int(word) for word in rng.integers(2**32, size=6))
        assert by_tensors(counter, low + (high << 32)) == by_hand(counter, low + (high << 32))


def test_numbers_are_made_of_the_words_of_index_draw_and_block():
    indices, number = [3, 2**40 + 7, -1], key(5, "sample", 1)
    streams = KeyedStreams(indices, "cpu", 5, "sample", 1)
    uniform, normal = streams.rand((3,)), streams.randn((6,))  # of two blocks each
    for row, index in enumerate(indices):
        words = [index % 2**32, (index >> 32) % 2**32]
        first, second = (by_hand([*words, 0, block], number) for block in (0, 1))
        whole = [(w[i] << 21 | w[i + 1] >> 11) * 2.0**-53 for i in (0, 2) for w in (first, second)]
        assert uniform[row].tolist() == whole[:3]
        first, second = (by_hand([*words, 1, block], number) for block in (0, 1))
        polar = [((w[i] + 1) / 2**32, w[i + 1] / 2**32 * 2 * np.pi) for i in (0, 2) for w in (first, second)]
        plain = [np.sqrt(-2 * np.log(u)) * wave(angle) for wave in (np.cos, np.sin) for u, angle in polar]
        np.testing.assert_allclose(normal[row], plain[:6], rtol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_the_numbers_of_a_key_and_an_index_are_constants(device):
    """A change here changes every run and every sample."""
    streams = KeyedStreams([0, 123_456_789_012], device, 0, "train")
    assert streams.rand().tolist() == [0.8030677994751528, 0.03942595422787076]
    expected = [[-0.57016438, 1.07557416, 2.05102181], [1.12943673, 2.27096534, 0.11433316]]
    torch.testing.assert_close(streams.randn((3,)).cpu(), torch.tensor(expected), rtol=1e-6, atol=0)


# -- streams


def test_streams_are_keyed_by_parts_and_index_and_by_no_neighbour():
    def draw(index, *parts):
        streams = KeyedStreams(index, "cpu", *parts)
        return torch.cat([streams.rand()[:, None], streams.randn((2, 3)).flatten(1).double()], 1)

    whole = draw(range(20), 0, "train")
    torch.manual_seed(5)  # the global generator takes no part
    assert torch.equal(draw([7, 3, 19], 0, "train"), whole[[7, 3, 19]])
    assert torch.equal(draw(torch.tensor([7]), 0, "train"), whole[[7]])
    for other in [(1, "train"), (0, "val"), (0, "train", 0)]:
        assert not (draw(range(20), *other) == whole).any()
    assert len(whole.flatten().unique()) == whole.numel()


def test_streams_take_any_index():
    def first(*index):
        return KeyedStreams(index, "cpu", 0, "train").rand().tolist()

    assert len(set(first(0, 5, -1, 2**31, 2**32, 2**32 + 5, 2**40, -(2**63), 2**63 - 1))) == 9
    assert first(2**63 + 5) == first(5 - 2**63) and first(2**64 - 1) == first(-1)
    assert KeyedStreams([], "cpu", 0).randn((3,)).shape == (0, 3)


def test_slices_draw_from_the_same_point_on_and_share_nothing():
    streams = KeyedStreams(range(10), "cpu", 0)
    streams.rand()
    parts = [streams[:4], streams[4:]]
    drawn = [torch.cat([part.randn((5,)) for part in parts]) for _ in range(2)]
    assert [len(part) for part in parts] == [4, 6] and not torch.equal(*drawn)
    assert torch.equal(drawn[0], streams.randn((5,))) and torch.equal(drawn[1], streams.randn((5,)))


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (1, 1, 5), (3, 8, 8)])
def test_shapes_and_types(shape):
    for streams in (KeyedStreams(range(3), "cpu", 0), TorchStreams(3, "cpu"), of_generators(1, 2, 3)):
        uniform, normal = streams.rand(shape), streams.randn(shape)
        assert uniform.shape == normal.shape == (3, *shape) and len(streams) == 3 and str(streams.device) == "cpu"
        assert uniform.dtype == torch.float64 and normal.dtype == torch.float32
        assert uniform.is_contiguous() and normal.is_contiguous() and len(normal.unique()) == normal.numel()
        assert uniform.min() >= 0 and uniform.max() < 1


def of_generators(*seeds):
    return TorchStreams(len(seeds), "cpu", [torch.Generator().manual_seed(seed) for seed in seeds])


def test_streams_of_torch_are_those_of_its_generators():
    drawn = of_generators(4, 5)
    for number, seed in enumerate((4, 5)):
        g = torch.Generator().manual_seed(seed)
        expected = torch.rand((), generator=g, dtype=torch.float64), torch.randn(2, 3, generator=g)
        streams = copy.copy(drawn)
        streams.generators = [torch.Generator().manual_seed(s) for s in (4, 5)]
        assert torch.equal(streams.rand()[number], expected[0])
        assert torch.equal(streams.randn((2, 3))[number], expected[1])
    torch.manual_seed(3)
    first = TorchStreams(2, "cpu").randn((1, 4, 4))
    torch.manual_seed(3)
    assert torch.equal(first, torch.randn(2, 1, 4, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_numbers_of_a_cpu():
    streams = [KeyedStreams(range(-3, 61), device, 0, "sample") for device in ("cpu", "cuda")]
    uniform, normal = ([one.rand((7,)).cpu() for one in streams], [one.randn((3, 33, 32)).cpu() for one in streams])
    assert torch.equal(*uniform)
    torch.testing.assert_close(*normal, rtol=1e-6, atol=0)
    assert float((normal[0] != normal[1]).double().mean()) < 1e-5


def test_a_draw_takes_as_many_launches_for_any_batch():
    def launches(batch, size):
        index = torch.arange(batch)
        with Launches() as counted:
            streams = KeyedStreams(index, "cpu", 0, "train")
            streams.rand()
            streams.randn((3, size, size))
        return counted.count

    assert launches(16, 8) == launches(64, 8) == launches(16, 64) <= 125


# -- as random numbers


def test_first_uniforms_of_consecutive_images_are_uniform(draws):
    uniform, _ = draws
    assert uniform.min() >= 0 and uniform.max() < 1 and len(np.unique(uniform)) == COUNT
    assert stats.chisquare(np.histogram(uniform, 1000, (0, 1))[0]).pvalue > 1e-4
    assert stats.kstest(uniform, "uniform").pvalue > 1e-4
    low_bits = np.unique((uniform * 2**53).astype(np.int64) % 1024, return_counts=True)[1]  # float32 has not got them
    assert stats.chisquare(low_bits).pvalue > 1e-4 and len(low_bits) == 1024


def test_first_normals_of_consecutive_images_are_normal(draws):
    _, normal = draws
    for column in normal.T:
        assert stats.kstest(column, "norm").pvalue > 1e-4
        assert abs(column.mean()) < 5 / COUNT**0.5 and abs(column.var() - 1) < 5 * (2 / COUNT) ** 0.5
        assert abs(stats.skew(column)) < 5 * (6 / COUNT) ** 0.5
        assert abs(stats.kurtosis(column)) < 5 * (24 / COUNT) ** 0.5


def test_the_normals_of_one_image_are_normal_and_independent():
    image = KeyedStreams([7], "cpu", 0, "sample").randn((COUNT,))[0].double().numpy()
    assert stats.kstest(image, "norm").pvalue > 1e-4
    for lag in (1, 2, 32, COUNT // 4, COUNT // 2):  # both halves of a pair are half an image apart
        for power in (1, 2):
            assert abs(np.corrcoef(image[:-lag] ** power, image[lag:] ** power)[0, 1]) < 5 / (COUNT - lag) ** 0.5


@pytest.mark.parametrize("lag", [1, 2, 64])
def test_neighbouring_images_are_independent(draws, lag):
    columns = np.column_stack([draws[0], *draws[1].T])
    count = columns.shape[1]
    both = np.corrcoef(columns[:-lag].T, columns[lag:].T)
    assert np.abs(both[:count, count:]).max() < 5 / COUNT**0.5  # of every draw of an image with those of its neighbour
    assert np.abs(both[:count, :count] - np.eye(count)).max() < 5 / COUNT**0.5  # and of the draws of one image
    cells = np.histogram2d(draws[0][:-lag], draws[0][lag:], 20, ((0, 1), (0, 1)))[0]
    assert stats.chisquare(cells.ravel()).pvalue > 1e-4
