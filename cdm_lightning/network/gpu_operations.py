"""The modulated group norm, and sums with a bias, as operations of a GPU: what they store, and the kernels they launch.

The norm, forward: one pass over memory for the statistics of channels, one that writes y. Backward: one pass for two
sums of each channel, one that writes dx. Between them, small kernels turn (B, C) numbers into coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

ROWS, CHANNELS = 32, 64  # pixels and channels that a program holds at a time
NUMBERS = 2048  # of an activation that a program adds
PROGRAMS = 1024  # enough to fill a GPU; images are split until there are so many
MAX_SPLITS = 64


def launch(kernel: str, grid: tuple[int, ...]) -> Callable[..., None]:
    """What launches a kernel of `norm_kernels` on its arguments; tensors without data, of a plan, it leaves alone."""

    def with_arguments(first: torch.Tensor, *arguments: Any) -> None:
        if not isinstance(first, FakeTensor):
            kernel_named(kernel)[grid](first, *arguments)

    return with_arguments


@cache
def kernel_named(name: str) -> Any:
    """A kernel of `norm_kernels`, looked up once: a training step launches thousands."""
    from cdm_lightning.network import norm_kernels  # later: it needs Triton, which torch for CPUs lacks

    return getattr(norm_kernels, name)


def parts_of(whole: int, part: int) -> int:
    """How many parts a whole is cut into, the last of which may be smaller."""
    return -(-whole // part)


def power_of_2(number: int) -> int:
    """The least power of 2 from `number` on."""
    return 1 << (number - 1).bit_length()


class Tiles:
    """How the work on activations of (B, C, H, W) is cut into programs."""

    def __init__(self, parts: Sequence[torch.Tensor], groups: int) -> None:
        self.batch, _, height, width = parts[0].shape
        self.rows = height * width
        self.widths = [part.shape[1] for part in parts]
        self.offsets = [sum(self.widths[:number]) for number in range(len(parts))]
        self.channels = sum(self.widths)
        self.size = self.channels // groups
        self.size_block = power_of_2(self.size)
        wanted = PROGRAMS // max(1, self.batch * parts_of(self.channels, CHANNELS))
        most = parts_of(self.rows, ROWS)
        self.length = ROWS * parts_of(most, max(1, min(wanted, most, MAX_SPLITS)))
        self.splits = parts_of(self.rows, self.length)
        self.split_block = power_of_2(self.splits)
        self.blocks = parts_of(self.rows, ROWS)

    def reducing(self, width: int) -> tuple[int, int]:
        """The grid of a kernel that reduces over the pixels of a part of `width` channels."""
        return self.batch * self.splits, parts_of(width, CHANNELS)

    def mapping(self, width: int) -> tuple[int, int]:
        """The grid of a kernel that writes a part of `width` channels."""
        return self.batch * self.blocks, parts_of(width, CHANNELS)


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
            launch("channel_statistics", t.reducing(width))(
                part, means, squares, t.rows, width, t.channels, offset, t.splits, t.length, ROWS, CHANNELS
            )
        launch("coefficients", (t.batch, groups))(
            means, squares, weight, bias, modulation, added, a, b, centres, rstds, averages, t.rows, t.channels, t.size,
            t.splits, t.length, eps, modulation is not None, added is not None, t.size_block, t.split_block,
        )  # fmt: skip
        for part, width, offset in zip(parts, t.widths, t.offsets, strict=True):
            launch("normalise", t.mapping(width))(
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
            launch("channel_sums", t.reducing(width))(
                dy, part, a, b, centres, betas, gammas, t.rows, width, t.channels, offset, t.splits, t.length,
                activation, ROWS, CHANNELS,
            )  # fmt: skip
        launch("gradient_coefficients", (t.batch, groups))(
            betas, gammas, weight, bias, modulation, a, centres, rstds, averages, slopes, rests, d_weight, d_bias,
            d_modulation, d_added, t.rows, t.channels, t.size, t.splits, modulation is not None, added is not None,
            t.size_block, t.split_block,
        )  # fmt: skip
        for part, width, offset, out in zip(parts, t.widths, t.offsets, dx, strict=True):
            launch("input_gradient", t.mapping(width))(
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
        grid = (parts_of(out.numel(), NUMBERS),)
        launch("add", grid)(x, y, z, bias, out, out.numel(), out.shape[1], len(parts) == 3, NUMBERS)
        ctx.dtypes = [bias.dtype, *(part.dtype for part in addends)]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:  # type: ignore[override]  # one output
        dy = dy.contiguous(memory_format=torch.channels_last)
        channels, rows = dy.shape[1], dy.numel() // dy.shape[1]
        columns = parts_of(channels, CHANNELS)
        length = ROWS * parts_of(rows, ROWS * max(1, PROGRAMS // columns))
        programs = parts_of(rows, length)
        sums = torch.empty(programs, channels, dtype=torch.float32, device=dy.device)
        launch("total", (programs, columns))(dy, sums, rows, channels, length, ROWS, CHANNELS)
        d_bias, *rest = ctx.dtypes
        return sums.sum(0).to(d_bias), *(dy.to(dtype) for dtype in rest)
