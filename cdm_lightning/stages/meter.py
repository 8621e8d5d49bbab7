"""The training log: means over every image that every process trained on between two rows, by time and level too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback

TOTALS = {"nonfinite_images"}  # rows of a log that are sums; the others are means


def quarters(name: str, loss: torch.Tensor, share: torch.Tensor) -> dict[str, torch.Tensor]:
    """`loss` by quarter of a range: <name>_q1 holds it where share is in (0, 1/4], ..., <name>_q4 in (3/4, 1].

    loss, share: (B,). Elsewhere an entry is NaN, which a Meter leaves out.
    """
    number = (4 * share).ceil()
    return {f"{name}_q{q}": torch.where(number == q, loss, torch.nan) for q in (1, 2, 3, 4)}


class Meter:
    """Sums and counts of named values since the last reading, float64 and on the device where the values are made.

    Nothing here waits for a device or for another process before `read`. A value that is not finite is left out of its
    name's mean. All processes must add the same names in the same order, as they do where all run the same steps.
    """

    def __init__(self) -> None:
        self.sums: dict[tuple[str, ...], torch.Tensor] = {}  # names added together -> (names, 2): sum and count
        self.latest: dict[str, float] = {}  # what has no mean: a running count, a rate

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add values (N,), as many for each name."""
        stacked = torch.stack([value.detach().double() for value in values.values()])
        finite = stacked.isfinite()
        new = torch.stack([torch.where(finite, stacked, 0).sum(1), finite.sum(1).double()], 1)
        names = tuple(values)
        self.sums[names] = self.sums[names] + new if names in self.sums else new

    def read(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The mean of every name that has a value (the sum, for one in TOTALS), and start anew.

        reduce: sums a tensor over all processes, which must all call this; it is called once.
        """
        if not self.sums:
            return {}
        names = [name for group in self.sums for name in group]
        totals = reduce(torch.cat(list(self.sums.values()))).tolist()
        self.sums = {}
        return {n: s if n in TOTALS else s / count for n, (s, count) in zip(names, totals, strict=True) if count}

    def state(self, reduce: Callable[[torch.Tensor], torch.Tensor], rank: int, processes: int) -> dict[str, Any]:
        """What a checkpoint keeps: the rows of all processes, (processes, names, 2) each, the same on every process.

        reduce: as in `read`; every process adds its row to zeros, which changes no bit of it.
        """
        groups = []
        for names, sums in self.sums.items():
            rows = sums.new_zeros(processes, *sums.shape)
            rows[rank] = sums
            groups.append({"names": list(names), "sums": reduce(rows).cpu()})
        return {"groups": groups}

    def load(self, state: dict[str, Any], rank: int, processes: int, device: torch.device | str = "cpu") -> None:
        """Take this process's row back. On another number of processes, the first takes the sum of all rows."""
        self.sums = {}
        for group in state["groups"]:
            rows = group["sums"]
            own = rows[rank] if len(rows) == processes else rows.sum(0) * (rank == 0)
            self.sums[tuple(group["names"])] = own.to(device)


class TrainingLog(Callback):
    """Writes a stage's meter as `train/*`, at the last accumulated batch of every log_every_n_steps-th optimizer step.

    The row is written before any checkpoint of that step, and the meter is part of the checkpoint: a run that is killed
    and resumed logs the numbers of the unbroken run, without a gap. Lightning's own `log` keeps neither, since it
    writes after the checkpoints are saved. A row's step is the number of optimizer steps before it, as Lightning's is.
    """

    written = 0  # optimizer steps at the last row

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.written = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        if (loss := self.write(trainer, pl_module)) is not None:
            pl_module.log("train/loss", loss, prog_bar=True, logger=False)

    def write(self, trainer: L.Trainer, pl_module: Any) -> float | None:
        """Write the row that is due, if one is, and return its loss. All processes are here at the same step."""
        every, step = trainer.log_every_n_steps, trainer.global_step  # type: ignore[attr-defined]  # untyped there
        if not every or step % every or step <= self.written:
            return None
        self.written = step
        means = pl_module.meter.read(summing(trainer))
        row = {f"train/{name}": value for name, value in {**means, **pl_module.meter.latest}.items()}
        for logger in trainer.loggers:
            logger.log_metrics({**row, "epoch": trainer.current_epoch}, step=step - 1)
            logger.save()
        return row.get("train/loss")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.write(trainer, pl_module)  # whoever saves before this callback's turn: the row comes first
        checkpoint["meter"] = pl_module.meter.state(summing(trainer), trainer.global_rank, trainer.world_size)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Checkpoints from before there was a meter start with an empty one."""
        state, device = checkpoint.get("meter", {"groups": []}), trainer.strategy.root_device
        pl_module.meter.load(state, trainer.global_rank, trainer.world_size, device)


def summing(trainer: L.Trainer) -> Callable[[torch.Tensor], torch.Tensor]:
    """Sums a tensor over the processes of a training."""
    return lambda tensor: trainer.strategy.reduce(tensor, reduce_op="sum")  # type: ignore[return-value]  # a tensor is in
