"""Trained stages folded into one sampler, truncated or not, and kept as one folder, the bundle."""

from cdm_lightning.cascade.cascade import CascadeModule

__all__ = ["CascadeModule"]
