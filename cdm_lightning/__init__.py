"""Cascaded diffusion models (Ho et al., 2021) with PyTorch Lightning.

A Diffusion draws q and runs p back (diffusion/). A UNet predicts (network/). An augmentation corrupts the
low-resolution image, and a stage joins the three and trains (stages/, training/). A CascadeModule folds trained stages
(cascade/). Shards go in (data/), shards of samples come out (sampling/) and are measured (evaluation/).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdm_lightning.cascade import CascadeModule
    from cdm_lightning.data import ShardDataModule
    from cdm_lightning.diffusion import Diffusion
    from cdm_lightning.foundation.errors import InputError
    from cdm_lightning.network import UNet
    from cdm_lightning.stages import BaseStage, SuperResolutionStage

__version__ = "0.2.0.dev0"
__all__ = [
    "BaseStage",
    "CascadeModule",
    "Diffusion",
    "InputError",
    "ShardDataModule",
    "SuperResolutionStage",
    "UNet",
    "__version__",
]
DEFINED_IN = {
    "BaseStage": "stages", "CascadeModule": "cascade", "Diffusion": "diffusion", "InputError": "foundation.errors",
    "ShardDataModule": "data", "SuperResolutionStage": "stages", "UNet": "network",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562), so that `import cdm_lightning` costs nothing."""
    if name not in DEFINED_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{DEFINED_IN[name]}"), name)
