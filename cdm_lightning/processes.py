"""Processes that share out work and exchange nothing but the news that they are done."""

from __future__ import annotations

from datetime import timedelta

import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only

from cdm_lightning import InputError

PATIENCE = timedelta(days=30)  # torch's own 30 minutes end a run whose processes are unevenly slow; see strategy_for()


def strategy_for(devices: int) -> Strategy | str:
    """Lightning's strategy for processes of which the fastest waits for the slowest, however long that takes.

    Over gloo on every device: a process that waits there hears at once that another one died, since the connection
    closes, and needs no time-out for that. NCCL would notice by its time-out alone. There are no gradients to exchange.
    """
    return DDPStrategy(process_group_backend="gloo", timeout=PATIENCE) if devices > 1 else "auto"


def first_process() -> bool:
    """Whether this process is the one that writes and speaks; Lightning sets the rank when processes start."""
    return not getattr(rank_zero_only, "rank", 0)


def wait_for_all() -> None:
    """Wait for the other processes, where there are any; refuses to wait for one that died."""
    if not torch.distributed.is_initialized():
        return
    try:
        torch.distributed.barrier()
    except RuntimeError as error:  # a connection that closed, in the words of gloo
        raise InputError(
            "another process of this run ended before its time: what is written stays, and the same command goes on"
        ) from error
