"""Stages, the models of a cascade: base and super-resolution stages, and their conditioning augmentation.

checkpoints.py reads and writes the files, loading.py makes a stage of one, warm_start.py begins a training from another
stage's weights, and adm.py makes stages of ADM's published networks (`cdm import`, import_stage.py).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdm_lightning.stages.base_and_super_resolution import BaseStage, SuperResolutionStage
    from cdm_lightning.stages.diffusion_stage import DiffusionStage

__all__ = ["BaseStage", "DiffusionStage", "SuperResolutionStage"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # imported on first use, so that `cdm import --help` does not load Lightning
        module = "diffusion_stage" if name == "DiffusionStage" else "base_and_super_resolution"
        return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
