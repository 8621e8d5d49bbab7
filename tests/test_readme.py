"""The README's commands, run in order in an empty folder: small overrides are appended, nothing is replaced."""

import io
import re
import shlex
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from test_experiments import QUICK

from cdm_lightning.__main__ import main

ROOT = Path(__file__).parents[1]
REDUCED = ["--config", str(ROOT / "tests" / "reduced.yaml"), *QUICK, "--trainer.accumulate_grad_batches=1"]
OVERRIDES = {  # what makes each command small; see also reduced.yaml
    "fit": REDUCED,
    "validate": [*(o for o in REDUCED if "reduced" not in o and o != "--config"), "--ckpt_path=last"],
    "test": ["--trainer.limit_test_batches=2", "--data.batch_size=20", "--model.sampling_steps=[2,2,2]"],
    "evaluate": [],
    "search": ["--n", "20", "--block_size", "20", "--levels", "[251]", "--sampling_steps", "[2,2,2]"],
    "cas": ["--recipe.steps", "1", "--recipe.batch_size", "4", "--seeds", "[0]"],
    "sample": ["--sampling_steps", "[2,2,2]", "--block_size", "8"],  # the last block is padded
    "prepare": ["--workers", "1", "--max_corrupt", "0.5"],
    "bundle": [],
    "reference": ["--count", "20", "--accelerator", "cpu"],
    "npz": [],
    "plan": [],
    "sweep": [
        "--count=1",
        "--arguments=--trainer.limit_test_batches=2 --data.batch_size=20 --model.sampling_steps=[2,2,2]",
    ],
}


def commands() -> list[list[str]]:
    """Every command of the README's bash blocks, in order; `make` ones as the lines that make would run."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]
    return [shlex.split(line) for line in lines]


def dry_run(command: list[str]) -> list[str]:
    """The last cdm line of `make -n ...`, as words."""
    done = subprocess.run([command[0], "-n", *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return shlex.split([line for line in done.stdout.splitlines() if line.startswith(".venv/bin/cdm ")][-1])


def jpeg(random, size=300) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def fake_archives(folder: Path) -> None:
    """The three ILSVRC2012 files in miniature: 1000 classes, one image in two of them."""
    random = np.random.default_rng(0)
    wnids = [f"n{i:08d}" for i in range(1, 1001)]
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in wnids:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                add(tar, f"{wnid}_1.JPEG", jpeg(random, 300 if wnid in wnids[:2] else 8))
            add(outer, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in range(1, 4):
            add(tar, f"ILSVRC2012_val_{number:08d}.JPEG", jpeg(random))
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    synsets = np.array([(i + 1, w, w, w, 0) for i, w in enumerate(wnids)], dtype=fields).reshape(-1, 1)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        root = "ILSVRC2012_devkit_t12/data"
        add(tar, f"{root}/meta.mat", meta.getvalue())
        add(tar, f"{root}/ILSVRC2012_validation_ground_truth.txt", b"1\n2\n3\n")


def reduced(words: list[str]) -> list[str]:
    """The arguments of cdm with the small overrides behind them; counts are divided rather than doubled."""
    words = [re.sub(r"^50000$", "6", word) for word in words[1:]]
    options = OVERRIDES[words[0]]
    if words[0] == "prepare":
        options = [*options, "--limit", "6"]
    return [*words, *options]


@pytest.mark.timeout(900)  # some thirty commands; a busy machine is several times slower
def test_every_command_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    for name in ("data", "experiments"):
        (tmp_path / name).mkdir()
        for child in (ROOT / name).iterdir():
            (tmp_path / name / child.name).symlink_to(child)
    fake_archives(tmp_path)
    monkeypatch.chdir(tmp_path)
    ran = []
    for command in commands():
        if command[0] == "make":
            if command[1] in ("demo", "test", "lint", "help", "detector"):
                continue  # each of them is a step of its own in continuous integration
            command = dry_run(command)
        assert Path(command[0]).name == "cdm", command
        main(reduced(command))
        ran.append(" ".join(command[1:3]))
    assert len(ran) >= 16 and (tmp_path / "runs" / "imagenet" / "samples" / "samples.png").is_file()


def test_every_file_the_readme_points_to_exists():
    links = re.findall(r"\]\(((?!http)[^)]+)\)", (ROOT / "README.md").read_text())
    assert links and all((ROOT / link).is_file() for link in links), links


def test_every_make_target_is_in_the_help():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True)
    for command in commands():
        if command[0] == "make":
            assert re.search(rf"^{command[1]}\s", done.stdout, re.M), command


def test_an_unknown_stage_is_refused_by_name(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main(dry_run(["make", "train-stage", "STAGE=sr65"])[1:])
    assert stop.value.code == 2 and "experiments/imagenet/sr65.yaml" in capsys.readouterr().err
