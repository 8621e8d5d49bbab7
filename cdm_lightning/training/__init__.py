"""What happens around the training of a stage: averaged weights, checkpoints and going on, faults, pictures."""

from cdm_lightning.training.finite_steps import FiniteSteps
from cdm_lightning.training.pictures import EMA, LossCurve, SampleGrid
from cdm_lightning.training.resume import Checkpoint

__all__ = ["EMA", "Checkpoint", "FiniteSteps", "LossCurve", "SampleGrid"]
