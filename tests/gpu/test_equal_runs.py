"""A training on the device: the bits of a resumed run, and a step that overflows in half precision."""

import pytest
import torch
from devices import CUDA, DEVICE, needs_cuda
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from small_training import logged_rows, smallest_stage, train

from cdm_lightning.stages import BaseStage, SuperResolutionStage

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
NETWORK = {"channels": 16, "channel_mult": [1, 2], "norm_groups": 8, "attention_resolutions": [8], "num_heads": 2}


def saved(folder):
    """Every tensor and number of the weights, averages, Adam's state and the scaler in the last checkpoint, by name."""
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    found = {}

    def collect(value, name):
        if isinstance(value, dict):
            for key, part in value.items():
                collect(part, f"{name}/{key}")
        elif isinstance(value, torch.Tensor | float | int):
            found[name] = torch.as_tensor(value)

    for name in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "MixedPrecision"):
        part = checkpoint.get(name, {})
        collect(part[0]["state"] if name == "optimizer_states" else part, name)
    return found


def apart(one, other):
    """How many of the saved values differ, and where the largest difference is."""
    assert one.keys() == other.keys()
    sizes = {name: float((one[name].double() - other[name].double()).abs().max()) for name in one}
    largest = max(sizes, key=sizes.get)
    return sum(not torch.equal(one[name], other[name]) for name in one), f"{largest}: {sizes[largest]:.2e}"


@pytest.fixture
def deterministic():
    """Lightning's deterministic=True, undone afterwards."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


def some_steps(few_real, folder, steps, precision, resume=False):
    """Training of a super-resolution stage with dropout, in deterministic algorithms."""
    clock = {"low_resolution": 8, "low_res_timesteps": 20, "low_res_schedule": "cosine"}
    made = smallest_stage(SuperResolutionStage, **NETWORK, **clock, resolution=16, dropout=0.1, lr=1e-3)
    # 16-mixed: a scale at which nothing overflows, and grows every third step
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=256.0, growth_interval=3)
    given = {"plugins": [MixedPrecision("16-mixed", DEVICE.type, scaler)]}
    given = given if precision == "16-mixed" else {"precision": precision}
    train(made, few_real, folder, steps, resume=resume, accelerator="gpu" if CUDA else "cpu", deterministic=True,
          **given)  # fmt: skip


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", pytest.param("16-mixed", marks=needs_cuda)])
def test_a_resumed_run_ends_in_the_bits_of_the_unbroken_one(few_real, tmp_path, precision, deterministic, figures):
    some_steps(few_real, tmp_path / "whole", 4, precision)
    some_steps(few_real, tmp_path / "parts", 2, precision)
    before = saved(tmp_path / "parts")
    some_steps(few_real, tmp_path / "parts", 4, precision, resume=True)
    whole, parts = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    changed, _ = apart(before, parts)
    assert changed > 0.9 * len(parts)  # the second half of the run has trained
    assert (precision == "16-mixed") == ("MixedPrecision/scale" in whole)
    number, largest = apart(whole, parts)
    figures(values=len(whole), different=number)
    if number:  # then two runs in one go tell whether it is the resume
        some_steps(few_real, tmp_path / "again", 4, precision)
        control, most = apart(whole, saved(tmp_path / "again"))
        figures(largest=largest, control_different=control, control_largest=most)
        raise AssertionError(
            f"{number} of {len(whole)} saved values differ between a run in one go and a resumed one ({largest}); "
            f"between two runs in one go {control} differ ({most})"
        )


class Overflows(BaseStage):
    """A stage whose gradient is infinite for the image at place 17, which belongs to the third step."""

    def losses(self, batch, purpose, **options):
        found = super().losses(batch, purpose, **options)
        bad = batch[2] == 17
        found["loss"].register_hook(lambda gradient: torch.where(bad, torch.inf, gradient))
        return found


class Weights(Callback):
    """The weights and Adam's first moments after every step."""

    def __init__(self):
        self.after = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        moments = [state["exp_avg"] for state in trainer.optimizers[0].state.values()]
        self.after[trainer.global_step] = [p.detach().cpu().clone() for p in [*pl_module.parameters(), *moments]]


def test_a_step_that_overflows_is_skipped_and_counted_and_lowers_the_scale(few_real, tmp_path, figures):
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=8.0)
    weights = Weights()
    train(smallest_stage(Overflows, lr=1e-3), few_real, tmp_path, 5, every=1, callbacks=[weights],
          accelerator="gpu" if CUDA else "cpu", plugins=[MixedPrecision("16-mixed", DEVICE.type, scaler)])  # fmt: skip
    skipped = float(logged_rows(tmp_path)[4]["train/skipped_steps"])
    same = {
        step: all(map(torch.equal, weights.after[step], weights.after[step + 1])) for step in range(1, 5)
    }  # of weights and moments, by the step before
    figures(scale=scaler.get_scale(), skipped=skipped, unchanged=[step + 1 for step in same if same[step]])
    assert same == {1: False, 2: True, 3: False, 4: False}, f"steps that changed nothing: {same}"
    assert skipped == 1, f"{skipped} steps were counted as skipped"
    assert scaler.get_scale() == 4.0, f"the scale is {scaler.get_scale()}, and began at 8"
