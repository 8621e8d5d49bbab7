"""Evaluation of samples: figures such as FID against reference cards of real images, and the pages that show them.

`cdm evaluate` is evaluate.py; callback.py measures in `cdm test`, and stage_distance.py during a training. samples.py
and real_images.py find and read what is compared. search/ chooses the level s of conditioning augmentation; cas/ is the
classification accuracy score.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdm_lightning.evaluation.callback import CascadeFigures
    from cdm_lightning.evaluation.stage_distance import StageDistance

__all__ = ["CascadeFigures", "StageDistance"]
MODULES = {"CascadeFigures": "callback", "StageDistance": "stage_distance"}


def __getattr__(name: str) -> Any:
    if name in MODULES:  # imported on first use: most of this package needs no Lightning
        return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
