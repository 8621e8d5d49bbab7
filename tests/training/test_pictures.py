"""How samples keep to their low-resolution input, in figures that every validation logs."""

import csv
import math

import pytest
import torch
from commands import ROOT
from matplotlib.figure import Figure

from cdm_lightning.__main__ import main
from cdm_lightning.foundation.images import downscale
from cdm_lightning.training import LossCurve, pictures
from cdm_lightning.training.pictures import channel_drift, input_agreement, low_pass_agreement


def pair(size=64, channels=3):
    truth = torch.randint(0, 256, (2, channels, size, size), generator=torch.Generator().manual_seed(0)).byte()
    return truth, downscale(truth, size // 4)


def test_the_true_image_neither_drifts_nor_disagrees():
    truth, low_res = pair()
    assert float(channel_drift(truth, low_res).max()) < 0.004 / 8
    assert low_pass_agreement(truth, low_res) == pytest.approx(10 * math.log10(255**2 * 12))


def test_drift_and_agreement_of_a_known_shift():
    truth, _ = pair()
    truth = truth // 2
    low_res = downscale(truth, 16)
    shifted = truth.clone()
    shifted[0, 1] += 16
    drift = channel_drift(shifted, low_res)
    assert drift.shape == (2, 3) and float(drift[0, 1]) == pytest.approx(16 / 127.5, abs=1e-3)
    assert float(drift.sum() - drift[0, 1]) < 0.004
    assert low_pass_agreement(shifted, low_res) == pytest.approx(10 * math.log10(255**2 / (16**2 / 6)), abs=1e-6)
    figures = input_agreement(shifted, low_res)
    assert figures["val/channel_drift_1"] == pytest.approx(8 / 127.5, abs=1e-3)
    assert figures["val/channel_drift"] == pytest.approx(16 / 127.5 / 6, abs=1e-3)
    assert set(input_agreement(shifted[:, :1], low_res[:, :1])) == {"val/channel_drift", "val/low_pass_agreement"}


def test_detail_that_the_low_resolution_does_not_see_is_no_disagreement():
    truth = torch.full((1, 1, 16, 16), 100, dtype=torch.uint8)
    checkers = truth.clone()
    checkers[..., ::2, ::2], checkers[..., 1::2, 1::2] = 140, 60
    low_res = downscale(truth, 8)
    assert low_pass_agreement(checkers, low_res) == low_pass_agreement(truth, low_res)
    checkers[..., :8, :] += 30  # and this it sees
    assert low_pass_agreement(checkers, low_res) == pytest.approx(10 * math.log10(255**2 / 450))


def test_distances_and_rate_of_all_starts_are_panels_below_the_loss(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "Figure", lambda **options: drawn.append(Figure(**options)) or drawn[-1])
    for start, lines in enumerate(
        [["1,3.0,,1e-3", "1,,70.5,", "3,2.0,,1e-3", "3,,60.0,"], ["3,,50.5,", "5,,40.5,1e-5"]]
    ):
        file = tmp_path / f"logs/version_{start}/metrics.csv"
        file.parent.mkdir(parents=True)
        file.write_text("\n".join(["step,train/loss,val/fd_x_real,train/lr", *lines]))
        LossCurve().plot(tmp_path)
    assert (tmp_path / "loss.png").is_file()
    loss, distance, rate = drawn[-1].axes
    assert rate.lines[0].get_xydata().tolist() == [[1, 1e-3], [3, 1e-3], [5, 1e-5]] and rate.get_yscale() == "linear"
    assert [line.get_label() for line in loss.lines] == ["train/loss"]
    assert distance.lines[0].get_xydata().tolist() == [[1, 70.5], [3, 50.5], [5, 40.5]]
    file.parent.with_name("version_0").joinpath("metrics.csv").write_text("step,train/loss,train/loss_t_q1\n1,3.0,2.0")
    file.unlink()
    LossCurve().plot(tmp_path)
    assert [[line.get_label() for line in panel.lines] for panel in drawn[-1].axes] == [["train/loss"]]


def test_a_super_resolution_run_logs_all_of_them(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    files = ["experiments/defaults.yaml", "experiments/fashion/defaults.yaml", "experiments/fashion/sr16.yaml"]
    main([
        "fit", *(word for file in [*files, "tests/reduced.yaml"] for word in ("--config", file)),
        "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1",
        "--trainer.devices=1", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=2",
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={tmp_path}",
        "--trainer.logger.name=logs", "--data.batch_size=32", "--data.num_workers=0", "--model.channels=8",
        "--model.norm_groups=4", "--model.num_res_blocks=1", "--model.num_heads=1",
        f"--trainer.default_root_dir={tmp_path}",
    ])  # fmt: skip
    with (tmp_path / "logs/version_0/metrics.csv").open() as lines:
        logged = {name: float(value) for row in csv.DictReader(lines) for name, value in row.items() if value}
    quartered = {f"train/loss_{name}_q{quarter}" for name in "ts" for quarter in (1, 2, 3, 4)}
    assert quartered | {"train/loss", "train/grad_norm", "train/skipped_steps", "val/loss"} <= set(logged)
    assert 0 <= logged["val/channel_drift"] <= 2 and 0 < logged["val/low_pass_agreement"] < 59
    assert min(logged[n] for n in quartered) < logged["train/loss"] < max(logged[n] for n in quartered)
