"""A trained cascade: its sampler, truncated or not (cascade.py), and the folder that stores it (bundle.py).

metadata.py reads the bundle.json of that folder, and hub.py makes it a repository of the hub.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdm_lightning.cascade.cascade import CascadeModule

__all__ = ["CascadeModule"]


def __getattr__(name: str) -> Any:
    if name == "CascadeModule":  # imported on first use, so that `cdm bundle --help` does not load Lightning
        from cdm_lightning.cascade.cascade import CascadeModule

        return CascadeModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
