"""Training of a stage: `cdm fit`, EMA weights, checkpoints, resuming, non-finite steps, progress and pictures."""

from cdm_lightning.training.averaging import EMA
from cdm_lightning.training.finite_steps import FiniteSteps
from cdm_lightning.training.pictures import LossCurve, SampleGrid
from cdm_lightning.training.resume import Checkpoint

__all__ = ["EMA", "Checkpoint", "FiniteSteps", "LossCurve", "SampleGrid"]
