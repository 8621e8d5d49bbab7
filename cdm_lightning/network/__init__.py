"""The U-Net and its layers."""

from cdm_lightning.network.unet import CompileMode, ResidualBlock, SelfAttention, UNet, UNetBlock

__all__ = ["CompileMode", "ResidualBlock", "SelfAttention", "UNet", "UNetBlock"]
