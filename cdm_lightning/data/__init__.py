"""Training data: the Lightning data module and its stream; shards/ reads and writes shards, preparation/ makes them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdm_lightning.data.datamodule import ShardDataModule

__all__ = ["ShardDataModule"]


def __getattr__(name: str) -> Any:
    if name == "ShardDataModule":  # imported on first use: reading shards needs no Lightning
        from cdm_lightning.data.datamodule import ShardDataModule

        return ShardDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
