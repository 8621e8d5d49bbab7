"""Layers of the U-Net: a fused, modulated group norm, and convolutions in the form that is fastest on the device.

The time of a U-Net goes to reading and writing its activations. As three operations, the norm, its modulation and SiLU
would store three activations for the backward pass and pass over memory three times. Here they are one operation, which
stores its input only and recomputes the rest in the backward pass. All layers use torch.channels_last, the layout that
is fastest for convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.network.gpu_operations import KernelAdd, KernelNorm

FUSED_MIN_SIZE = 2**17  # numbers in x; below this the plain form is faster, as it makes fewer calls
SQUARED_DIFFERENCE = torch.ops.aten.mse_loss  # (a - b)^2 without storing a - b
NO_REDUCTION = 0


class ModulatedNorm(nn.GroupNorm):
    """act((1 + scale) norm(x) + shift): norm is group norm over `groups` groups, act is SiLU or the identity.

    x: (B, C, H, W), or several tensors that stand for their concatenation along the channels, which is not stored.
    modulation: (B, 2C), scale and shift of each image, or None. added: a bias (C,) that `convolution` left, which is
    added to x first, or None. The fused form computes in float32 or float64.
    """

    def __init__(self, channels: int, groups: int, activation: bool = True) -> None:
        if channels % groups:
            raise InputError(f"norm_groups {groups} does not divide the {channels} channels of a layer")
        super().__init__(groups, channels)
        self.activation = activation

    def forward(  # type: ignore[override]  # takes parts
        self, *x: torch.Tensor, modulation: torch.Tensor | None = None, added: torch.Tensor | None = None
    ) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return self.compilable(*x, modulation=modulation)
        settings, weights = (self.num_groups, self.eps, self.activation), (self.weight, self.bias, modulation)
        if uses_kernels(x[0]):
            return KernelNorm.apply(settings, *weights, added, *x)
        if form(x[0]) != "cpu" or sum(part.numel() for part in x) < FUSED_MIN_SIZE:
            return self.plain(*x, modulation=modulation)
        return _ModulatedNorm.apply(settings, *weights, *x)

    def plain(self, *x: torch.Tensor, modulation: torch.Tensor | None = None) -> torch.Tensor:
        """The same function as a sequence of torch operations."""
        h = super().forward(torch.cat(x, dim=1) if len(x) > 1 else x[0])
        if modulation is not None:
            scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
            h = torch.addcmul(shift, h, 1 + scale)
        return F.silu(h) if self.activation else h

    def compilable(self, *x: torch.Tensor, modulation: torch.Tensor | None = None) -> torch.Tensor:
        """The same function as act(a x + b), a and b (B, C), for a compiler, which fuses it by itself.

        Torch's group norm would be read in pieces of a group's few channels. Statistics of single channels first, and
        then of groups, read whole pixels.
        """
        parts = torch.cat(x, dim=1) if len(x) > 1 else x[0]
        h = parts.to(torch.promote_types(parts.dtype, torch.float32))
        variance, mean = torch.var_mean(h, dim=(2, 3), correction=0)  # (B, C)
        centre = _per_group(mean, self.num_groups, torch.mean)
        variance = _per_group(variance + (mean - centre).square(), self.num_groups, torch.mean)
        gamma, beta = _modulated(self.weight, self.bias, modulation)
        a = (variance + self.eps).rsqrt() * gamma
        h = h * a[:, :, None, None] + (beta - centre * a)[:, :, None, None]
        return (F.silu(h) if self.activation else h).to(parts.dtype)


def form(x: torch.Tensor) -> str:
    """The type of the device whose form of a layer computes on x: x's own, but within `forms_of_a_gpu` "cuda"."""
    return "cuda" if _planned_for_a_gpu else x.device.type


_planned_for_a_gpu = False


@contextmanager
def forms_of_a_gpu() -> Iterator[None]:
    """Within this context, layers take their form for a GPU on tensors without data, which a plan gives them."""
    global _planned_for_a_gpu
    _planned_for_a_gpu = True
    try:
        yield
    finally:
        _planned_for_a_gpu = False


def uses_kernels(x: torch.Tensor) -> bool:
    """Whether `gpu_operations` computes on x: on a GPU with Triton, and not while a compiler fuses."""
    if form(x) != "cuda" or x.dtype == torch.float64 or torch.compiler.is_compiling():
        return False
    return _planned_for_a_gpu or find_spec("triton") is not None


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
        d_beta = _rows(dz).sum(1)  # (B, C): gradient of beta for each image
        products = [
            torch.mul(rows, _rows(part), out=_rows(out)).sum(1)
            for rows, part, out in zip(slices, parts, dx, strict=True)
        ]
        d_gamma = rstd * (torch.cat(products, 1) - mean * d_beta)  # sum of dz n
        size = dz[0].numel() / groups
        first, second = (_per_group(gamma * d, groups, torch.sum) / size for d in (d_beta, d_gamma))
        coef_x = -second * rstd.square()  # dx = a dz + coef_x x + rest
        rest = -mean * coef_x - first * rstd
        linear = [value[:, None].split([part.shape[1] for part in parts], dim=2) for value in (rest, coef_x, a)]
        for part, rows, out, rest_part, coef_part, a_part in zip(parts, slices, dx, *linear, strict=True):
            torch.addcmul(rest_part, _rows(part), coef_part, out=_rows(out)).addcmul_(rows, a_part)
        d_modulation = None
        if modulation is not None:
            d_modulation = torch.cat([d_gamma * weight + d_beta * bias, d_beta], 1).to(modulation.dtype)
            d_gamma, d_beta = (d * (1 + modulation[:, : len(weight)]) for d in (d_gamma, d_beta))
        return (
            None,
            d_gamma.sum(0),
            d_beta.sum(0),
            d_modulation,
            *(g.to(p.dtype) for g, p in zip(dx, parts, strict=True)),
        )


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) to (B, HW, C), float32 or float64; a view where x has that type and is channels_last."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).flatten(1, 2)


