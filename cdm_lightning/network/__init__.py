"""The U-Net that predicts, and the layers that it is made of."""

from cdm_lightning.network.unet import CompileMode, Level, ResidualBlock, SelfAttention, UNet

__all__ = ["CompileMode", "Level", "ResidualBlock", "SelfAttention", "UNet"]
