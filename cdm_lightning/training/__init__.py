"""Around the training of a stage: averaged weights, checkpoints, resuming, faults, pictures, `cdm fit` itself."""

from cdm_lightning.training.averaging import EMA
from cdm_lightning.training.finite_steps import FiniteSteps
from cdm_lightning.training.pictures import LossCurve, SampleGrid
from cdm_lightning.training.resume import Checkpoint

__all__ = ["EMA", "Checkpoint", "FiniteSteps", "LossCurve", "SampleGrid"]
