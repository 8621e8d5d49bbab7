"""The training log: mean loss over all images of all processes between two rows, also by quarters of t and of s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback

TOTALS = {"nonfinite_images"}  # logged as sums; all other names are logged as means


def quarters(name: str, loss: torch.Tensor, share: torch.Tensor) -> dict[str, torch.Tensor]:
    """`loss` split by quarters of `share`: <name>_q1 where share is in (0, 1/4], ..., <name>_q4 where in (3/4, 1].

    loss, share: (B,). The other entries are NaN, which a Meter ignores.
    """
    number = (4 * share).ceil()
    return {f"{name}_q{q}": torch.where(number == q, loss, torch.nan) for q in (1, 2, 3, 4)}


class Meter:
    """Sums and counts of named values since the last `read`, in float64, on the device of the values.

    Only `read` and `state` wait for the device and for other processes. Values that are not finite are left out of the
    mean. All processes must add the same names in the same order.
    """

    def __init__(self) -> None:
        self.sums: dict[tuple[str, ...], torch.Tensor] = {}  # names added together -> (names, 2): sum and count
        self.latest: dict[str, float] = {}  # values logged as they are, without a mean: a running count, a rate

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add values (N,) of each name, with the same N for all."""
        stacked = torch.stack([value.detach().double() for value in values.values()])
        finite = stacked.isfinite()
        new = torch.stack([torch.where(finite, stacked, 0).sum(1), finite.sum(1).double()], 1)
        names = tuple(values)
        self.sums[names] = self.sums[names] + new if names in self.sums else new

    def read(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Return the mean of every name that has a value (the sum for names in TOTALS), and reset.

        reduce: sums a tensor over all processes, which must all call `read`; it is called once.
        """
        if not self.sums:
            return {}
        names = [name for group in self.sums for name in group]
        totals = reduce(torch.cat(list(self.sums.values()))).tolist()
        self.sums = {}
        return {n: s if n in TOTALS else s / count for n, (s, count) in zip(names, totals, strict=True) if count}

    def state(self, reduce: Callable[[torch.Tensor], torch.Tensor], rank: int, processes: int) -> dict[str, Any]:
        """The state for a checkpoint: the rows of all processes, (processes, names, 2), the same on every process.

        reduce: as in `read`. Every process adds its row to zeros, which keeps its bits.
        """
        groups = []
        for names, sums in self.sums.items():
            rows = sums.new_zeros(processes, *sums.shape)
            rows[rank] = sums
            groups.append({"names": list(names), "sums": reduce(rows).cpu()})
        return {"groups": groups}

    def load(self, state: dict[str, Any], rank: int, processes: int, device: torch.device | str = "cpu") -> None:
        """Restore this process's row. If the number of processes has changed, the first takes the sum of all rows."""
        self.sums = {}
        for group in state["groups"]:
            rows = group["sums"]
            row = rows[rank] if len(rows) == processes else rows.sum(0) * (rank == 0)
            self.sums[tuple(group["names"])] = row.to(device)


class TrainingLog(Callback):
    """Logs a stage's meter as `train/*` every log_every_n_steps optimizer steps, after the last accumulated batch.

    The row is written before any checkpoint of that step, and checkpoints include the meter. A run that is killed and
    resumed therefore logs the same numbers as an unbroken run, without a gap. Lightning's own `log` writes after the
    checkpoints are saved, so it cannot do this. The rows are numbered like Lightning's, from step 0.
    """

    written = 0  # optimizer step of the last row

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.written = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        if (loss := self.write(trainer, pl_module)) is not None:
            # A tensor of the host: from a number Lightning makes one on the device, and reads it at every later step.
            pl_module.log("train/loss", torch.tensor(loss), prog_bar=True, logger=False)

    def write(self, trainer: L.Trainer, pl_module: Any) -> float | None:
        """Write the row if one is due, and return its loss. All processes must call this at the same step."""
        every, step = trainer.log_every_n_steps, trainer.global_step  # type: ignore[attr-defined]  # untyped there
        if not every or step % every or step <= self.written:
            return None
        self.written = step
        means = pl_module.meter.read(sum_over_processes(trainer))
        row = {f"train/{name}": value for name, value in {**means, **pl_module.meter.latest}.items()}
        for logger in trainer.loggers:
            logger.log_metrics({**row, "epoch": trainer.current_epoch}, step=step - 1)
            logger.save()
        return row.get("train/loss")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.write(trainer, pl_module)  # another callback may save before this one's turn: the row comes first
        checkpoint["meter"] = pl_module.meter.state(
            sum_over_processes(trainer), trainer.global_rank, trainer.world_size
        )

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Restore the meter; checkpoints of older versions have none and start with an empty one."""
        state, device = checkpoint.get("meter", {"groups": []}), trainer.strategy.root_device
        pl_module.meter.load(state, trainer.global_rank, trainer.world_size, device)


def sum_over_processes(trainer: L.Trainer) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that sums a tensor over all processes of a training."""
    return lambda tensor: trainer.strategy.reduce(tensor, reduce_op="sum")  # type: ignore[return-value]  # a tensor is in
