"""Triton kernels of the modulated group norm and of sums with a bias, launched by `gpu_operations`.

All sums are float32. Long images are split among programs, whose means and squared deviations are merged without loss
of digits (Chan et al. 1979).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _silu(z):
    return z * tl.sigmoid(z)


@triton.jit
def _silu_gradient(z):
    s = tl.sigmoid(z)
    return s * (1 + z * (1 - s))


@triton.jit
def channel_statistics(
    x, means, squares, rows, channels, all_channels, offset, splits, length, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Mean and sum of squared deviations of each channel over `length` pixels of an image."""
    image, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    start = x + image.to(tl.int64) * rows * channels
    last = tl.minimum((split + 1) * length, rows)
    inside = c < channels
    pivot = tl.load(start + split * length * channels + c, inside, 0.0).to(tl.float32)  # near the mean: no cancellation
    total, square = tl.zeros([ROWS, CHANNELS], tl.float32), tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(split * length, last, ROWS):
        r = first + tl.arange(0, ROWS)
        mask = (r < last)[:, None] & inside[None, :]
        values = tl.load(start + r[:, None] * channels + c[None, :], mask, 0.0).to(tl.float32)
        values = tl.where(mask, values - pivot[None, :], 0.0)
        total += values
        square += values * values
    count = (last - split * length).to(tl.float32)
    sums, squared = tl.sum(total, 0), tl.sum(square, 0)
    mean = pivot + sums / count
    squared = tl.maximum(squared - sums * sums / count, 0.0)
    place = tl.program_id(0).to(tl.int64) * all_channels + offset + c
    tl.store(means + place, mean, inside)
    tl.store(squares + place, squared, inside)


@triton.jit
def _gains(weight, bias, modulation, image, c, channels, mask, MODULATED: tl.constexpr):
    """(gamma, beta, 1 + scale) of channels c."""
    gamma, beta = tl.load(weight + c, mask, 0.0).to(tl.float32), tl.load(bias + c, mask, 0.0).to(tl.float32)
    one = tl.full(gamma.shape, 1.0, tl.float32)
    if MODULATED:
        own = modulation + image.to(tl.int64) * 2 * channels
        one += tl.load(own + c, mask, 0.0).to(tl.float32)
        gamma *= one
        beta = beta * one + tl.load(own + channels + c, mask, 0.0).to(tl.float32)
    return gamma, beta, one


