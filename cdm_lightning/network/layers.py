"""Layers of the U-Net: a fused modulated group norm, and convolutions by the kernels that are fastest here.

The norm, its modulation and SiLU are one operation, which keeps its input and computes the rest again in backward.
A U-Net reads and writes its activations far more often than it computes with them. Done step by step, these three would
leave three images behind for the backward pass and take a pass over memory each; here they leave none. Everything runs
along the channels, which lie side by side in memory (torch.channels_last) as convolutions want them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from cdm_lightning.foundation.errors import InputError

FUSED_MIN_SIZE = 2**17  # numbers in x; below, the plain form is faster, which makes fewer calls
SQUARES = torch.ops.aten.mse_loss  # (a - b)^2 without a's difference from b in memory
NONE = 0  # its reduction


class ModulatedNorm(nn.GroupNorm):
    """act((1 + scale) norm(x) + shift), norm over `groups` groups of channels, act SiLU or the identity.

    x: (B, C, H, W), or several tensors side by side along the channels, whose concatenation is never made. modulation:
    (B, 2C), scale and shift per image, or None. The fused form computes in float32 at least.
    """

    def __init__(self, channels: int, groups: int, activation: bool = True) -> None:
        if channels % groups:
            raise InputError(f"norm_groups {groups} does not divide the {channels} channels of a layer")
        super().__init__(groups, channels)
        self.activation = activation

    def forward(self, *x: torch.Tensor, modulation: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]  # takes parts
        # A compiler fuses the plain form by itself, and chooses what to keep.
        if torch.compiler.is_compiling() or sum(part.numel() for part in x) < FUSED_MIN_SIZE:
            return self.plain(*x, modulation=modulation)
        settings = (self.num_groups, self.eps, self.activation)
        return _ModulatedNorm.apply(settings, self.weight, self.bias, modulation, *x)

    def plain(self, *x: torch.Tensor, modulation: torch.Tensor | None = None) -> torch.Tensor:
        """The same by torch's own operations, one after another."""
        h = super().forward(torch.cat(x, dim=1) if len(x) > 1 else x[0])
        if modulation is not None:
            scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
            h = torch.addcmul(shift, h, 1 + scale)
        return F.silu(h) if self.activation else h


