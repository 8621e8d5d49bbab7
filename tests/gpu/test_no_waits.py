"""A training step gives the device its work and does not wait for it: in torch's mode that reports every wait."""

import traceback
import warnings

import pytest
import torch
from devices import DEVICE, needs_cuda
from lightning.pytorch.callbacks import Callback
from small_models import SMALL, batch_of, randomise_weights
from small_training import smallest_stage, train

from cdm_lightning.stages import BaseStage, SuperResolutionStage
from cdm_lightning.stages.diffusion_stage import clip_gradients

pytestmark = [pytest.mark.gpu, needs_cuda, pytest.mark.filterwarnings("ignore")]
CLOCK = {"low_resolution": 8, "low_res_timesteps": 4000, "low_res_schedule": "cosine"}


@pytest.fixture
def reporting():
    """Sets what torch does at a wait, and resets it."""
    yield torch.cuda.set_sync_debug_mode
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["base", "gaussian", "blur"])
def test_a_training_step_waits_for_nothing(kind, reporting):
    """Forward, backward, clipping and Adam under bf16 autocast, after two steps that may wait."""
    if kind == "base":
        stage = BaseStage(resolution=16, **SMALL, dropout=0.1)
    else:
        own = CLOCK if kind == "gaussian" else {"low_resolution": 8}
        stage = SuperResolutionStage(resolution=16, augmentation=kind, **own, **SMALL)
    stage = randomise_weights(stage).to(DEVICE).train().requires_grad_(True)
    adam = torch.optim.Adam(stage.parameters(), lr=1e-3, fused=True)
    batches = [[part.to(DEVICE) for part in batch_of(stage, 8, first)] for first in (0, 8, 16)]
    for number, batch in enumerate(batches):
        reporting("error" if number == 2 else "default")
        with torch.autocast("cuda", torch.bfloat16):
            loss = stage.training_step(tuple(batch), number)
        loss.backward()
        clip_gradients(stage.unet.parameters(), 1.0, "norm")
        adam.step()
        adam.zero_grad()
    reporting("default")
    assert loss.isfinite()


class Waits(Callback):
    """The stack at every wait of the device between the starts of two steps."""

    def __init__(self, first, last):
        self.first, self.last, self.stacks, self.listening = first, last, [], False

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.first:
            torch.cuda.set_sync_debug_mode("warn")
            warnings.simplefilter("always")
            warnings.showwarning = self.keep
        if trainer.global_step == self.last:
            torch.cuda.set_sync_debug_mode("default")
        self.listening = self.first <= trainer.global_step < self.last

    def keep(self, message, *_, **__):
        if self.listening and "called a synchronizing" in str(message):
            frames = [f for f in traceback.extract_stack()[:-1] if not f.filename.endswith("/warnings.py")]
            ours = [f for f in frames if "/cdm_lightning/" in f.filename][-2:]
            places = dict.fromkeys(f"{f.filename.split('/')[-1]}:{f.lineno} {f.line}" for f in [*ours, *frames[-2:]])
            self.stacks.append(" <- ".join(reversed(places)))


def test_a_step_of_a_run_waits_at_most_once(few_real, tmp_path, reporting, figures):
    """FiniteSteps reads the norm of the gradient, and that is all: of steps that log nothing and save nothing."""
    waits = Waits(3, 6)
    made = smallest_stage(SuperResolutionStage, **{**CLOCK, "low_res_timesteps": 20}, resolution=16, lr=1e-3)
    with warnings.catch_warnings():  # restores showwarning too
        train(made, few_real, tmp_path, 7, every=100, saves=100, callbacks=[waits], accelerator="gpu",
              precision="bf16-mixed")  # fmt: skip
    each = {stack: waits.stacks.count(stack) for stack in waits.stacks}
    told = "\n".join(f"{count} x {stack}" for stack, count in each.items())
    figures(steps=3, waits=len(waits.stacks), places=" | ".join(each))
    assert len(waits.stacks) <= 3, f"{len(waits.stacks)} waits in 3 steps:\n{told}"
