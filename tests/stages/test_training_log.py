"""The training log: the mean over all images since the last row, whatever the processes, and the same after a kill."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from small_models import batch_of, record_calls
from small_training import logged_rows, smallest_stage, train

from cdm_lightning.data import ShardDataModule
from cdm_lightning.stages.training_log import Meter, quarters
from cdm_lightning.training.checkpoint_files import AtomicCheckpointIO

pytestmark = pytest.mark.filterwarnings("ignore")
START = "spawn" if torch.cuda.is_available() else "fork"  # quicker, but not after CUDA has started


def expected(stage, root, first, last):
    """The mean over the images of places first ... last - 1, computed in one batch and without a trainer."""
    data = ShardDataModule(root, batch_size=8, num_workers=0)
    module = SimpleNamespace(resolution=8, image_channels=1, num_classes=10)
    data.trainer = SimpleNamespace(
        lightning_module=module, world_size=1, global_rank=0, max_steps=9, accumulate_grad_batches=1
    )
    data.images_seen = lambda: 0
    batches = iter(data.train_dataloader())
    images, labels, places = (
        torch.cat(part) for part in zip(*(next(batches) for _ in range(-(-last // 8))), strict=True)
    )
    batch = data.on_after_batch_transfer((images[first:last], labels[first:last], places[first:last]), 0)
    assert batch[2].tolist() == list(range(first, last))
    return {name: float(value.mean()) for name, value in stage.losses(batch, "train").items()}


@pytest.mark.parametrize(("processes", "parts"), [(1, 1), (1, 4), (2, 2)])
def test_a_row_is_the_mean_over_every_image_since_the_last(few_real, tmp_path, processes, parts):
    stage = smallest_stage(lr=0.0)
    train(stage, few_real, tmp_path, 7, processes, parts)
    found = logged_rows(tmp_path)
    assert sorted(found) == [2, 5]
    for step, row in found.items():
        for name, value in expected(stage, few_real, 8 * (step - 2), 8 * (step + 1)).items():
            assert float(row[f"train/{name}"]) == pytest.approx(value, rel=1e-6)
        by_quarter = [float(row[f"train/loss_t_q{q}"]) for q in (1, 2, 3, 4) if f"train/loss_t_q{q}" in row]
        assert min(by_quarter) < float(row["train/loss"]) < max(by_quarter)
        assert float(row["train/grad_norm"]) > 0 and float(row["train/skipped_steps"]) == 0
        assert float(row["train/nonfinite_images"]) == 0
        updates = step  # after the first, which copies
        assert float(row["train/ema_decay"]) == pytest.approx(min(0.9, (1 + updates) / (10 + updates)))


class Looking(AtomicCheckpointIO):
    """Notes which rows are in the log when a checkpoint is written."""

    def __init__(self, folder):
        self.folder, self.seen = folder, []

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.seen.append((checkpoint["global_step"], sorted(logged_rows(self.folder))))
        super().save_checkpoint(checkpoint, path, storage_options)


class Early(Callback):
    """Saves at a step of its own, before the callback that writes the rows has its turn."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/early.ckpt")


def test_a_row_is_on_disk_before_the_checkpoint_of_its_step(few_real, tmp_path, monkeypatch):
    looking = Looking(tmp_path)
    monkeypatch.setattr("small_training.AtomicCheckpointIO", lambda: looking)
    train(smallest_stage(), few_real, tmp_path, 6, callbacks=[Early()])
    assert {step: logged for step, logged in looking.seen} == {2: [], 3: [2], 4: [2], 6: [2, 5]}


def test_a_resumed_run_logs_the_bits_of_an_unbroken_one(few_real, tmp_path):
    """Stopped between two rows, on two processes with accumulation and dropout."""
    for folder, ends in (("whole", [9]), ("parts", [4, 9])):
        for end in ends:
            stage = smallest_stage(lr=1e-2, dropout=0.1)
            train(stage, few_real, tmp_path / folder, end, 2, 2, resume=end != ends[0])
    whole, parts = logged_rows(tmp_path / "whole"), logged_rows(tmp_path / "parts")
    assert whole == parts and sorted(whole) == [2, 5, 8]


