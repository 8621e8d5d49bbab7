"""Stages, the models of a cascade: base and super-resolution stages, and their conditioning augmentation."""

from cdm_lightning.stages.diffusion_stage import DiffusionStage
from cdm_lightning.stages.kinds import BaseStage, SuperResolutionStage

__all__ = ["BaseStage", "DiffusionStage", "SuperResolutionStage"]
