"""Damaged images: they are left out of their batch, counted over all processes, and logged."""

from __future__ import annotations

import sys
from typing import Any, Literal

import lightning.pytorch as L
import torch

from cdm_lightning.foundation.errors import InputError

OnDamage = Literal["refuse", "skip"]


class DamageReporter:
    """Reports each damaged image or shard on stderr, once per process."""

    def __init__(self) -> None:
        self.reported: set[str] = set()

    def __call__(self, error: InputError) -> None:
        if str(error) not in self.reported:
            self.reported.add(str(error))
            print(f"left out: {error}", file=sys.stderr, flush=True)


def encode_damage(places: list[int], damaged: list[bool]) -> torch.Tensor:
    """The index of a batch, int64 (B,): place p of an intact image, ~p < 0 for a damaged one."""
    return torch.tensor([~place if bad else place for place, bad in zip(places, damaged, strict=True)])


def decode_damage(index: torch.Tensor, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split the index from `encode_damage` into the places of the batch's `images`, and counts, int64 (2,).

    The counts are of images left out and of stand-ins. If all images of a batch are damaged, the batch holds one
    stand-in image, which takes the place of the first.
    """
    intact = index[index >= 0]
    if len(intact) == len(index):
        return index, torch.zeros(2, dtype=torch.int64)  # as it is, in memory that a GPU copies without a wait
    if len(intact) == images:
        return intact, torch.tensor([len(index) - images, 0])
    return ~index[:1], torch.tensor([len(index), 1])


class Damage(L.Callback):
    """Logs how many damaged images were left out, over all processes: since the run began, and of each validation.

    Logs `data/skipped_images` and `data/stand_ins` in training, and `val/...` or `test/...` of the same names. The
    counts of the processes are summed when a row of the log is due and when a checkpoint is written.
    """

    summed_at = 0  # global_step of the last sum: one sum per optimizer step, also with accumulated batches

    def log(self, module: L.LightningModule, group: str, counts: torch.Tensor) -> None:
        skipped, stand_ins = counts.float()  # tensors of the host: Lightning would copy numbers to the device
        module.log_dict({f"{group}/skipped_images": skipped, f"{group}/stand_ins": stand_ins})

    def on_train_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        self.summed_at = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: L.LightningModule, *args: Any) -> None:
        data = trainer.datamodule
        data.unsummed += data.left_out.pop("train")  # of the finished batch; the next may be loaded already
        every, step = trainer.log_every_n_steps, trainer.global_step
        if every and step % every == 0 and step > self.summed_at:
            self.summed_at = step
            data.sum_skipped()
        self.log(pl_module, "data", data.skipped)

    def on_train_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        trainer.datamodule.sum_skipped()

    def on_validation_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        trainer.datamodule.left_out.pop("val", None)

    def on_validation_epoch_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        counts = trainer.datamodule.sum_over_processes(
            trainer.datamodule.left_out.pop("val", torch.zeros(2, dtype=torch.int64))
        )
        self.log(pl_module, "test" if trainer.testing else "val", counts)

    on_test_start, on_test_epoch_end = on_validation_start, on_validation_epoch_end
