"""Commands that train a small network on the experiments' files, and the environment of processes that run them."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASE8, SR16 = (ROOT / "experiments" / "fashion" / f"{name}.yaml" for name in ("base8", "sr16"))
QUICK = [
    "--trainer.logger=false", "--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.precision=32-true",
    "--trainer.limit_val_batches=1", "--trainer.devices=1", "--trainer.enable_progress_bar=false",
    "--data.batch_size=2", "--data.num_workers=0",
    "--model.channels=8", "--model.norm_groups=4", "--model.num_res_blocks=1", "--model.num_heads=2",
]  # fmt: skip
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": PYTHONPATH}


def configs(path: Path) -> list[str]:
    """The arguments that give an experiment's files, and the small callbacks of reduced.yaml after them."""
    files = [ROOT / "experiments/defaults.yaml", path.parent / "defaults.yaml", path, ROOT / "tests/reduced.yaml"]
    return [word for file in files for word in ("--config", str(file))]


def fit_command(*options: str, config: Path = BASE8) -> list[str]:
    """One step of an experiment with a small network."""
    return ["fit", *configs(config), *QUICK, *options]
