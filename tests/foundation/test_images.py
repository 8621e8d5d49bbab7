"""Images at the border: conversions without loss, means that agree on every path, PNG files, grids."""

import io

import numpy as np
import pytest
import torch
from folders import FASHION
from PIL import Image
from small_models import SMALL

from cdm_lightning.data.shards import read_manifest
from cdm_lightning.data.stream import ShardStream
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import decode_png, downscale, encode_png, quantize, save_grid, to_float, to_uint8
from cdm_lightning.stages import SuperResolutionStage

BYTES = torch.arange(256, dtype=torch.uint8)
RNG = np.random.default_rng(0)


def halve(image):
    """The mean over 2x2 in whole numbers, half to even; image: int (..., H, W)."""
    total = image[..., ::2, ::2] + image[..., 1::2, ::2] + image[..., ::2, 1::2] + image[..., 1::2, 1::2]
    quotient, rest = divmod(total, 4)
    return quotient + ((rest == 3) | ((rest == 2) & (quotient % 2 == 1)))


def noise(*shape):
    return torch.from_numpy(RNG.integers(0, 256, shape, dtype=np.uint8))


def test_every_byte_survives_the_way_to_float_and_back():
    x = to_float(BYTES)
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    assert np.array_equal(x.numpy(), np.arange(256, dtype=np.float32) / np.float32(127.5) - np.float32(1))
    assert torch.equal(to_uint8(x), BYTES) and torch.equal(quantize(x), x)
    reciprocal = BYTES.float() * (torch.ones(()) / 127.5) - 1  # how a GPU divides by a constant
    assert torch.equal(to_uint8(reciprocal), BYTES)


def test_to_uint8_rounds_to_the_nearest_and_clamps():
    assert to_uint8(torch.tensor([-9.0, -1.001, 1.001, 9.0])).tolist() == [0, 0, 255, 255]
    assert torch.equal(to_uint8(to_float(BYTES) + 0.49 / 127.5)[1:-1], BYTES[1:-1])
    assert torch.equal(to_uint8(to_float(BYTES) - 0.49 / 127.5)[1:-1], BYTES[1:-1])
    assert torch.equal(quantize(torch.full((3,), 0.3)), to_float(torch.full((3,), 166, dtype=torch.uint8)))  # 165.75


def test_downscale_is_the_mean_rounded_half_to_even_for_every_sum():
    total = np.arange(4 * 255 + 1)
    parts = np.stack([np.clip(total - 255 * k, 0, 255) for k in range(4)], -1).reshape(-1, 2, 2)
    assert (parts.sum((1, 2)) == total).all()
    found = downscale(torch.from_numpy(parts.astype(np.uint8)), 1)[:, 0, 0]
    assert found.tolist() == [round(int(t) / 4) for t in total]  # Python rounds half to even
    image = noise(5, 3, 16, 16)
    assert np.array_equal(downscale(image, 8).numpy(), halve(image.numpy().astype(int)))


@pytest.mark.parametrize("shape", [(32, 32), (3, 32, 32), (2, 3, 32, 32), (4, 1, 32, 32)])
def test_every_path_between_two_resolutions_ends_in_the_same_bits(shape):
    image = noise(*shape)
    assert torch.equal(downscale(downscale(image, 16), 8), downscale(image, 8))
    assert downscale(image, 8).shape == (*shape[:-2], 8, 8)
    assert torch.equal(downscale(image, 32), image)
    with torch.autocast("cpu", torch.bfloat16):  # as inside a training step of mixed precision
        assert torch.equal(downscale(to_uint8(to_float(image)), 4), downscale(image, 4))


@pytest.mark.parametrize("low", [0, -8, 12, 64, 5])
def test_downscale_refuses_what_halving_does_not_reach(low):
    with pytest.raises(InputError, match=f"resolution {low} cannot be reached from 32: .* power of two"):
        downscale(noise(1, 32, 32), low)


def test_the_target_of_one_stage_is_the_input_of_the_next_to_the_bit():
    folder = FASHION / "val/32"
    low, high = (
        next(iter(ShardStream(folder, read_manifest(folder), resolution, 64, flip=True))) for resolution in (16, 32)
    )
    assert torch.equal(low[0], downscale(high[0], 16)) and torch.equal(low[1], high[1])
    stage = SuperResolutionStage(resolution=32, low_resolution=16, augmentation="none", **SMALL)
    seen = []
    stage.augment = lambda low_res, strength, streams: seen.append(low_res) or low_res
    stage.losses((to_float(high[0]), high[1], high[2]), "train")
    assert torch.equal(seen[0], to_float(low[0]))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_lossless_and_names_its_channels(channels):
    image = noise(9, 7, channels).numpy()
    assert np.array_equal(decode_png(encode_png(image)), image)
    assert np.array_equal(np.array(Image.open(io.BytesIO(encode_png(image)))).reshape(image.shape), image)


@pytest.mark.parametrize("mode", ["P", "I;16", "RGBA", "LA", "1"])
def test_pictures_of_other_kinds_are_refused(mode):
    buffer = io.BytesIO()
    Image.new(mode, (4, 4)).save(buffer, "PNG")
    with pytest.raises(InputError, match=f"mode {mode} is neither 8-bit grey nor 8-bit RGB"):
        decode_png(buffer.getvalue())


def test_a_grid_shows_every_image_where_it_belongs(tmp_path):
    rows = [[noise(1, 2, 2), noise(3, 4, 4)], [noise(1, 4, 4)]]
    save_grid(rows, tmp_path / "new" / "grid.png", cell=8)
    sheet = np.array(Image.open(tmp_path / "new" / "grid.png"))
    assert sheet.shape == (18, 18, 3)
    assert np.array_equal(sheet[:8, :8, 1], np.kron(rows[0][0][0], np.ones((4, 4))))
    assert np.array_equal(sheet[:8, 10:, 2], np.kron(rows[0][1][2], np.ones((2, 2))))
    assert np.array_equal(sheet[10:, :8, 0], np.kron(rows[1][0][0], np.ones((2, 2))))
    assert (sheet[10:, 10:] == 255).all() and (sheet[8:10] == 255).all()
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["grid.png"]
