"""Steps that are not finite are skipped on all processes alike, and a run goes back once and then stops."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import PYTHONPATH, ROOT
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from small_training import logged_rows, smallest_stage, train

from cdm_lightning.foundation.errors import InputError, TrainingFault
from cdm_lightning.stages import BaseStage
from cdm_lightning.training import FiniteSteps

pytestmark = pytest.mark.filterwarnings("ignore")


class Faulty(BaseStage):
    """A stage that has no finite loss, or no finite gradient, at some places of the data."""

    bad: tuple[int, ...] = tuple(map(int, filter(None, os.environ.get("BAD_PLACES", "").split(","))))
    of = "loss"

    def losses(self, batch, purpose, **options):
        found = super().losses(batch, purpose, **options)
        bad = torch.tensor([index in self.bad for index in batch[2].tolist()])
        if self.of == "loss":  # a constant: the gradient stays finite
            return {name: torch.where(bad, value + torch.inf, value) for name, value in found.items()}
        found["loss"].register_hook(lambda gradient: torch.where(bad, torch.nan, gradient))
        return found


class States(Callback):
    """What the weights, Adam and the averages are after every optimizer step, kept per process."""

    def __init__(self, folder):
        self.folder, self.after = folder, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        ema, adam = trainer.callbacks[0]._average_model, trainer.optimizers[0].state_dict()
        kept = {
            "weights": [p.detach().clone() for p in pl_module.parameters()],
            "averages": [p.detach().clone() for p in ema.module.parameters()],
            "updates": ema.n_averaged.clone(),
            "adam": [v.clone() for state in adam["state"].values() for v in state.values()],
            "rate": adam["param_groups"][0]["lr"],
            "seen": trainer.datamodule.images_seen(),
        }
        kept["seen"] = self.after.get(trainer.global_step, kept)["seen"]
        self.after[trainer.global_step] = kept  # as it is when the next step's accumulation is about to end

    def on_train_end(self, trainer, pl_module):
        self.folder.mkdir(exist_ok=True)
        torch.save(self.after, self.folder / f"rank{trainer.global_rank}.pt")


def same(one, other, names=("weights", "averages", "adam"), close=False):
    pairs = [(a, b) for name in names for a, b in zip(one[name], other[name], strict=True)]
    alike = torch.allclose if close else torch.equal
    return all(alike(a, b, **({"rtol": 1e-4, "atol": 1e-6} if close else {})) for a, b in pairs)


def faulty(of="loss", bad=(), **options):
    stage = smallest_stage(Faulty, lr=1e-3, warmup_steps=50, **options)
    stage.bad, stage.of = bad, of
    return stage


def run(few_real, folder, of, bad, steps, *args, **options):
    """The states of every process after every step."""
    train(faulty(of, bad), few_real, folder, steps, *args, callbacks=[States(folder / "states")], **options)
    return [torch.load(file) for file in sorted((folder / "states").glob("*.pt"))]


@pytest.mark.parametrize(
    ("of", "processes", "parts"), [("loss", 1, 2), ("gradient", 1, 1), ("loss", 2, 2), ("gradient", 2, 1)]
)
def test_a_step_that_is_not_finite_changes_nothing_on_any_process(few_real, tmp_path, of, processes, parts):
    """Place 17 is of the third step, and belongs to process 1 and to the first of its accumulated batches."""
    after = run(few_real, tmp_path / "bad", of, (17,), 5, processes, parts, every=1)
    assert len(after) == processes
    for states in after:
        assert same(states[2], states[3]) and int(states[2]["updates"]) == int(states[3]["updates"]) == 2
        assert not same(states[1], states[2]) and not same(states[3], states[4], ["weights"])
        assert not same(states[3], states[4], ["averages"]) and not same(states[3], states[4], ["adam"])
        assert states[3]["seen"] == states[2]["seen"] + 8 == 24 and states[3]["rate"] > states[2]["rate"]
        assert all(tensor.isfinite().all() for name in ("weights", "averages", "adam") for tensor in states[5][name])
        assert all(same(states[step], after[0][step]) for step in states)
    log = logged_rows(tmp_path / "bad")
    assert [float(log[step]["train/skipped_steps"]) for step in range(5)] == [0, 0, 1, 1, 1]
    assert float(log[2]["train/loss"]) < 100 and "train/grad_norm" not in log[2]
    assert float(log[2]["train/nonfinite_images"]) == (of == "loss")
    saved = torch.load(tmp_path / "bad/checkpoints/last.ckpt", weights_only=True)
    assert saved["callbacks"]["FiniteSteps"]["skipped"] == 1


def test_two_processes_skip_what_one_process_skips(few_real, tmp_path):
    one = run(few_real, tmp_path / "one", "loss", (17,), 5)[0]
    two = run(few_real, tmp_path / "two", "loss", (17,), 5, 2)[0]
    assert same(one[5], two[5], ["weights"], close=True) and not same(one[5], one[1], ["weights"], close=True)


def test_more_than_a_number_in_a_row_goes_back_once_and_then_stops(few_real, tmp_path):
    """Steps 6, 7 and 8 of places 40 ... 63 are not finite; the newest checkpoint from before is step 5's."""
    streak = tuple(range(40, 64))
    after = run(few_real, tmp_path, "gradient", streak, 10, saves=1)[0]
    before, back = after[5], after[8]
    changed = [step for step in range(1, 8) if not same(after[step], after[step + 1], ["weights"])]
    assert changed == [1, 2, 3, 4]
    assert same(before, back) and back["seen"] == 64 and back["rate"] > before["rate"]
    assert not same(after[8], after[9], ["weights"])
    files = {file.name for file in (tmp_path / "checkpoints").iterdir()}
    assert "last.ckpt" in files and not any("skipped" in name or "partial" in name for name in files)
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["callbacks"]["FiniteSteps"]
    assert saved == {"skipped": 3, "in_a_row": 0, "last": 8, "rolled_back_at": 8}
    stage = faulty("loss", (*streak, *range(96, 200)))  # and again from step 13 on, in another start of the run
    with pytest.raises(
        TrainingFault, match=r"3 optimizer steps in a row, the last of them step 15, .* at step 8 already"
    ):
        train(stage, few_real, tmp_path, 30, resume=True, saves=1)
    assert (
        sorted(logged_rows(tmp_path)) == [2, 5, 8, 11] and float(logged_rows(tmp_path)[8]["train/skipped_steps"]) == 3
    )


