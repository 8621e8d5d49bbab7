"""Splitting work over processes that do not communicate, except to wait for each other at the end."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from datetime import timedelta
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.process_group import watch_over
from cdm_lightning.foundation.stopping import GOES_ON, Stopped, discard_blocked_output, handle

FIRST_PROCESS = "CDM_FIRST_PROCESS"  # environment variable: process id of the process that started the others
PR_SET_PDEATHSIG = 1  # option of Linux's prctl: send this process a signal when its parent ends
TIMEOUT = timedelta(days=30)  # torch's default, 30 minutes, would end a run with one slow process


def make_trainer(devices: int, accelerator: str, **options: Any) -> L.Trainer:
    """A Trainer of `devices` processes on this machine, or on each machine of a torchrun job, for a prediction.

    Raises InputError for a device that this machine does not have; nothing is written. options: of the Trainer.
    The processes connect through gloo, on GPUs too, as no gradients are exchanged. With gloo, a waiting process notices
    at once that another one died, because the connection closes; with NCCL it would notice only after the time-out.
    The time-out is therefore long: fast processes wait for the slowest.
    """
    end_with_first_process()
    machines = int(os.environ.get("GROUP_WORLD_SIZE", 1)) if under_torchrun() else 1
    strategy = DDPStrategy(process_group_backend="gloo", timeout=TIMEOUT) if devices * machines > 1 else "auto"
    try:
        return L.Trainer(
            accelerator=accelerator, devices=devices, num_nodes=machines, strategy=strategy, logger=False,
            enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
            use_distributed_sampler=False, **options,  # the callers split the work over the processes
        )  # fmt: skip
    except (MisconfigurationException, ValueError, ImportError) as error:  # a TPU wants another package
        told = " ".join(str(error).split())
        raise InputError(f"accelerator {accelerator} with devices {devices} cannot be used here: {told}") from error


def end_with_first_process() -> None:
    """Ask Linux to send SIGTERM to a process that Lightning started when the first process ends for any reason.

    On other systems these processes finish their share of the work, and end when they wait for the first one. Under
    torchrun or SLURM this does nothing: there, Lightning does not start the processes.
    """
    if sys.platform != "linux" or under_torchrun():
        return
    if os.environ.get("LOCAL_RANK", "0") == "0" or FIRST_PROCESS not in os.environ:
        os.environ[FIRST_PROCESS] = str(os.getpid())
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != int(os.environ[FIRST_PROCESS]):  # the first process has ended already
        raise SystemExit(128 + signal.SIGTERM)


class EndOnSigterm(L.Callback):
    """Ends a prediction at SIGTERM, with exit code 143; the processes that this one started end too.

    Lightning's own handler waits for the other processes. Stored results are kept.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        watch_over(trainer.strategy.launcher)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def end(number: int, frame: Any) -> None:
            discard_blocked_output()
            rank_zero_info(f"SIGTERM: {GOES_ON}")
            raise Stopped(number, sentence="")

        handle(end, signal.SIGTERM)  # Lightning restores the previous handler at the end


def under_torchrun() -> bool:
    return torch.distributed.is_torchelastic_launched()


def join_processes() -> None:
    """Connect the processes that torchrun started, so that they can wait for each other before a Trainer exists."""
    if under_torchrun() and int(os.environ["WORLD_SIZE"]) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=TIMEOUT)
