"""What samples are worth: detectors, references of real images, metrics, the search over s, CAS, and the page of it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdm_lightning.evaluation.cascade_figures import CascadeFigures

__all__ = ["CascadeFigures"]


def __getattr__(name: str) -> Any:
    if name == "CascadeFigures":  # on first use: most of this room needs no Lightning
        from cdm_lightning.evaluation.cascade_figures import CascadeFigures

        return CascadeFigures
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