@triton.jit
def coefficients(
    means, squares, weight, bias, modulation, added, a, b, centres, rstds, averages, rows, channels, size, splits,
    length, eps, MODULATED: tl.constexpr, ADDED: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """a and b of y = act(a x + b), for one group of one image. added: a number per channel to add to x first."""
    image, group, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    j, s = tl.arange(0, SIZE), tl.arange(0, SPLITS)
    c, mask = group * size + j, j < size
    count = tl.maximum(tl.minimum(length, rows - s * length), 0).to(tl.float32)[:, None]  # 0 beyond the last split
    place = (image.to(tl.int64) * splits + s)[:, None] * channels + c[None, :]
    both = (s < splits)[:, None] & mask[None, :]
    parts = tl.load(means + place, both, 0.0)
    mean = tl.sum(parts * count, 0) / rows
    step = parts - mean[None, :]
    square = tl.sum(tl.where(both, tl.load(squares + place, both, 0.0) + count * step * step, 0.0), 0)
    more = tl.zeros(mean.shape, tl.float32)
    if ADDED:
        more += tl.load(added + c, mask, 0.0).to(tl.float32)
    mean += more
    centre = tl.sum(mean, 0) / size
    step = tl.where(mask, mean - centre, 0.0)
    variance = tl.sum(square / rows + step * step, 0) / size
    rstd = 1 / tl.sqrt(variance + eps)
    gamma, beta, _ = _gains(weight, bias, modulation, image, c, channels, mask, MODULATED)
    own = image.to(tl.int64) * channels + c
    tl.store(a + own, rstd * gamma, mask)
    tl.store(b + own, beta + (more - centre) * rstd * gamma, mask)
    tl.store(centres + own, centre - more, mask)
    tl.store(averages + own, mean - more, mask)
    tl.store(rstds + image * groups + group, rstd)


@triton.jit
def normalise(
    x, a, b, y, rows, channels, all_channels, offset, blocks,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y = act(a x + b)."""
    image, r = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (r < rows)[:, None] & (c < channels)[None, :]
    row = (image.to(tl.int64) * rows + r)[:, None]
    own = image.to(tl.int64) * all_channels + offset + c
    z = tl.load(x + row * channels + c[None, :], mask, 0.0).to(tl.float32)
    z = z * tl.load(a + own, c < channels, 0.0)[None, :] + tl.load(b + own, c < channels, 0.0)[None, :]
    if ACTIVATION:
        z = _silu(z)
    tl.store(y + row * all_channels + offset + c[None, :], z.to(y.dtype.element_ty), mask)


@triton.jit
def channel_sums(
    dy, x, a, b, centres, betas, gammas, rows, channels, all_channels, offset, splits, length,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums of dz and of dz (x - mean) of each channel over `length` pixels of an image."""
    image, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    own = image.to(tl.int64) * all_channels + offset + c
    scale, shift = tl.load(a + own, inside, 0.0), tl.load(b + own, inside, 0.0)
    centre = tl.load(centres + own, inside, 0.0)
    beta, gamma = tl.zeros([ROWS, CHANNELS], tl.float32), tl.zeros([ROWS, CHANNELS], tl.float32)
    last = tl.minimum((split + 1) * length, rows)
    for first in range(split * length, last, ROWS):
        r = first + tl.arange(0, ROWS)
        mask = (r < last)[:, None] & inside[None, :]
        row = (image.to(tl.int64) * rows + r)[:, None]
        values = tl.load(x + row * channels + c[None, :], mask, 0.0).to(tl.float32)
        dz = tl.load(dy + row * all_channels + offset + c[None, :], mask, 0.0).to(tl.float32)
        if ACTIVATION:
            dz *= _silu_gradient(values * scale[None, :] + shift[None, :])
        beta += dz
        gamma += dz * (values - centre[None, :])
    place = tl.program_id(0).to(tl.int64) * all_channels + offset + c
    tl.store(betas + place, tl.sum(beta, 0), inside)
    tl.store(gammas + place, tl.sum(gamma, 0), inside)


@triton.jit
def gradient_coefficients(
    betas, gammas, weight, bias, modulation, a, centres, rstds, averages, slopes, rests, d_weight, d_bias, d_modulation,
    d_added, rows, channels, size, splits,
    MODULATED: tl.constexpr, ADDED: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """dx = a dz + slope x + rest of one group of one image, and its share of the parameters' gradients."""
    image, group, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    j, s = tl.arange(0, SIZE), tl.arange(0, SPLITS)
    c, mask = group * size + j, j < size
    place = (image.to(tl.int64) * splits + s)[:, None] * channels + c[None, :]
    both = (s < splits)[:, None] & mask[None, :]
    own = image.to(tl.int64) * channels + c
    centre, rstd = tl.load(centres + own, mask, 0.0), tl.load(rstds + image * groups + group)
    d_beta = tl.sum(tl.load(betas + place, both, 0.0), 0)
    d_gamma = tl.sum(tl.load(gammas + place, both, 0.0), 0) * rstd  # sum of dz n
    gamma, _, one = _gains(weight, bias, modulation, image, c, channels, mask, MODULATED)
    first = tl.sum(tl.where(mask, gamma * d_beta, 0.0), 0) / (size * rows)
    second = tl.sum(tl.where(mask, gamma * d_gamma, 0.0), 0) / (size * rows)
    slope = -second * rstd * rstd
    rest = -centre * slope - first * rstd
    tl.store(slopes + own, tl.zeros(rest.shape, tl.float32) + slope, mask)
    tl.store(rests + own, rest, mask)
    if ADDED:  # the sum of dx over the pixels
        scale, average = tl.load(a + own, mask, 0.0), tl.load(averages + own, mask, 0.0)
        tl.store(d_added + own, scale * d_beta + rows * (slope * average + rest), mask)
    tl.store(d_weight + own, d_gamma * one, mask)
    tl.store(d_bias + own, d_beta * one, mask)
    if MODULATED:
        plain, shift = tl.load(weight + c, mask, 0.0).to(tl.float32), tl.load(bias + c, mask, 0.0).to(tl.float32)
        out = d_modulation + image.to(tl.int64) * 2 * channels + c
        tl.store(out, (d_gamma * plain + d_beta * shift).to(d_modulation.dtype.element_ty), mask)
        tl.store(out + channels, d_beta.to(d_modulation.dtype.element_ty), mask)


@triton.jit
def input_gradient(
    dy, x, a, b, slopes, rests, dx, rows, channels, all_channels, offset, blocks,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx = a dz + slope x + rest."""
    image, r = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    mask = (r < rows)[:, None] & inside[None, :]
    row = (image.to(tl.int64) * rows + r)[:, None]
    own = image.to(tl.int64) * all_channels + offset + c
    scale, shift = tl.load(a + own, inside, 0.0), tl.load(b + own, inside, 0.0)
    slope, rest = tl.load(slopes + own, inside, 0.0), tl.load(rests + own, inside, 0.0)
    values = tl.load(x + row * channels + c[None, :], mask, 0.0).to(tl.float32)
    dz = tl.load(dy + row * all_channels + offset + c[None, :], mask, 0.0).to(tl.float32)
    if ACTIVATION:
        dz *= _silu_gradient(values * scale[None, :] + shift[None, :])
    gradient = scale[None, :] * dz + slope[None, :] * values + rest[None, :]
    tl.store(dx + row * channels + c[None, :], gradient.to(dx.dtype.element_ty), mask)


@triton.jit
def add(x, y, z, bias, out, numbers, channels, THREE: tl.constexpr, BLOCK: tl.constexpr):
    """out = x + y + z + bias of the channel."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < numbers
    total = tl.load(x + place, mask, 0.0).to(tl.float32) + tl.load(y + place, mask, 0.0).to(tl.float32)
    if THREE:
        total += tl.load(z + place, mask, 0.0).to(tl.float32)
    total += tl.load(bias + place % channels, mask, 0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask)


@triton.jit
def total(x, sums, rows, channels, length, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Sums of each channel over `length` of all pixels."""
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    start = tl.program_id(0).to(tl.int64) * length
    last = tl.minimum(start + length, rows)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(start, last, ROWS):
        r = first + tl.arange(0, ROWS)
        mask = (r < last)[:, None] & (c < channels)[None, :]
        total += tl.load(x + r[:, None] * channels + c[None, :], mask, 0.0).to(tl.float32)
    tl.store(sums + tl.program_id(0).to(tl.int64) * channels + c, tl.sum(total, 0), c < channels)
