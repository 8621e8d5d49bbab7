"""Images that cannot be used: left out of their batch, counted over all processes, and logged."""

from __future__ import annotations

import sys
from typing import Any, Literal

import lightning.pytorch as L
import torch

from cdm_lightning.foundation.errors import InputError

OnDamage = Literal["refuse", "skip"]


class Reports:
    """Says once in this process what is wrong with each damaged image or shard."""

    def __init__(self) -> None:
        self.said: set[str] = set()

    def __call__(self, error: InputError) -> None:
        if str(error) not in self.said:
            self.said.add(str(error))
            print(f"left out: {error}", file=sys.stderr, flush=True)


def marked(places: list[int], damaged: list[bool]) -> torch.Tensor:
    """Places of a batch, int64 (B,), in which a damaged image's place p is ~p < 0: how a worker tells of it."""
    return torch.tensor([~place if bad else place for place, bad in zip(places, damaged, strict=True)])


def unmarked(index: torch.Tensor, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a worker's index: the places of the `images` that came, and int64 (2,), how many were left out and stand in.

    A batch of which nothing was left holds one image that stands in for it, at the place of the first one.
    """
    intact = index[index >= 0]
    if len(intact) == images:
        return intact, torch.tensor([len(index) - images, 0])
    return ~index[:1], torch.tensor([len(index), 1])


class Damage(L.Callback):
    """Logs what a data module left out, over all processes: a sum since the run began, and of each validation.

    `data/skipped_images`, `data/stand_ins` in training, and `val/...`, `test/...` of the same names. They add up
    when a row of the log is due and where a checkpoint is written, which holds the sum of all.
    """

    summed_at = 0  # global_step when the processes last added up: once a step, whatever is accumulated

    def log(self, module: L.LightningModule, group: str, counts: torch.Tensor) -> None:
        skipped, stand_ins = counts.tolist()
        module.log_dict({f"{group}/skipped_images": float(skipped), f"{group}/stand_ins": float(stand_ins)})

    def on_train_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        self.summed_at = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: L.LightningModule, *args: Any) -> None:
        data = trainer.datamodule
        data.unsummed += data.left_out.pop("train")  # of a batch that is done; the next may be here
        every, step = trainer.log_every_n_steps, trainer.global_step
        if every and step % every == 0 and step > self.summed_at:
            self.summed_at = step
            data.add_up()
        self.log(pl_module, "data", data.skipped)

    def on_train_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        trainer.datamodule.add_up()

    def on_validation_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        trainer.datamodule.left_out.pop("val", None)

    def on_validation_epoch_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        counts = trainer.datamodule.over_all(trainer.datamodule.left_out.pop("val", torch.zeros(2, dtype=torch.int64)))
        self.log(pl_module, "test" if trainer.testing else "val", counts)

    on_test_start, on_test_epoch_end = on_validation_start, on_validation_epoch_end
