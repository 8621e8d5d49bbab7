"""Trainings of the smallest stage on a few real images, in this process or forked from it, and what they log."""

import csv
import time

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from small_models import SMALLEST, randomise_weights

from cdm_lightning.data import ShardDataModule
from cdm_lightning.stages import BaseStage
from cdm_lightning.training import EMA, FiniteSteps
from cdm_lightning.training.checkpoint_files import AtomicCheckpointIO, Trainer

START = "spawn" if torch.cuda.is_available() else "fork"  # quicker, but not after CUDA has started


class Pause(Callback):
    """Waits before every batch."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_batch_start(self, *_):
        time.sleep(self.seconds)


def smallest_stage(kind=BaseStage, **options):
    """A base stage of 8x8 to train."""
    torch.manual_seed(0)
    stage = kind(seed=3, **{**SMALLEST, "resolution": 8, "sampling_steps": 4, **options})
    return randomise_weights(stage).train().requires_grad_(True)


def train(
    stage, root, folder, steps, processes=1, parts=1, every=3, resume=None, callbacks=(), saves=2, accelerator="cpu",
    **options,
):  # fmt: skip
    """Train in batches of 8; a checkpoint every 2 steps, a row every 3."""
    saver = ModelCheckpoint(
        folder / "checkpoints", every_n_train_steps=saves, save_last=True, enable_version_counter=False
    )
    # DDP takes a static graph and accumulation each, and not both: the first backward pass must be one that it reduces
    many = {"strategy": DDPStrategy(start_method=START, static_graph=parts == 1, process_group_backend="gloo")}
    trainer = Trainer(
        default_root_dir=folder, max_steps=steps, accelerator=accelerator, devices=processes,
        accumulate_grad_batches=parts,
        log_every_n_steps=every, logger=CSVLogger(folder, name="logs"), use_distributed_sampler=False,
        callbacks=[EMA(0.9), FiniteSteps(2), *callbacks, saver], enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, gradient_clip_val=1.0, **(many if processes > 1 else {}), **options,
    )  # fmt: skip
    trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    data = ShardDataModule(root, batch_size=8, num_workers=0)
    trainer.fit(stage, data, ckpt_path=folder / "checkpoints/last.ckpt" if resume else None, weights_only=True)
    return trainer


def logged_rows(folder):
    """step -> name -> the text of the log, over all starts of a run, the newer ones winning."""
    found = {}
    for file in sorted(folder.glob("logs/version_*/metrics.csv")):
        with file.open() as lines:
            for row in csv.DictReader(lines):
                values = {name: value for name, value in row.items() if name.startswith("train/") and value}
                found.setdefault(int(row["step"]), {}).update(values)
    return found
