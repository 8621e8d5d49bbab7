"""The network: ADM's U-Net (Dhariwal and Nichol, 2021) with a second time embedding for the augmentation level s."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.network.layers import ModulatedNorm, add, conv_of_upsampled, convolution, form, pointwise, upsample

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)
CompileMode = Literal["default", "reduce-overhead", "max-autotune"]  # of torch.compile; the last two use CUDA graphs

SHAPES = 1000  # of layers and batches that are compiled before torch gives up; its default is 8


def sinusoidal_embedding(t: torch.Tensor, channels: int) -> torch.Tensor:
    """(cos(t w_k), sin(t w_k)), w_k = 10000^(-k / (channels / 2)): (B,) to float32 (B, channels)."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zero_init(layer: Layer) -> Layer:
    """Set a layer's parameters to zero, so that the residual block it ends starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class TimeEmbedding(nn.Sequential):
    """A two-layer MLP on sinusoidal_embedding(t): (B,) to (B, 4 * channels)."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Linear(channels, 4 * channels), nn.SiLU(), nn.Linear(4 * channels, 4 * channels))
        self.channels = channels

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        dtype = next(self.parameters()).dtype
        return super().forward(sinusoidal_embedding(t, self.channels).to(dtype))


class ResidualBlock(nn.Module):
    """x + conv(silu((1 + scale) norm(conv(silu(norm(x)))) + shift)), scale and shift from the embedding.

    scale_factor: 0.5 or 2 resamples both branches (BigGAN's down and up blocks); 1 keeps the size. embedding: width of
    the embedding. The input may be two tensors, which stand for their concatenation along the channels.
    """

    def __init__(
        self, channels_in: int, channels: int, embedding: int, dropout: float, groups: int, scale_factor: float = 1
    ) -> None:
        super().__init__()
        self.norm1 = ModulatedNorm(channels_in, groups)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * channels)
        self.norm2 = ModulatedNorm(channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(channels, channels, 3, padding=1))
        self.skip: nn.Module = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1)
        self.scale_factor = scale_factor

    def forward(self, *x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        h, bias = self.norm1(*x), None  # (B, channels_in, H, W)
        if self.scale_factor > 1 and form(h) == "cpu":
            h = conv_of_upsampled(h, self.conv1)
        else:
            h, bias = convolution(self.resample(h), self.conv1)
        h = self.norm2(h, modulation=self.modulation(embedding), added=bias)  # (B, channels, H', W')
        h, bias = convolution(self.dropout(h), self.conv2)
        skip_bias, terms = self.shortcut(*x)
        if bias is not None and skip_bias is not None:
            bias = bias + skip_bias
        return add(h, bias, *terms)

    def resample(self, x: torch.Tensor) -> torch.Tensor:
        """x at `scale_factor` times its size: 2x2 means, or nearest neighbour."""
        if self.scale_factor < 1:
            return F.avg_pool2d(x, 2)
        return upsample(x) if self.scale_factor > 1 else x

    def shortcut(
        self, x: torch.Tensor, other: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """A bias that is still to be added, or None, and the terms of the skip branch.

        They are x, or its 1x1 convolution; for two tensors, those of the 1x1 convolution of their concatenation.
        """
        if other is None:
            if not isinstance(self.skip, nn.Conv2d):
                return None, [self.resample(x)]
            term, bias = convolution(self.resample(x), self.skip)
            return bias, [term]
        assert isinstance(self.skip, nn.Conv2d)  # a concatenation has more channels than the output
        weight_x, weight_other = self.skip.weight.split([x.shape[1], other.shape[1]], dim=1)
        term, bias = convolution(x, self.skip, weight_x)
        return bias, [term, F.conv2d(other, weight_other)]


class SelfAttention(nn.Module):
    """x + project(softmax(q k^T / sqrt(d)) v): multi-head attention over all HW positions of x, (B, C, H, W)."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm = ModulatedNorm(channels, groups, activation=False)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = zero_init(nn.Linear(channels, channels))
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        tokens = pointwise(self.norm(x), self.qkv).permute(0, 2, 3, 1)  # (B, H, W, 3C), no copy in channels_last
        q, k, v = tokens.reshape(b, h * w, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, HW, d)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h, w, c)  # (B, H, W, C)
        return x + pointwise(attended.permute(0, 3, 1, 2), self.project)


class UNetBlock(nn.ModuleList):
    """The layers between two skip connections: residual blocks and self-attention, one after another."""

    checkpointing = False  # store only the input, and recompute the activations in the backward pass

    def forward(self, *x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W), or two such tensors, which stand for their concatenation along the channels."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.layers, *x, embedding=embedding, use_reentrant=False)
        return self.layers(*x, embedding=embedding)

    def layers(self, *x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """All layers, one after another."""
        for layer in self:
            x = (layer(*x, embedding=embedding) if isinstance(layer, ResidualBlock) else layer(*x),)
        return x[0]


def heads_of(channels: int, num_heads: int, num_head_channels: int | None) -> int:
    """Heads of an attention layer: channels / num_head_channels where that is given, else num_heads."""
    name, divisor = ("num_heads", num_heads) if num_head_channels is None else ("num_head_channels", num_head_channels)
    if divisor < 1 or channels % divisor:
        raise InputError(f"{name} {divisor} does not divide the {channels} channels of an attention layer")
    return num_heads if num_head_channels is None else channels // num_head_channels


def check_sizes(resolution: int, channels: int, channel_mult: Sequence[float]) -> None:
    """Refuse a resolution that cannot be halved once per entry of channel_mult after the first, and odd channels.

    An entry of channel_mult may be a fraction, as long as its width is whole.
    """
    smallest = 2 ** (len(channel_mult) - 1)
    if resolution % smallest:
        raise InputError(
            f"resolution {resolution} cannot be halved {len(channel_mult) - 1} times, as the {len(channel_mult)} "
            f"entries of channel_mult ask: it must be a multiple of {smallest}"
        )
    if channels % 2:
        raise InputError(f"channels {channels} is odd, and the time embedding takes pairs of sine and cosine")
    for mult in channel_mult:
        if mult <= 0 or channels * mult != int(channels * mult):
            raise InputError(f"channel_mult {mult} of {channels} channels is no whole width above 0")


class UNet(nn.Module):
    """eps(x_t, t, label, low_res, level): a U-Net conditioned by the sum of the embeddings of t, label and level.

    in_channels: channels of x_t plus those of low_res. channel_mult: the width of each resolution level, as a multiple
    of channels. attention_resolutions: sizes of the feature maps with self-attention; the middle block always has it.
    num_head_channels: channels of one head, in place of num_heads: wider layers then have more heads. num_classes None:
    no class embedding. level_embedding: adds a second time embedding, for the augmentation level s. checkpointing:
    recompute activations in the backward pass.
    """

    def __init__(
        self,
        resolution: int,
        in_channels: int,
        out_channels: int,
        channels: int,
        channel_mult: Sequence[float],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        num_heads: int,
        dropout: float = 0.0,
        num_classes: int | None = None,
        level_embedding: bool = False,
        norm_groups: int = 32,
        checkpointing: bool = False,
        num_head_channels: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes(resolution, channels, channel_mult)
        embedding = 4 * channels
        self.num_classes, self.resolution = num_classes, resolution
        self.time_embedding = TimeEmbedding(channels)
        self.level_embedding = TimeEmbedding(channels) if level_embedding else None
        self.label_embedding = nn.Embedding(num_classes, embedding) if num_classes is not None else None

        def residual(channels_in: int, channels_out: int, scale_factor: float = 1) -> ResidualBlock:
            return ResidualBlock(channels_in, channels_out, embedding, dropout, norm_groups, scale_factor)

        def attention(width: int) -> SelfAttention:
            return SelfAttention(width, heads_of(width, num_heads, num_head_channels), norm_groups)

        def level(channels_in: int, channels_out: int, size: int) -> list[nn.Module]:
            layers: list[nn.Module] = [residual(channels_in, channels_out)]
            return [*layers, attention(channels_out)] if size in attention_resolutions else layers

        widths = [int(channels * m) for m in channel_mult]
        width = min(channels, widths[0])  # as narrow as the first level, where that is narrower
        size, skips = resolution, [width]
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down = nn.ModuleList()
        for depth, wide in enumerate(widths):
            for _ in range(num_res_blocks):
                self.down.append(UNetBlock(level(width, wide, size)))
                width = wide
                skips.append(width)
            if depth < len(widths) - 1:
                self.down.append(UNetBlock([residual(width, width, 0.5)]))
                skips.append(width)
                size //= 2
        self.middle = UNetBlock([residual(width, width), attention(width), residual(width, width)])
        self.up = nn.ModuleList()
        for depth, wide in reversed(list(enumerate(widths))):
            for block in range(num_res_blocks + 1):
                layers = level(width + skips.pop(), wide, size)
                width = wide
                if depth > 0 and block == num_res_blocks:
                    layers.append(residual(width, width, 2))
                    size *= 2
                self.up.append(UNetBlock(layers))
        self.norm_out = ModulatedNorm(width, norm_groups)
        self.conv_out = zero_init(nn.Conv2d(width, out_channels, 3, padding=1))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # its stub lacks it
        for module in self.modules():
            if isinstance(module, UNetBlock):
                module.checkpointing = checkpointing

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        label: torch.Tensor | None = None,
        low_res: torch.Tensor | None = None,
        level: torch.Tensor | None = None,
        conditioning: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The prediction, (B, out_channels, H, W).

        x: (B, C, H, W). t, level: (B,), in (0, T] and [0, T]. label: int64 (B,). low_res: (B, C, H, W), already
        upsampled, or None. conditioning: the result of `condition`, which then replaces label and level.
        """
        embedding = self.time_embedding(t - 1)  # (B, 4 channels); ADM counts time from 0, as diffusers does
        if conditioning is None:
            conditioning = self.condition(label, level)
        if conditioning is not None:
            embedding = embedding + conditioning
        embedding = F.silu(embedding)
        h = self.conv_in(x if low_res is None else torch.cat([x, low_res], dim=1))  # (B, channels, H, W)
        skips = [h]
        for block in self.down:
            h = block(h, embedding=embedding)  # (B, channels m, H / 2^i, W / 2^i) at resolution level i
            skips.append(h)
        h = self.middle(h, embedding=embedding)
        for block in self.up:
            h = block(h, skips.pop(), embedding=embedding)
        return self.conv_out(self.norm_out(h))

    def compile(self, mode: CompileMode = "default", **options: Any) -> None:
        """Compile the network with torch.compile; the first calls take a while.

        Mode "default" compiles each residual block and attention layer by itself, and those of one shape once. The
        others use CUDA graphs, which need the network as a whole.
        """
        if mode != "default":
            super().compile(mode=mode, **options)
            return
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
        torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, SHAPES)
        for layer in self.modules():
            if isinstance(layer, ResidualBlock | SelfAttention):
                layer.compile(mode=mode, dynamic=False, **options)

    def condition(self, label: torch.Tensor | None, level: torch.Tensor | None) -> torch.Tensor | None:
        """The embedding of label and level, which does not depend on t: (B, 4 channels), or None without either."""
        embeddings = []
        if self.label_embedding is not None:
            embeddings.append(self.label_embedding(label))
        if self.level_embedding is not None:
            assert level is not None, "a network with a level embedding needs a level"
            embeddings.append(self.level_embedding(level - 1))
        return sum(embeddings[1:], embeddings[0]) if embeddings else None
