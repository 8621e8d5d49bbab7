"""Processes that share out work and exchange nothing but the news that they are done."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from datetime import timedelta
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info

FIRST = "CDM_FIRST_PROCESS"  # the process id of the one that others are started by, in their environment
PR_SET_PDEATHSIG = 1  # Linux's prctl: a signal for this process when the one that started it ends
PATIENCE = timedelta(days=30)  # torch's own 30 minutes end a run whose processes are unevenly slow; see shared_out()


def shared_out(devices: int, accelerator: str) -> dict[str, Any]:
    """The Trainer's arguments for `devices` processes on this machine, or on each of those that torchrun was told of.

    The fastest process waits for the slowest, however long that takes. Over gloo on every device: a process that waits
    there hears at once that another one died, since the connection closes, and needs no time-out for that. NCCL would
    notice by its time-out alone. There are no gradients to exchange.
    """
    end_with_first_process()
    machines = int(os.environ.get("GROUP_WORLD_SIZE", 1)) if under_torchrun() else 1
    strategy = DDPStrategy(process_group_backend="gloo", timeout=PATIENCE) if devices * machines > 1 else "auto"
    return {"accelerator": accelerator, "devices": devices, "num_nodes": machines, "strategy": strategy}


def end_with_first_process() -> None:
    """Have the system send SIGTERM to a process that Lightning started when the first one ends, however it ends.

    On Linux alone: elsewhere the others draw their share, and end when they wait for the first. Under torchrun or SLURM
    nobody here started another.
    """
    if sys.platform != "linux" or under_torchrun():
        return
    if os.environ.get("LOCAL_RANK", "0") == "0" or FIRST not in os.environ:
        os.environ[FIRST] = str(os.getpid())
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != int(os.environ[FIRST]):  # it has ended already
        raise SystemExit(128 + signal.SIGTERM)


class EndOnSigterm(L.Callback):
    """SIGTERM ends a prediction at once, with exit code 143; the processes that this one started end with it.

    Lightning only takes note of it, which a prediction never looks at. What was stored stays.
    """

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def end(number: int, frame: Any) -> None:
            rank_zero_info("SIGTERM: what is written stays, and the same command goes on")
            raise SystemExit(128 + number)

        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, end)  # Lightning restores what was there before it at the end


def under_torchrun() -> bool:
    return torch.distributed.is_torchelastic_launched()


def join() -> None:
    """Meet the other processes, where torchrun started them together: before a Trainer brings them together."""
    if under_torchrun() and int(os.environ["WORLD_SIZE"]) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=PATIENCE)