def _empty(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Uninitialised memory for the concatenated parts: (B, C, H, W), float32 or float64, channels_last."""
    (b, _, h, w), dtype = parts[0].shape, torch.promote_types(parts[0].dtype, torch.float32)
    return parts[0].new_empty((b, h, w, sum(part.shape[1] for part in parts)), dtype=dtype).permute(0, 3, 1, 2)


def _per_group(values: torch.Tensor, groups: int, reduce: Any) -> torch.Tensor:
    """(B, C) to (B, C): every channel gets the reduction over its group."""
    grouped = values.view(len(values), groups, -1)
    return reduce(grouped, 2, keepdim=True).expand_as(grouped).reshape(values.shape)


def _statistics(
    parts: Sequence[torch.Tensor], groups: int, eps: float, scratch: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each channel's group, (B, C), over all parts. scratch: from `_empty`.

    The variance of a group is the mean variance within its channels plus the variance of their means. This avoids the
    difference of large numbers.
    """
    means = [_rows(part).mean(1) for part in parts]
    outs = _rows(scratch).split([part.shape[1] for part in parts], dim=2)
    within = []
    for part, mean, out in zip(parts, means, outs, strict=True):
        rows = _rows(part)
        within.append(SQUARED_DIFFERENCE.out(rows, mean[:, None].expand_as(rows), NO_REDUCTION, out=out).mean(1))
    mean = torch.cat(means, 1)
    centre = _per_group(mean, groups, torch.mean)
    variance = _per_group(torch.cat(within, 1) + (mean - centre).square(), groups, torch.mean)
    return centre, (variance + eps).rsqrt()


def _modulated(
    weight: torch.Tensor, bias: torch.Tensor, modulation: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """gamma = weight (1 + scale) and beta = bias (1 + scale) + shift, (B, C); (C,) without modulation."""
    if modulation is None:
        return weight, bias
    scale, shift = modulation.to(torch.promote_types(modulation.dtype, weight.dtype)).chunk(2, dim=1)
    return weight * (1 + scale), torch.addcmul(shift, bias, 1 + scale)


def _affine(parts: Sequence[torch.Tensor], a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """a x + b over the concatenated parts, written to `out` from `_empty`. a, b: (B, C)."""
    split = [value.split([part.shape[1] for part in parts], dim=2) for value in (_rows(out), a[:, None], b[:, None])]
    for part, out_part, a_part, b_part in zip(parts, *split, strict=True):
        torch.addcmul(b_part, _rows(part), a_part, out=out_part)
    return out


def upsample(x: torch.Tensor) -> torch.Tensor:
    """Every pixel as 2x2: (B, C, H, W) to (B, C, 2H, 2W), in the type of x; autocast would widen it to float32."""
    with torch.autocast(x.device.type, enabled=False):
        return F.interpolate(x, scale_factor=2, mode="nearest")


def conv_of_upsampled(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """conv(upsample(x)) on a CPU, with nearest upsampling by 2 and a 3x3 convolution: (B, C, H, W) to (B, C', 2H, 2W).

    The nine weights fall on four pixels of x. Summed there, they form a 4x4 transposed convolution of stride 2, which
    takes 4/9 of the arithmetic. Below 8x8 the plain form is faster.
    """
    if min(x.shape[2:]) < 8:
        return conv(upsample(x))
    sums = 4 * F.avg_pool2d(F.pad(conv.weight.flip(2, 3), (1, 1, 1, 1)), 2, stride=1)
    return F.conv_transpose2d(x, sums.transpose(0, 1), conv.bias, stride=2, padding=1)


def convolution(
    x: torch.Tensor, conv: nn.Conv2d, weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """conv(x) and None; or on a GPU conv(x) without its bias, and the bias, for `ModulatedNorm` or `add` to add.

    As an operation of its own, a bias and its gradient would pass over memory three more times. weight: in place of the
    convolution's own.
    """
    weight = conv.weight if weight is None else weight
    if not uses_kernels(x):
        return F.conv2d(x, weight, conv.bias, padding=conv.padding), None
    return F.conv2d(x, weight, padding=conv.padding), conv.bias


def add(h: torch.Tensor, bias: torch.Tensor | None, *addends: torch.Tensor) -> torch.Tensor:
    """h plus the addends and, where `convolution` left one, a bias (C,). Without a bias it writes to h."""
    if bias is None:
        for addend in addends:
            h = h.add_(addend)
        return h
    return KernelAdd.apply(bias, h, *addends)


def pointwise(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """A linear layer over the channels of every pixel: (B, C, H, W) to (B, C', H, W).

    On a CPU this runs as a 1x1 convolution, which is up to twice as fast there as a matrix product.
    """
    if form(x) == "cpu":
        return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
