"""Trained stages folded into one sampler, truncated or not (cascade.py), and kept as one folder (bundle.py)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdm_lightning.cascade.cascade import CascadeModule

__all__ = ["CascadeModule"]


def __getattr__(name: str) -> Any:
    if name == "CascadeModule":  # on first use: `cdm bundle --help` needs no Lightning
        from cdm_lightning.cascade.cascade import CascadeModule

        return CascadeModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
