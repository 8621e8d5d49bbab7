"""FLOPs of a U-Net, counted from its structure; a multiply-add counts as 2."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from cdm_lightning.network import ResidualBlock, SelfAttention, UNet, UNetBlock

BACKWARD = 2  # the backward pass in forward passes: gradients of the inputs, and of the weights


def forward_flops(unet: UNet) -> int:
    """FLOPs of one image's forward pass: convolutions, linear layers, and the two matrix products of attention.

    Counts what torch's FlopCounterMode counts for the plain architecture. A faster form of the same function (a
    convolution merged with the upsampling before it) counts as the plain one. Runs nothing: the network may be on the
    meta device.
    """
    embeddings = [unet.time_embedding, *([unet.level_embedding] if unet.level_embedding is not None else [])]
    total = sum(linear_flops(layer) for mlp in embeddings for layer in mlp.modules() if isinstance(layer, nn.Linear))
    total += convolution_flops(unet.conv_in, unet.resolution) + convolution_flops(unet.conv_out, unet.resolution)
    size = unet.resolution
    for layer in layers(unet):
        if isinstance(layer, ResidualBlock):
            size = round(size * layer.scale_factor)  # both branches are resampled before their convolutions
            parts = [part for part in (layer.conv1, layer.conv2, layer.skip) if isinstance(part, nn.Conv2d)]
            total += sum(convolution_flops(part, size) for part in parts) + linear_flops(layer.modulation)
        else:
            total += size**2 * (linear_flops(layer.qkv) + linear_flops(layer.project)) + attention_flops(layer, size**2)
    return total


def training_flops(unet: UNet, checkpointing: bool = False) -> int:
    """FLOPs of one image's training step: 3 forward passes, or 4 if activations are recomputed."""
    return (1 + BACKWARD + checkpointing) * forward_flops(unet)


def layers(unet: UNet) -> Iterator[ResidualBlock | SelfAttention]:
    """The network's blocks in the order of its forward pass."""
    for level in (*unet.down, unet.middle, *unet.up):
        assert isinstance(level, UNetBlock)
        for layer in level:
            if not isinstance(layer, ResidualBlock | SelfAttention):
                raise TypeError(f"the FLOPs of a {type(layer).__name__} are not known")
            yield layer


def convolution_flops(layer: nn.Module, size: int) -> int:
    """FLOPs of a convolution for one image, with an output of size x size."""
    assert isinstance(layer, nn.Conv2d)
    kernel = layer.kernel_size[0] * layer.kernel_size[1]
    return 2 * layer.out_channels * (layer.in_channels // layer.groups) * kernel * size**2


def linear_flops(layer: nn.Module) -> int:
    """FLOPs of a linear layer for one row."""
    assert isinstance(layer, nn.Linear)
    return 2 * layer.in_features * layer.out_features


def attention_flops(layer: SelfAttention, tokens: int) -> int:
    """FLOPs of q k^T and of the weighted sum of v, over all heads."""
    return 2 * 2 * tokens**2 * layer.qkv.in_features
