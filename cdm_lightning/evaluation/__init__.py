"""Evaluation of samples: figures such as FID against reference cards of real images, and the pages that show them.

`cdm evaluate` is evaluate.py; callback.py measures in `cdm test`. samples.py and real_images.py find and read what is
compared. search/ chooses the level s of conditioning augmentation; cas/ is the classification accuracy score.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdm_lightning.evaluation.callback import CascadeFigures

__all__ = ["CascadeFigures"]


def __getattr__(name: str) -> Any:
    if name == "CascadeFigures":  # imported on first use: most of this package needs no Lightning
        from cdm_lightning.evaluation.callback import CascadeFigures

        return CascadeFigures
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
