"""Stages, the models of a cascade: base and super-resolution stages, and their conditioning augmentation."""

from cdm_lightning.stages.base_and_super_resolution import BaseStage, SuperResolutionStage
from cdm_lightning.stages.diffusion_stage import DiffusionStage

__all__ = ["BaseStage", "DiffusionStage", "SuperResolutionStage"]