def test_another_number_of_processes_takes_the_sums_over(few_real, tmp_path):
    stage = smallest_stage(lr=0.0)
    train(stage, few_real, tmp_path, 4, processes=2)
    train(stage, few_real, tmp_path, 6, processes=1, resume=True)
    value = expected(stage, few_real, 24, 48)["loss"]
    assert float(logged_rows(tmp_path)[5]["train/loss"]) == pytest.approx(value, rel=1e-6)


def test_checkpoints_without_a_meter_still_load(few_real, tmp_path):
    train(smallest_stage(), few_real, tmp_path, 4)
    file = tmp_path / "checkpoints/last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    assert checkpoint.pop("meter")["groups"]
    checkpoint["callbacks"] = {k: v for k, v in checkpoint["callbacks"].items() if "FiniteSteps" not in k}
    torch.save(checkpoint, file)
    train(smallest_stage(), few_real, tmp_path, 6, resume=True)
    assert sorted(logged_rows(tmp_path)) == [2, 5]


def test_the_meter_by_hand():
    meter = Meter()
    meter.add({"a": torch.tensor([1.0, 2.0, torch.nan]), "nonfinite_images": torch.tensor([0.0, 0.0, 1.0])})
    meter.add({"a": torch.tensor([6.0]), "nonfinite_images": torch.tensor([1.0])})
    meter.add({"b": torch.tensor([torch.inf])})
    state = meter.state(lambda rows: rows + 10 * rows.flip(0), 0, 2)  # as if process 1 held ten times as much
    second, alone, other = Meter(), Meter(), Meter()
    second.load(state, 1, 2)
    alone.load(state, 0, 3)
    other.load(state, 2, 3)
    assert meter.read(lambda sums: 2 * sums) == {"a": 3.0, "nonfinite_images": 4.0}  # no value, no entry: b
    assert meter.read(lambda sums: sums) == {}
    assert second.sums["a", "nonfinite_images"].tolist() == [[90.0, 30.0], [20.0, 40.0]]
    assert alone.sums["a", "nonfinite_images"].tolist() == [[99.0, 33.0], [22.0, 44.0]]
    assert other.sums["a", "nonfinite_images"].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_quarters_of_a_range():
    t = torch.arange(1, 21)
    parts = quarters("loss", t.double(), t / 20)
    held = [[int(v) for v in part if v.isfinite()] for part in parts.values()]
    assert list(parts) == ["loss_q1", "loss_q2", "loss_q3", "loss_q4"]
    assert held == [list(range(first, first + 5)) for first in (1, 6, 11, 16)]


def test_the_loss_by_quarters_is_the_loss_of_the_images_there(stages):
    base, gaussian, blur = stages
    for stage, level in ((base, False), (gaussian, True), (blur, False)):
        batch, calls = batch_of(stage, 64), record_calls(stage)
        losses = stage.losses(batch, "train", by_quarters=True)
        assert {name[:6] for name in losses if name[-3:-1] == "_q"} == ({"loss_t", "loss_s"} if level else {"loss_t"})
        for name, values, size in (("t", calls[0][1], stage.diffusion.timesteps), ("s", calls[0][-1], 4001)):
            for quarter in range(4) if name == "t" or level else ():
                v = np.array(values.tolist()) + (name == "s")  # s starts at 0, and is only looked at where there is one
                inside = (v > quarter * size / 4) & (v <= (quarter + 1) * size / 4)
                there = losses[f"loss_{name}_q{quarter + 1}"]
                assert there.isfinite().tolist() == inside.tolist() and 5 < inside.sum() < 30
                assert torch.equal(there[inside], losses["loss"][inside])
        plain = stage.losses(batch, "train")
        assert set(plain) == {n for n in losses if "_q" not in n}
        assert all(torch.equal(plain[n], losses[n]) for n in plain)
