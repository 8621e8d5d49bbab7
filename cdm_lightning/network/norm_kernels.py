"""The modulated group norm on a GPU: Triton kernels that read each activation as few times as the maths allows.

Forward: one pass for the statistics of channels, one that writes y. Backward: one pass for two sums of each channel,
one that writes dx. Between them, small kernels turn (B, C) numbers into coefficients. All sums are float32. Long images
are split among programs, whose means and squared deviations are merged without loss of digits (Chan et al. 1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

ROWS, CHANNELS = 32, 64  # pixels and channels that a program holds at a time
PROGRAMS = 1024  # enough to fill a GPU; images are split until there are so many
MAX_SPLITS = 64


@triton.jit
def _silu(z):
    return z * tl.sigmoid(z)


@triton.jit
def _silu_gradient(z):
    s = tl.sigmoid(z)
    return s * (1 + z * (1 - s))


@triton.jit
def _channel_statistics(
    x, means, squares, rows, channels, all_channels, offset, splits, length, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Mean and sum of squared deviations of each channel over `length` pixels of an image."""
    image, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    start = x + image.to(tl.int64) * rows * channels
    last = tl.minimum((split + 1) * length, rows)
    mean, square = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    count = 0.0
    for first in range(split * length, last, ROWS):
        r = first + tl.arange(0, ROWS)
        mask = (r < last)[:, None] & (c < channels)[None, :]
        values = tl.load(start + r[:, None] * channels + c[None, :], mask, 0.0).to(tl.float32)
        here = tl.minimum(last - first, ROWS).to(tl.float32)
        tile_mean = tl.sum(values, 0) / here
        deviation = tl.where(mask, values - tile_mean[None, :], 0.0)
        step = tile_mean - mean
        total = count + here
        square += tl.sum(deviation * deviation, 0) + step * step * (count * here / total)
        mean += step * (here / total)
        count = total
    place = tl.program_id(0).to(tl.int64) * all_channels + offset + c
    tl.store(means + place, mean, c < channels)
    tl.store(squares + place, square, c < channels)


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
def _coefficients(
    means, squares, weight, bias, modulation, a, b, centres, rstds, rows, channels, size, splits, length, eps,
    MODULATED: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """a and b of y = act(a x + b), for one group of one image."""
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
    centre = tl.sum(mean, 0) / size
    step = tl.where(mask, mean - centre, 0.0)
    variance = tl.sum(square / rows + step * step, 0) / size
    rstd = 1 / tl.sqrt(variance + eps)
    gamma, beta, _ = _gains(weight, bias, modulation, image, c, channels, mask, MODULATED)
    own = image.to(tl.int64) * channels + c
    tl.store(a + own, rstd * gamma, mask)
    tl.store(b + own, beta - centre * rstd * gamma, mask)
    tl.store(centres + image * groups + group, centre)
    tl.store(rstds + image * groups + group, rstd)


@triton.jit
def _apply(
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
def _channel_sums(
    dy, x, a, b, centres, betas, gammas, rows, channels, all_channels, offset, size, groups, splits, length,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums of dz and of dz (x - mean) of each channel over `length` pixels of an image."""
    image, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    own = image.to(tl.int64) * all_channels + offset + c
    scale, shift = tl.load(a + own, inside, 0.0), tl.load(b + own, inside, 0.0)
    centre = tl.load(centres + image * groups + (offset + c) // size, inside, 0.0)
    beta, gamma = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    last = tl.minimum((split + 1) * length, rows)
    for first in range(split * length, last, ROWS):
        r = first + tl.arange(0, ROWS)
        mask = (r < last)[:, None] & inside[None, :]
        row = (image.to(tl.int64) * rows + r)[:, None]
        values = tl.load(x + row * channels + c[None, :], mask, 0.0).to(tl.float32)
        dz = tl.load(dy + row * all_channels + offset + c[None, :], mask, 0.0).to(tl.float32)
        if ACTIVATION:
            dz *= _silu_gradient(values * scale[None, :] + shift[None, :])
        beta += tl.sum(dz, 0)
        gamma += tl.sum(dz * (values - centre[None, :]), 0)
    place = tl.program_id(0).to(tl.int64) * all_channels + offset + c
    tl.store(betas + place, beta, inside)
    tl.store(gammas + place, gamma, inside)


@triton.jit
def _gradient_coefficients(
    betas, gammas, weight, bias, modulation, centres, rstds, slopes, rests, d_weight, d_bias, d_modulation,
    rows, channels, size, splits, MODULATED: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """dx = a dz + slope x + rest of one group of one image, and its share of the parameters' gradients."""
    image, group, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    j, s = tl.arange(0, SIZE), tl.arange(0, SPLITS)
    c, mask = group * size + j, j < size
    place = (image.to(tl.int64) * splits + s)[:, None] * channels + c[None, :]
    both = (s < splits)[:, None] & mask[None, :]
    centre, rstd = tl.load(centres + image * groups + group), tl.load(rstds + image * groups + group)
    d_beta = tl.sum(tl.load(betas + place, both, 0.0), 0)
    d_gamma = tl.sum(tl.load(gammas + place, both, 0.0), 0) * rstd  # sum of dz n
    gamma, _, one = _gains(weight, bias, modulation, image, c, channels, mask, MODULATED)
    first = tl.sum(tl.where(mask, gamma * d_beta, 0.0), 0) / (size * rows)
    second = tl.sum(tl.where(mask, gamma * d_gamma, 0.0), 0) / (size * rows)
    slope = -second * rstd * rstd
    tl.store(slopes + image * groups + group, slope)
    tl.store(rests + image * groups + group, -centre * slope - first * rstd)
    own = image.to(tl.int64) * channels + c
    tl.store(d_weight + own, d_gamma * one, mask)
    tl.store(d_bias + own, d_beta * one, mask)
    if MODULATED:
        plain, shift = tl.load(weight + c, mask, 0.0).to(tl.float32), tl.load(bias + c, mask, 0.0).to(tl.float32)
        out = d_modulation + image.to(tl.int64) * 2 * channels + c
        tl.store(out, (d_gamma * plain + d_beta * shift).to(d_modulation.dtype.element_ty), mask)
        tl.store(out + channels, d_beta.to(d_modulation.dtype.element_ty), mask)


@triton.jit
def _input_gradient(
    dy, x, a, b, slopes, rests, dx, rows, channels, all_channels, offset, size, groups, blocks,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx = a dz + slope x + rest."""
    image, r = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    mask = (r < rows)[:, None] & inside[None, :]
    row = (image.to(tl.int64) * rows + r)[:, None]
    own = image.to(tl.int64) * all_channels + offset + c
    group = image * groups + (offset + c) // size
    scale, shift = tl.load(a + own, inside, 0.0), tl.load(b + own, inside, 0.0)
    slope, rest = tl.load(slopes + group, inside, 0.0), tl.load(rests + group, inside, 0.0)
    values = tl.load(x + row * channels + c[None, :], mask, 0.0).to(tl.float32)
    dz = tl.load(dy + row * all_channels + offset + c[None, :], mask, 0.0).to(tl.float32)
    if ACTIVATION:
        dz *= _silu_gradient(values * scale[None, :] + shift[None, :])
    gradient = scale[None, :] * dz + slope[None, :] * values + rest[None, :]
    tl.store(dx + row * channels + c[None, :], gradient.to(dx.dtype.element_ty), mask)


class Tiles:
    """How the work on activations of (B, C, H, W) is cut into programs."""

    def __init__(self, parts: Sequence[torch.Tensor], groups: int) -> None:
        self.batch, _, height, width = parts[0].shape
        self.rows, self.groups = height * width, groups
        self.widths = [part.shape[1] for part in parts]
        self.offsets = [sum(self.widths[:number]) for number in range(len(parts))]
        self.channels = sum(self.widths)
        self.size = self.channels // groups
        self.size_block = triton.next_power_of_2(self.size)
        wanted = PROGRAMS // max(1, self.batch * triton.cdiv(self.channels, CHANNELS))
        most = triton.cdiv(self.rows, ROWS)
        self.length = ROWS * triton.cdiv(most, max(1, min(wanted, most, MAX_SPLITS)))
        self.splits = triton.cdiv(self.rows, self.length)
        self.split_block = triton.next_power_of_2(self.splits)
        self.blocks = triton.cdiv(self.rows, ROWS)

    def reducing(self, width: int) -> tuple[int, int]:
        """The grid of a kernel that reduces over the pixels of a part of `width` channels."""
        return self.batch * self.splits, triton.cdiv(width, CHANNELS)

    def mapping(self, width: int) -> tuple[int, int]:
        """The grid of a kernel that writes a part of `width` channels."""
        return self.batch * self.blocks, triton.cdiv(width, CHANNELS)


class KernelNorm(torch.autograd.Function):
    """y = act(a x + b) of `ModulatedNorm`, with the gradient that `_ModulatedNorm` states."""

    @staticmethod
    def forward(ctx: Any, settings: tuple[int, float, bool], *tensors: Any) -> torch.Tensor:
        (groups, eps, activation), (weight, bias, modulation, *parts) = settings, tensors
        parts = [part.contiguous(memory_format=torch.channels_last) for part in parts]
        modulation = None if modulation is None else modulation.contiguous()
        t, numbers = Tiles(parts, groups), {"dtype": torch.float32, "device": parts[0].device}
        means, squares = torch.empty(2, t.batch * t.splits, t.channels, **numbers).unbind()
        a, b = torch.empty(2, t.batch, t.channels, **numbers).unbind()
        centres, rstds = torch.empty(2, t.batch, groups, **numbers).unbind()
        y = parts[0].new_empty((t.batch, *parts[0].shape[2:], t.channels)).permute(0, 3, 1, 2)
        for part, width, offset in zip(parts, t.widths, t.offsets, strict=True):
            _channel_statistics[t.reducing(width)](
                part, means, squares, t.rows, width, t.channels, offset, t.splits, t.length, ROWS, CHANNELS
            )
        _coefficients[(t.batch, groups)](
            means, squares, weight, bias, modulation, a, b, centres, rstds, t.rows, t.channels, t.size, t.splits,
            t.length, eps, modulation is not None, t.size_block, t.split_block,
        )  # fmt: skip
        for part, width, offset in zip(parts, t.widths, t.offsets, strict=True):
            _apply[t.mapping(width)](
                part, a, b, y, t.rows, width, t.channels, offset, t.blocks, activation, ROWS, CHANNELS
            )
        ctx.save_for_backward(weight, bias, modulation, a, b, centres, rstds, *parts)
        ctx.settings = settings
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:  # type: ignore[override]  # one output
        (groups, _, activation) = ctx.settings
        weight, bias, modulation, a, b, centres, rstds, *parts = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        t, numbers = Tiles(parts, groups), {"dtype": torch.float32, "device": dy.device}
        betas, gammas = torch.empty(2, t.batch * t.splits, t.channels, **numbers).unbind()
        slopes, rests = torch.empty(2, t.batch, groups, **numbers).unbind()
        d_weight, d_bias = torch.empty(2, t.batch, t.channels, **numbers).unbind()
        d_modulation = None if modulation is None else torch.empty_like(modulation)
        dx = [torch.empty_like(part) for part in parts]
        for part, width, offset in zip(parts, t.widths, t.offsets, strict=True):
            _channel_sums[t.reducing(width)](
                dy, part, a, b, centres, betas, gammas, t.rows, width, t.channels, offset, t.size, groups, t.splits,
                t.length, activation, ROWS, CHANNELS,
            )  # fmt: skip
        _gradient_coefficients[(t.batch, groups)](
            betas, gammas, weight, bias, modulation, centres, rstds, slopes, rests, d_weight, d_bias, d_modulation,
            t.rows, t.channels, t.size, t.splits, modulation is not None, t.size_block, t.split_block,
        )  # fmt: skip
        for part, width, offset, out in zip(parts, t.widths, t.offsets, dx, strict=True):
            _input_gradient[t.mapping(width)](
                dy, part, a, b, slopes, rests, out, t.rows, width, t.channels, offset, t.size, groups, t.blocks,
                activation, ROWS, CHANNELS,
            )  # fmt: skip
        return None, d_weight.sum(0).to(weight.dtype), d_bias.sum(0).to(bias.dtype), d_modulation, *dx
