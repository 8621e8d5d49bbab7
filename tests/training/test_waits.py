"""How often a training step waits for its device, and how many kernels its random numbers launch there.

The device is torch's meta device, whose tensors hold no numbers: whatever would have to wait for a GPU's numbers asks
for some here.
"""

import traceback

import pytest
import torch
from launches import Launches
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from small_models import SMALLEST, batch_of
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from cdm_lightning.foundation.randomness import KeyedStreams
from cdm_lightning.stages import BaseStage, SuperResolutionStage, diffusion_stage
from cdm_lightning.training import EMA, FiniteSteps
from cdm_lightning.training.checkpoint_files import Trainer
from cdm_lightning.training.progress import Progress

SHAPED_BY_VALUES = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::bincount"}


class MetaAccelerator(CPUAccelerator):
    def setup_device(self, device):
        pass


class Waits(TorchDispatchMode):
    """Where the device was waited for: the functions of this package on the way there, innermost last."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.name(), kwargs or {}
        device = next((arg.device for arg in args if isinstance(arg, torch.Tensor)), None)
        if name == "aten::_local_scalar_dense" and device.type == "meta":
            self.note("read")
            return {torch.bool: True, torch.int64: 1}.get(args[0].dtype, 1.0)
        if name in SHAPED_BY_VALUES and device.type == "meta":
            self.note(name)
            return args[0].new_zeros(1, args[0].ndim, dtype=torch.int64)
        if name == "aten::_to_copy":
            to, blocking = torch.device(kwargs.get("device") or device), not kwargs.get("non_blocking")
            if to.type != device.type and blocking:
                self.note("copy")
            if to.type == "cpu" != device.type:
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name == "aten::copy_" and args[0].device != args[1].device and not (len(args) > 2 and args[2]):
            self.note("copy")
        return func(*args, **kwargs)

    def note(self, what):
        frames = [f for f in traceback.extract_stack() if "cdm_lightning/" in f.filename or "lightning/" in f.filename]
        self.seen.append(f"{what} in {frames[-1].filename.rpartition('/')[2]}: {frames[-1].name}")


class NewTensors(TorchFunctionMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        is_there = func is torch.as_tensor and isinstance(args[0], torch.Tensor)
        if func in (torch.tensor, torch.as_tensor) and not is_there and "meta" in str((kwargs or {}).get("device")):
            self.waits.note("copy")  # below the dispatcher, which Waits does not see
        return func(*args, **(kwargs or {}))


class PerStep(Callback):
    """What was seen in each step, its callbacks and a look at the progress bar included."""

    def __init__(self, waits):
        self.waits, self.steps = waits, []

    def on_train_batch_start(self, *_):
        self.steps.append([])
        self.waits.seen = self.steps[-1]

    def on_train_batch_end(self, trainer, *_):
        self.bar_shows = trainer.progress_bar_callback.status()

    def on_train_end(self, *_):
        self.waits.seen = []


def waits_of(stage, monkeypatch, steps=6, **options):
    """What waited in each of the steps; a row is logged every third."""
    monkeypatch.setattr(diffusion_stage, "uses_fused_adam", lambda stage: False)  # is not for this device
    size = stage.resolution
    batch = torch.rand(4, 1, size, size), torch.arange(4), torch.arange(4)
    waits = Waits()
    per_step = PerStep(waits)
    with waits, NewTensors(waits):
        trainer = Trainer(
            strategy=SingleDeviceStrategy(torch.device("meta"), MetaAccelerator()), max_steps=steps, logger=False,
            callbacks=[per_step, EMA(0.9), FiniteSteps(2), Progress()], enable_model_summary=False,
            enable_checkpointing=False, log_every_n_steps=3, gradient_clip_val=1.0, **options,
        )  # fmt: skip
        trainer.fit(stage, DataLoader([batch] * 12, batch_size=None))
    assert steps < 4 or "loss" in per_step.bar_shows
    return per_step.steps


def stage_of(kind):
    if kind == "base":
        return BaseStage(resolution=8, **SMALLEST)
    clock = {"low_res_timesteps": 20, "low_res_schedule": "cosine"} if kind == "gaussian" else {}
    return SuperResolutionStage(low_resolution=8, resolution=16, augmentation=kind, **clock, **SMALLEST)


NORM, ROW = "read in finite_steps.py: on_before_optimizer_step", "copy in training_log.py: read"


@pytest.mark.parametrize("kind", ["base", "gaussian", "blur"])
def test_a_step_waits_once_for_the_norm_of_its_gradient_and_once_more_where_a_row_is_logged(kind, monkeypatch):
    first, *steps = waits_of(stage_of(kind), monkeypatch)
    assert steps == [[NORM], [NORM, ROW], [NORM], [NORM], [NORM, ROW]]
    assert first[-1] == NORM and all("process.py" in wait for wait in first[:-1])  # the noise schedule goes there once


def test_waiting_is_seen(monkeypatch):
    """One kind of it in each step, so that the test above would fail."""
    stage = stage_of("base")
    kinds = [
        lambda x: None,
        lambda x: x.tolist(),
        lambda x: float(x[0]),
        lambda x: bool((x > 0).any()),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: torch.ones(2).to(x.device),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x.new_zeros(2).copy_(torch.ones(2)),
    ]
    steps, left = len(kinds), iter(kinds)
    monkeypatch.setattr(stage, "check_batch", lambda image: next(left)(image[:, 0, 0, 0]))
    assert all(len([wait for wait in step if wait not in (NORM, ROW)]) for step in waits_of(stage, monkeypatch, steps))


@pytest.mark.parametrize("kind, most", [("base", 125), ("gaussian", 245), ("blur", 240)])
def test_the_draws_of_a_step_launch_as_many_kernels_for_any_batch(kind, most, monkeypatch):
    stage, launches = stage_of(kind), Launches()

    def counted(draw):
        def count(*args):
            with launches:
                return draw(*args)

        return count

    for name in ("__init__", "rand", "randn"):
        monkeypatch.setattr(KeyedStreams, name, counted(getattr(KeyedStreams, name)))

    def of_a_step(images):
        launches.count = 0
        stage.losses(batch_of(stage, images), "train")
        return launches.count

    assert 100 < of_a_step(16) == of_a_step(64) <= most
