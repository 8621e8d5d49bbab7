"""From shards to a measured cascade by commands, on the GPU: training in two parts, bundle, samples, plan, search."""

import json
import subprocess
import sys

import pytest
import torch
from commands import BASE8, ENVIRONMENT, ROOT, SR16, configs
from devices import CUDA, needs_cuda

from cdm_lightning.__main__ import main
from cdm_lightning.data.shards import read_manifest

pytestmark = [pytest.mark.gpu, needs_cuda, pytest.mark.filterwarnings("ignore")]
NAME = torch.cuda.get_device_name() if CUDA else "CPU"
SMALLER = [
    "--trainer.accelerator=auto", "--trainer.devices=1", "--trainer.precision=bf16-mixed",
    "--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.log_every_n_steps=1",
    "--trainer.val_check_interval=3", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false",
    "--data.batch_size=16", "--data.num_workers=0", f"--data.root={ROOT}/data/fashion",
    "--model.channels=16", "--model.norm_groups=8", "--model.num_heads=2", "--model.sampling_steps=4",
]  # fmt: skip


def fit(config, run, steps, *more):
    folders = [f"--trainer.default_root_dir={run}", f"--trainer.logger.save_dir={run}", f"--trainer.max_steps={steps}"]
    return ["fit", *configs(config), *SMALLER, *folders, *more]


def test_commands_train_sample_plan_and_measure_a_cascade(tmp_path, capsys, monkeypatch, figures):
    monkeypatch.chdir(ROOT)
    base, sr, bundle, out = (tmp_path / name for name in ("base8", "sr16", "bundle", "samples"))
    words = [sys.executable, "-m", "cdm_lightning", *fit(BASE8, base, 3)]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert NAME in done.stdout and "trained 3 steps" in done.stdout, done.stdout[-2000:]
    main(fit(BASE8, base, 6))
    said = capsys.readouterr().out
    assert "after step 3" in said and "trained 6 steps (3 of them now)" in said, said[-2000:]
    assert torch.load(base / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 6
    main(fit(SR16, sr, 2))
    main(["bundle", f"--checkpoints=[{base}/checkpoints/last.ckpt,{sr}/checkpoints/last.ckpt]", f"--out={bundle}"])
    main(["sample", f"--bundle={bundle}", f"--out={out}", "--count=20", "--precision=bf16-mixed"])
    assert read_manifest(out / "train/16").count == 20 and (out / "samples.png").is_file()
    plan = tmp_path / "plan.json"
    main(["plan", "base8", "--experiment=fashion", "--precision=bf16-mixed", "--micro_batch=64", f"--out={plan}"])
    planned = json.loads(plan.read_text())
    assert planned["device"] == NAME and planned["fits"] and planned["speed"].startswith("timed"), planned
    main(["search", f"--bundle={bundle}", f"--out={tmp_path}/search", "--n=20", "--levels=[1001]",
          f"--shards={ROOT}/data/fashion"])  # fmt: skip
    results = json.loads((tmp_path / "search/results.json").read_text())
    distances = [row["figures"][0]["value"] for row in results["rows"]]
    assert distances and all(0 < value < float("inf") for value in distances)
    figures(distances=[round(value, 1) for value in distances], images_a_second=planned["images_a_second"])
