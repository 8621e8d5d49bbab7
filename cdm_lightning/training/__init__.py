"""What surrounds the training of a stage.

`cdm fit` is lightning_cli.py, and what it looks at before anything is opened is fit_checks.py. Stopping and resuming
are resume.py (`Checkpoint`), on files that checkpoint_files.py writes whole or not at all; the newest checkpoint is
found by stages/checkpoints.py. averaging.py holds the averaged weights, finite_steps.py the steps that are not finite,
pictures.py and progress.py what a person sees.
"""

from cdm_lightning.training.averaging import EMA
from cdm_lightning.training.finite_steps import FiniteSteps
from cdm_lightning.training.pictures import LossCurve, SampleGrid
from cdm_lightning.training.resume import Checkpoint

__all__ = ["EMA", "Checkpoint", "FiniteSteps", "LossCurve", "SampleGrid"]
