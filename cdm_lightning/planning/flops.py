"""Floating-point operations of a U-Net, counted from its structure: two for each multiplication and its addition."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from cdm_lightning.network import ResidualBlock, SelfAttention, UNet, UNetBlock

BACKWARD = 2  # passes' worth of a forward: one for the gradients of the inputs, one for those of the weights


def forward_flops(unet: UNet) -> int:
    """FLOPs of one image's forward pass: convolutions, linear layers and attention's two products, nothing elementwise.

    They are the plain architecture's, what torch's FlopCounterMode counts of it: a faster form of the same function (a
    convolution folded into the upsampling before it) is credited with the operations that it saves. Nothing is run, so
    the network may lie on the meta device.
    """
    embeddings = [unet.time_embedding, *([unet.level_embedding] if unet.level_embedding is not None else [])]
    total = sum(linear(layer) for mlp in embeddings for layer in mlp.modules() if isinstance(layer, nn.Linear))
    total += convolution(unet.conv_in, unet.resolution) + convolution(unet.conv_out, unet.resolution)
    size = unet.resolution
    for layer in layers(unet):
        if isinstance(layer, ResidualBlock):
            size = round(size * layer.scale_factor)  # both branches are resampled before their convolutions
            parts = [part for part in (layer.conv1, layer.conv2, layer.skip) if isinstance(part, nn.Conv2d)]
            total += sum(convolution(part, size) for part in parts) + linear(layer.modulation)
        else:
            total += size**2 * (linear(layer.qkv) + linear(layer.project)) + attention(layer, size**2)
    return total


def training_flops(unet: UNet, checkpointing: bool = False) -> int:
    """FLOPs of one image's training step: 3 times the forward pass, or 4 times where backward repeats it."""
    return (1 + BACKWARD + checkpointing) * forward_flops(unet)


def layers(unet: UNet) -> Iterator[ResidualBlock | SelfAttention]:
    """The network's blocks in the order of its forward pass."""
    for level in (*unet.down, unet.middle, *unet.up):
        assert isinstance(level, UNetBlock)
        for layer in level:
            if not isinstance(layer, ResidualBlock | SelfAttention):
                raise TypeError(f"the operations of a {type(layer).__name__} are not known")
            yield layer


def convolution(layer: nn.Module, size: int) -> int:
    """Of one image whose output is size x size."""
    assert isinstance(layer, nn.Conv2d)
    kernel = layer.kernel_size[0] * layer.kernel_size[1]
    return 2 * layer.out_channels * (layer.in_channels // layer.groups) * kernel * size**2


def linear(layer: nn.Module) -> int:
    """Of one row."""
    assert isinstance(layer, nn.Linear)
    return 2 * layer.in_features * layer.out_features


def attention(layer: SelfAttention, tokens: int) -> int:
    """q k^T, and the weighted sum of v, over all heads."""
    return 2 * 2 * tokens**2 * layer.qkv.in_features
