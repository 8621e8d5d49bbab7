"""Cascaded diffusion models (Ho et al., 2021) with PyTorch Lightning."""

__version__ = "0.1.0"