def test_going_back_takes_weights_averages_and_adam_from_the_file(few_real, tmp_path):
    """With a checkpoint every third step the state goes back from step 5's to step 3's."""
    after = run(few_real, tmp_path, "gradient", tuple(range(40, 64)), 9, saves=3)[0]
    assert same(after[7], after[5]) and not same(after[8], after[5]) and same(after[8], after[3])


def test_without_a_checkpoint_from_before_the_run_stops(few_real, tmp_path):
    with pytest.raises(
        TrainingFault, match="the last of them step 3, and max_skipped is 2: there is no checkpoint from"
    ):
        train(faulty("loss", tuple(range(99))), few_real, tmp_path, 9, saves=1)


def test_weights_that_are_not_finite_are_never_written(few_real, tmp_path):
    class Break(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 3:
                next(pl_module.parameters()).data[0] = torch.nan

    with pytest.raises(TrainingFault, match="are not finite after step 4: no checkpoint is written"):
        train(smallest_stage(), few_real, tmp_path, 9, callbacks=[Break()])
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_the_gradient_scaler_skips_counts_and_backs_off(few_real, tmp_path):
    """On a CPU, whose half precision serves for this alone."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    after = run(few_real, tmp_path, "gradient", (17,), 5, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], every=1)[
        0
    ]
    assert same(after[2], after[3]) and not same(after[3], after[4], ["weights"])
    assert scaler.get_scale() == 4.0 and float(logged_rows(tmp_path)[4]["train/skipped_steps"]) == 1


class LastWords(FiniteSteps):
    def on_train_batch_end(self, trainer, *args, **options):
        try:
            super().on_train_batch_end(trainer, *args, **options)
        except TrainingFault as error:
            Path(trainer.default_root_dir, f"rank{trainer.global_rank}.txt").write_text(str(error))
            trainer.strategy.barrier()  # else the first to end would have the other killed
            raise


def test_both_processes_stop_at_the_same_step(few_real, tmp_path, monkeypatch):
    """Places of process 1 alone, from the second step on."""
    monkeypatch.setattr("small_training.FiniteSteps", LastWords)
    with pytest.raises(Exception, match="TrainingFault"):
        train(faulty("loss", range(9, 400, 2)), few_real, tmp_path, 50, 2, saves=1)
    words = [(tmp_path / f"rank{rank}.txt").read_text() for rank in range(2)]
    assert words[0] == words[1] and "the last of them step 7," in words[0] and "at step 4 already" in words[0]


def test_a_number_in_a_row_below_none_is_refused():
    with pytest.raises(InputError, match="max_skipped -1 must be at least 0"):
        FiniteSteps(-1)


@pytest.mark.long
def test_both_processes_of_a_command_stop_with_one_sentence(tmp_path):
    arguments = [
        "fit", "--config", "experiments/defaults.yaml", "--config", "experiments/fashion/defaults.yaml",
        "--config", "experiments/fashion/base8.yaml", "--config", "tests/reduced.yaml",
        "--model=test_finite_steps.Faulty", "--trainer.logger=false", "--trainer.max_steps=50",
        "--trainer.accelerator=cpu", "--trainer.devices=2",
        "--trainer.strategy=ddp", "--trainer.limit_val_batches=0", "--data.batch_size=4", "--data.num_workers=0",
        "--model.channels=8", "--model.norm_groups=4", "--model.num_res_blocks=1", "--model.num_heads=1",
        f"--trainer.default_root_dir={tmp_path}", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    bad = ",".join(str(place) for place in range(5, 400, 4))  # of process 1 alone, from the second step on
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "BAD_PLACES": bad,
        "PYTHONPATH": f"{Path(__file__).parent}:{PYTHONPATH}",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "cdm_lightning", *arguments], capture_output=True, text=True, timeout=900,
        env=environment, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    sentences = [line for line in done.stderr.splitlines() if line.startswith("cdm: error:")]
    # The second process prints the sentence too where the first has left before it asks.
    assert len(set(sentences)) == 1 and "the run went back to a checkpoint at step 12 already" in sentences[0]
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