class _ModulatedNorm(torch.autograd.Function):
    """y = act(a x + b), a = gamma rstd, b = beta - mean a, gamma = weight (1 + scale), beta = bias (1 + scale) + shift.

    Backward, with z = a x + b, n = (x - mean) rstd and averages <.> over a group:
    dx = rstd (gamma dz - <gamma dz> - n <gamma dz n>), which is linear in dz and x channel by channel.
    """

    @staticmethod
    def forward(ctx: Any, settings: tuple[int, float, bool], *tensors: Any) -> torch.Tensor:
        (groups, eps, activation), (weight, bias, modulation, *parts) = settings, tensors
        y = _empty(parts)
        mean, rstd = _statistics(parts, groups, eps, y)  # (B, C)
        gamma, beta = _modulated(weight, bias, modulation)
        a = rstd * gamma
        _affine(parts, a, torch.addcmul(beta, mean, a, value=-1), y)
        ctx.save_for_backward(weight, bias, modulation, mean, rstd, *parts)
        ctx.settings = settings
        return (F.silu(y, inplace=True) if activation else y).to(parts[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:  # type: ignore[override]  # one output
        (groups, _, activation), (weight, bias, modulation, mean, rstd, *parts) = ctx.settings, ctx.saved_tensors
        gamma, beta = _modulated(weight, bias, modulation)
        a = rstd * gamma
        dz = dy.to(a.dtype).contiguous(memory_format=torch.channels_last)
        if activation:
            z = _affine(parts, a, torch.addcmul(beta, mean, a, value=-1), _empty(parts))
            dz = torch.ops.aten.silu_backward.grad_input(dz, z, grad_input=z)
        dx = [_empty([part]) for part in parts]
        slices = _rows(dz).split([part.shape[1] for part in parts], dim=2)
        of_beta = _rows(dz).sum(1)  # (B, C): what beta is told, image by image
        products = [
            torch.mul(rows, _rows(part), out=_rows(out)).sum(1)
            for rows, part, out in zip(slices, parts, dx, strict=True)
        ]
        of_gamma = rstd * (torch.cat(products, 1) - mean * of_beta)  # sum of dz n
        size = dz[0].numel() / groups
        first, second = (_per_group(gamma * of, groups, torch.sum) / size for of in (of_beta, of_gamma))
        of_x = -second * rstd.square()  # dx = a dz + of_x x + rest
        rest = -mean * of_x - first * rstd
        linear = [value[:, None].split([part.shape[1] for part in parts], dim=2) for value in (rest, of_x, a)]
        for part, rows, out, b, of_part, of_rows in zip(parts, slices, dx, *linear, strict=True):
            torch.addcmul(b, _rows(part), of_part, out=_rows(out)).addcmul_(rows, of_rows)
        of_modulation = None
        if modulation is not None:
            of_modulation = torch.cat([of_gamma * weight + of_beta * bias, of_beta], 1).to(modulation.dtype)
            of_gamma, of_beta = (of * (1 + modulation[:, : len(weight)]) for of in (of_gamma, of_beta))
        return (
            None,
            of_gamma.sum(0),
            of_beta.sum(0),
            of_modulation,
            *(g.to(p.dtype) for g, p in zip(dx, parts, strict=True)),
        )


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) to (B, HW, C) of float32 at least, a view where x is that and channels_last."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).flatten(1, 2)


def _empty(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Memory for the parts side by side, (B, C, H, W) of float32 at least, in channels_last."""
    (b, _, h, w), dtype = parts[0].shape, torch.promote_types(parts[0].dtype, torch.float32)
    return parts[0].new_empty((b, h, w, sum(part.shape[1] for part in parts)), dtype=dtype).permute(0, 3, 1, 2)


def _per_group(values: torch.Tensor, groups: int, reduce: Any) -> torch.Tensor:
    """(B, C) to (B, C): every channel gets what `reduce` makes of its group."""
    grouped = values.view(len(values), groups, -1)
    return reduce(grouped, 2, keepdim=True).expand_as(grouped).reshape(values.shape)


def _statistics(
    parts: Sequence[torch.Tensor], groups: int, eps: float, scratch: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each channel's group, (B, C), over all parts. scratch: as `_empty` makes it.

    The variance within channels, around each one's own mean, plus that of the means: no large numbers are subtracted.
    """
    means = [_rows(part).mean(1) for part in parts]
    room = _rows(scratch).split([part.shape[1] for part in parts], dim=2)
    within = []
    for part, mean, out in zip(parts, means, room, strict=True):
        rows = _rows(part)
        within.append(SQUARES.out(rows, mean[:, None].expand_as(rows), NONE, out=out).mean(1))
    mean = torch.cat(means, 1)
    centre = _per_group(mean, groups, torch.mean)
    variance = _per_group(torch.cat(within, 1) + (mean - centre).square(), groups, torch.mean)
    return centre, (variance + eps).rsqrt()


def _modulated(
    weight: torch.Tensor, bias: torch.Tensor, modulation: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """gamma = weight (1 + scale) and beta = bias (1 + scale) + shift: (B, C), without modulation (C,)."""
    if modulation is None:
        return weight, bias
    scale, shift = modulation.to(torch.promote_types(modulation.dtype, weight.dtype)).chunk(2, dim=1)
    return weight * (1 + scale), torch.addcmul(shift, bias, 1 + scale)


def _affine(parts: Sequence[torch.Tensor], a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """a x + b of the parts side by side, into `out`, as `_empty` makes it. a, b: (B, C)."""
    split = [value.split([part.shape[1] for part in parts], dim=2) for value in (_rows(out), a[:, None], b[:, None])]
    for part, room, times, plus in zip(parts, *split, strict=True):
        torch.addcmul(plus, _rows(part), times, out=room)
    return out


def conv_of_upsampled(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """conv(x repeated 2x2), a 3x3 convolution: (B, C, H, W) to (B, C', 2H, 2W).

    The nine taps fall on four pixels of x. As a transposed convolution with their sums, 4x4 in steps of 2, this takes
    4/9 of the arithmetic; below 8x8 the plain form is faster.
    """
    if x.device.type != "cpu" or min(x.shape[2:]) < 8:
        return conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    sums = 4 * F.avg_pool2d(F.pad(conv.weight.flip(2, 3), (1, 1, 1, 1)), 2, stride=1)
    return F.conv_transpose2d(x, sums.transpose(0, 1), conv.bias, stride=2, padding=1)


def pointwise(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """The layer along the channels: (B, C, H, W) to (B, C', H, W).

    On a CPU a 1x1 convolution, whose kernels are up to twice as fast as those of the matrix product.
    """
    if x.device.type == "cpu":
        return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
