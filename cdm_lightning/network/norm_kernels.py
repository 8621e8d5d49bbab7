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
NUMBERS = 2048  # of an activation that a program adds
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
def _coefficients(
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
def _gradient_coefficients(
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
def _input_gradient(
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


class Tiles:
    """How the work on activations of (B, C, H, W) is cut into programs."""

    def __init__(self, parts: Sequence[torch.Tensor], groups: int) -> None:
        self.batch, _, height, width = parts[0].shape
        self.rows = height * width
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


@triton.jit
def _add(x, y, z, bias, out, numbers, channels, THREE: tl.constexpr, BLOCK: tl.constexpr):
    """out = x + y + z + bias of the channel."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < numbers
    total = tl.load(x + place, mask, 0.0).to(tl.float32) + tl.load(y + place, mask, 0.0).to(tl.float32)
    if THREE:
        total += tl.load(z + place, mask, 0.0).to(tl.float32)
    total += tl.load(bias + place % channels, mask, 0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask)


@triton.jit
def _sum(x, sums, rows, channels, length, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
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


class KernelNorm(torch.autograd.Function):
    """y = act(a (x + added) + b) of `ModulatedNorm`, with the gradient that `_ModulatedNorm` states.

    added: (C,), a bias that the convolution before left to the norm, for a single part; or None. Here it costs nothing,
    and the sum that is its gradient is known without another pass.
    """

    @staticmethod
    def forward(ctx: Any, settings: tuple[int, float, bool], *tensors: Any) -> torch.Tensor:
        (groups, eps, activation), (weight, bias, modulation, added, *parts) = settings, tensors
        parts = [part.contiguous(memory_format=torch.channels_last) for part in parts]
        modulation = None if modulation is None else modulation.contiguous()
        t = Tiles(parts, groups)
        numbers: dict[str, Any] = {"dtype": torch.float32, "device": parts[0].device}
        means, squares = torch.empty(2, t.batch * t.splits, t.channels, **numbers).unbind()
        a, b, centres, averages = torch.empty(4, t.batch, t.channels, **numbers).unbind()
        rstds = torch.empty(t.batch, groups, **numbers)
        y = parts[0].new_empty((t.batch, *parts[0].shape[2:], t.channels)).permute(0, 3, 1, 2)
        for part, width, offset in zip(parts, t.widths, t.offsets, strict=True):
            _channel_statistics[t.reducing(width)](
                part, means, squares, t.rows, width, t.channels, offset, t.splits, t.length, ROWS, CHANNELS
            )
        _coefficients[(t.batch, groups)](
            means, squares, weight, bias, modulation, added, a, b, centres, rstds, averages, t.rows, t.channels, t.size,
            t.splits, t.length, eps, modulation is not None, added is not None, t.size_block, t.split_block,
        )  # fmt: skip
        for part, width, offset in zip(parts, t.widths, t.offsets, strict=True):
            _apply[t.mapping(width)](
                part, a, b, y, t.rows, width, t.channels, offset, t.blocks, activation, ROWS, CHANNELS
            )
        ctx.save_for_backward(weight, bias, modulation, added, a, b, centres, rstds, averages, *parts)
        ctx.settings = settings
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:  # type: ignore[override]  # one output
        (groups, _, activation) = ctx.settings
        weight, bias, modulation, added, a, b, centres, rstds, averages, *parts = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        t = Tiles(parts, groups)
        numbers: dict[str, Any] = {"dtype": torch.float32, "device": dy.device}
        betas, gammas = torch.empty(2, t.batch * t.splits, t.channels, **numbers).unbind()
        slopes, rests = torch.empty(2, t.batch, t.channels, **numbers).unbind()
        gradients = torch.empty(3, t.batch, t.channels, **numbers)  # of weight, bias and added, for each image
        d_weight, d_bias, d_added = gradients.unbind()
        d_modulation = None if modulation is None else torch.empty_like(modulation)
        dx = [torch.empty_like(part) for part in parts]
        for part, width, offset in zip(parts, t.widths, t.offsets, strict=True):
            _channel_sums[t.reducing(width)](
                dy, part, a, b, centres, betas, gammas, t.rows, width, t.channels, offset, t.splits, t.length,
                activation, ROWS, CHANNELS,
            )  # fmt: skip
        _gradient_coefficients[(t.batch, groups)](
            betas, gammas, weight, bias, modulation, a, centres, rstds, averages, slopes, rests, d_weight, d_bias,
            d_modulation, d_added, t.rows, t.channels, t.size, t.splits, modulation is not None, added is not None,
            t.size_block, t.split_block,
        )  # fmt: skip
        for part, width, offset, out in zip(parts, t.widths, t.offsets, dx, strict=True):
            _input_gradient[t.mapping(width)](
                dy, part, a, b, slopes, rests, out, t.rows, width, t.channels, offset, t.blocks, activation, ROWS,
                CHANNELS,
            )  # fmt: skip
        d_weight, d_bias, d_added = gradients.sum(1).unbind()
        of_added = None if added is None else d_added.to(added.dtype)
        return None, d_weight.to(weight.dtype), d_bias.to(bias.dtype), d_modulation, of_added, *dx


class KernelAdd(torch.autograd.Function):
    """The sum of two or three tensors (B, C, H, W) and a bias (C,): one pass, and one for the bias's gradient."""

    @staticmethod
    def forward(ctx: Any, bias: torch.Tensor, *addends: torch.Tensor) -> torch.Tensor:
        parts = [part.contiguous(memory_format=torch.channels_last) for part in addends]
        out = torch.empty_like(parts[0])
        x, y, z = (*parts, parts[0])[:3]
        grid = (triton.cdiv(out.numel(), NUMBERS),)
        _add[grid](x, y, z, bias, out, out.numel(), out.shape[1], len(parts) == 3, NUMBERS)
        ctx.dtypes = [bias.dtype, *(part.dtype for part in addends)]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:  # type: ignore[override]  # one output
        dy = dy.contiguous(memory_format=torch.channels_last)
        channels, rows = dy.shape[1], dy.numel() // dy.shape[1]
        columns = triton.cdiv(channels, CHANNELS)
        length = ROWS * triton.cdiv(rows, ROWS * max(1, PROGRAMS // columns))
        programs = triton.cdiv(rows, length)
        sums = torch.empty(programs, channels, dtype=torch.float32, device=dy.device)
        _sum[(programs, columns)](dy, sums, rows, channels, length, ROWS, CHANNELS)
        d_bias, *rest = ctx.dtypes
        return sums.sum(0).to(d_bias), *(dy.to(dtype) for dtype in rest)
