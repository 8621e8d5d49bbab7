"""What happens around the training of a stage: averaged weights, checkpoints and going on, faults, pictures."""

from cdm_lightning.training.averaging import EMA
from cdm_lightning.training.finite_steps import FiniteSteps
from cdm_lightning.training.pictures import LossCurve, SampleGrid
from cdm_lightning.training.resume import Checkpoint

__all__ = ["EMA", "Checkpoint", "FiniteSteps", "LossCurve", "SampleGrid"]
