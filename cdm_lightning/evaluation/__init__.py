"""Evaluation of samples: detectors, reference cards of real images, metrics (FID), search over s, CAS, report."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdm_lightning.evaluation.cascade_figures import CascadeFigures

__all__ = ["CascadeFigures"]


def __getattr__(name: str) -> Any:
    if name == "CascadeFigures":  # imported on first use: most of this package needs no Lightning
        from cdm_lightning.evaluation.cascade_figures import CascadeFigures

        return CascadeFigures
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
