"""The commands of README and docs, run in order in an empty folder: small overrides are appended, nothing is replaced.

What needs eight GPUs or SLURM is parsed. Every link, path and name that the pages mention must exist.
"""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from pkgutil import resolve_name

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from adm_files import random_state
from adm_files import reduced as reduced_flags
from commands import QUICK, ROOT
from PIL import Image
from scipy.io import savemat
from servers import serving
from torch.distributed.run import get_args_parser

from cdm_lightning.__main__ import main

RUN = ["README.md", "docs/data.md", "docs/imagenet.md", "docs/measuring.md", "docs/sweeps.md", "docs/python.md"]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "data").glob("*/README.md"))]
HISTORY = {"experiments/study.mk", "experiments/study_table.py"}  # which the pages say to look up in the history
REDUCED = ["--config", str(ROOT / "tests" / "reduced.yaml"), *QUICK, "--trainer.accumulate_grad_batches=1"]
SR32 = "runs/fashion/sr32/checkpoints"
OVERRIDES = {  # what makes each command small; see also reduced.yaml
    "fit": REDUCED,
    "validate": [*(o for o in REDUCED if "reduced" not in o and o != "--config"), "--ckpt_path=last"],
    "test": ["--trainer.limit_test_batches=2", "--data.batch_size=20", "--model.sampling_steps=[2,2,2]"],
    "evaluate": [],
    "search": ["--n", "20", "--block_size", "20", "--levels", "[251]", "--sampling_steps", "[2,2,2]"],
    "cas": [
        "--recipe.architecture",
        "resnet8",
        "--recipe.steps",
        "1",
        "--recipe.batch_size",
        "4",
        "--seeds",
        "[0]",
        "--count",
        "10",
    ],
    "sample": ["--sampling_steps", "[2,2,2]", "--block_size", "8"],  # the last block is padded
    "import": ["--preset=null"],
    "prepare": ["--workers", "1", "--max_corrupt", "0.5"],
    "bundle": [],
    "inspect": [],
    "reference": ["--count", "20", "--accelerator", "cpu"],
    "npz": [],
    "upscale": ["--sampling_steps", "[2]"],
    "plan": ["--arguments=--model.num_res_blocks=1 --model.channel_mult=[1,2]"],
    "sweep": [
        "--count=1",
        "--arguments=--trainer.limit_test_batches=2 --data.batch_size=20 --model.sampling_steps=[2,2,2]",
    ],
}


def blocks(page: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.S | re.M)
    return [block for kind, block in found if kind == language]


def commands(page: str) -> list[list[str]]:
    """Every command of a page's bash blocks, in order, as words."""
    text = "".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = [line.split("  #")[0].strip() for line in text.splitlines() if line.strip()]
    return [shlex.split(line) for line in lines]


def dry_run(command: list[str]) -> list[str]:
    """The last cdm line of `make -n ...`, as words."""
    plain = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKEOVERRIDES", "ARGS")}
    done = subprocess.run([command[0], "-n", *command[1:]], cwd=ROOT, env=plain, capture_output=True, text=True)
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


def fake_sources(folder: Path) -> None:
    """The hub's ImageNet with an image or two a tar, a parquet file, databases of LSUN, and pictures with tables."""
    random = np.random.default_rng(0)
    for split, digits, count in (("train", 4, 1024), ("validation", 2, 64)):
        for number in range(count):
            with tarfile.open(folder / f"imagenet1k-{split}-{number:0{digits}d}.tar", "w") as tar:
                label = number % 1000
                add(tar, f"n{label:08d}_0.cls", str(label).encode())
                add(tar, f"n{label:08d}_0.jpg", jpeg(random, 8))
                add(tar, f"n{label:08d}_0.json", json.dumps({"label": label}).encode())
    (folder / "photos").mkdir()
    table = pa.table({"image": [{"bytes": jpeg(random, 8), "path": "a.jpg"}] * 2, "label": [0, 1]})
    pq.write_table(table, folder / "photos" / "train-00000-of-00001.parquet")
    for split in ("train", "val"):
        path = folder / f"lsun/bedroom_{split}_lmdb"
        path.mkdir(parents=True)
        with lmdb.open(str(path)) as database, database.begin(write=True) as transaction:
            for number in range(4):
                transaction.put(b"%040x" % number, jpeg(random, 16))
    for place, ending in (("pictures", "jpg"), ("tiny-imagenet-200/val/images", "JPEG")):
        (folder / place).mkdir(parents=True)
        for number in range(3):
            (folder / place / f"val_{number}.{ending}").write_bytes(jpeg(random, 8))
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in range(3):
            add(tar, f"ILSVRC2012_val_{number + 1:08d}.JPEG", jpeg(random, 8))
    for table, header, line in (
        ("pictures/labels.csv", "image,label", "val_{n}.jpg,{kind}"),
        ("list.tsv", "id\tspecies\tpath", "{n}\t{kind}\tpictures/val_{n}.jpg"),
        ("tiny-imagenet-200/val/val_annotations.txt", "", "val_{n}.JPEG\tn0000000{n}\t0\t32\t44\t62"),
        ("LOC_val_solution.csv", "ImageId,PredictionString", "ILSVRC2012_val_{number:08d},n0000000{n} 85 1 499 272 "),
    ):
        rows = [line.format(n=n, number=n + 1, kind=kind) for n, kind in enumerate(("cat", "dog", "cat"))]
        (folder / table).write_text("\n".join([header, *rows]))


def fake_published_files(folder: Path) -> None:
    """ADM's 64x64 model and its upsampler, with random weights and small."""
    for preset in ("64x64_diffusion", "64_256_upsampler"):
        torch.save(random_state(reduced_flags(preset)), folder / f"{preset}.pt")


def reduced(words: list[str], few_real: Path) -> list[str]:
    """The arguments of cdm with the small overrides behind them, each of which wins over what it repeats."""
    words = words[1:]
    if words[0] == "--import":
        return [*words[:2], *reduced(words[1:], few_real)]
    options = OVERRIDES[words[0]]
    if words[0] == "prepare":
        options = [*options, "--limit", "6"]
    if words[-2:] == ["--model.lr", "5e-5"]:  # the training is at its first step already
        options = [*options, "--trainer.max_steps=2"]
    if words[0] == "import":
        options = [*options, "--flags", reduced_flags(words[words.index("--preset") + 1])]
    if "experiments/imagenet/sr256_from_adm.yaml" in words:  # its network is smaller than the one in the files
        options = [*options, "--model.init_from=null"]
    if words[0] == "sample" and {"runs/adm/bundle", "runs/decayed/bundle"} & set(words):
        options = ["--sampling_steps=[2,2]", "--block_size=8", "--count=2"]
    elif words[0] == "sample":
        options = [*options, *(["--count", "6"] if "--count" in words else ["--per_class", "4"])]
    if "experiments/fashion/distance.yaml" in words:  # reduced.yaml has other callbacks
        few = ["--trainer.callbacks.n=20", "--trainer.callbacks.sampling_steps=2"]
        options = [*options, "--config", "experiments/fashion/distance.yaml", *few]
    if words[0] in ("search", "cas"):
        options = [*options, "--shards", str(few_real)]
    return [*words, *options]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder: what ships, linked, and the cascade that ships in place of what `make demo` leaves."""
    for name in ("data", "experiments"):
        (tmp_path / name).mkdir()
        for child in (ROOT / name).iterdir():
            (tmp_path / name / child.name).symlink_to(child)
    shutil.copytree(ROOT / "data" / "fashion-cascade", tmp_path / "runs" / "demo" / "bundle")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CDM_IMPORT", "")  # which `cdm --import` sets, for further processes
    monkeypatch.setattr("sys.path", list(sys.path))
    return tmp_path


@pytest.mark.timeout(900)  # some twenty commands; a busy machine is several times slower
@pytest.mark.parametrize("page", RUN)
def test_every_command_of_the_page_runs(page, folder, few_real, capsys):
    for block in blocks(page, "python"):
        if file := re.match(r"# (\w+\.py)\n", block):
            (folder / file[1]).write_text(block)
        else:
            exec(block, {})
    if page == "docs/imagenet.md":
        fake_archives(folder)
        fake_published_files(folder)
    if page == "docs/data.md":
        fake_sources(folder)
    if page == "docs/measuring.md":
        (folder / "photos").mkdir()
        (folder / "photos" / "a.jpg").write_bytes(jpeg(np.random.default_rng(0), 40))
    for command in commands(page):
        if command[0] == "make":
            if command[1] in ("demo", "test"):
                continue  # each of them is a step of its own in continuous integration
            command = dry_run(command)
        assert Path(command[0]).name == "cdm", command
        words = reduced(command, few_real)
        if "https://host/imagenet" in words:
            with serving(folder / "data" / "imagenet-hub") as server:
                main([*words, f"--data.root={server.address}", f"--data.cache={folder / 'cache'}"])
        else:
            main(words)
    left = {
        "README.md": ["dress.png", "runs/tour/search/report.html"],
        "docs/data.md": [
            "data/imagenet-hub/val/32/manifest.json",
            "data/photos/train/32/manifest.json",
            "data/species/train/64/manifest.json",
            "data/tiny/val/64/manifest.json",
        ],
        "docs/imagenet.md": ["runs/imagenet/samples/samples.png"],
        "docs/measuring.md": ["runs/measure/samples.npz", "runs/measure/cas/results.json", f"{SR32}/best.ckpt"],
        "docs/sweeps.md": ["runs/sweeps/level/results.json"],
        "docs/python.md": ["dress.png", "runs/decayed/samples/samples.png", "runs/thumbnail.safetensors"],
    }
    assert all((folder / name).is_file() for name in left[page])


@pytest.mark.parametrize("command", commands("docs/cluster.md"), ids=lambda command: command[0])
def test_every_command_for_a_cluster_is_understood(command, folder, capsys):
    """Its options are those of torchrun, of the script and of `cdm fit`, which prints its configuration and ends."""
    if command[0] == "make":
        options = dry_run(command)[1:]
    elif command[0] == "torchrun":
        told = get_args_parser().parse_args(command[1:])
        assert told.module and told.training_script == "cdm_lightning"
        options = told.training_script_args
    else:
        script = command.index("experiments/slurm.sh")
        experiment, stage, *rest = command[script + 1 :]
        subprocess.run(["bash", "-n", ROOT / command[script]], check=True)
        assert f"make train-stage STAGE={stage}" in (ROOT / "docs" / "cluster.md").read_text()
        options = [*dry_run(["make", "train-stage", f"STAGE={stage}", f"EXPERIMENT={experiment}"])[1:], *rest]
    with pytest.raises(SystemExit) as stop:
        main([*options, "--print_config"])
    assert not stop.value.code
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert trainer["accumulate_grad_batches"] == int(command[-1].split()[-1])


def test_every_link_and_path_of_the_pages_exists():
    for page in PAGES:
        text = page.read_text()
        links = [link.split("#")[0] for link in re.findall(r"\]\(((?!http)[^)]+)\)", text)]
        assert all((page.parent / link).exists() for link in links), (page, links)
        words = {word.rstrip(",;:") for code in re.findall(r"`([^`\n]+)`", text) for word in code.split()}
        for word in words - HISTORY:
            if "/" in word and re.fullmatch(r"[\w./-]+\.(py|yaml|md|mk|sh|toml|css)", word):
                near = (ROOT, ROOT / "cdm_lightning", ROOT / "docs", page.parent)
                assert any((place / word).is_file() for place in near), (page, word)


def test_the_tree_of_the_readme_is_the_tree():
    tree = next(block for block in blocks("README.md", "") if block.startswith("cdm_lightning/"))
    named = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.startswith("  ")}
    there = {path.name for path in (ROOT / "cdm_lightning").iterdir()}
    assert named == there - {"__init__.py", "__pycache__"}
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_new_name_of_the_changelog_exists():
    """The right-hand columns of its tables: class paths in full, modules without the name of the package."""
    rows = [line.split("|") for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.count("|") == 3]
    names = {name for row in rows for name in re.findall(r"`(\w+(?:\.\w+)+)`", row[2])}
    assert len(names) > 30
    for name in names:
        resolve_name(f"cdm_lightning.{name.removeprefix('cdm_lightning.')}")


def test_every_example_of_contributing_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "`" in line]
    for row in rows:
        code = re.findall(r"`([^`]+)`", row)
        sources = "".join((ROOT / word).read_text() for word in code if "/" in word)
        names = [word.split(".")[-1] for word in code if re.fullmatch(r"[\w.]+", word)]
        assert all(re.search(rf"\b{name}\b", sources) for name in names), row
    assert len(rows) >= 7
    for command in commands("CONTRIBUTING.md"):
        if command[0].endswith("pytest"):
            test = (ROOT / command[1]).read_text()
            assert all(f"def {name}(" in test for name in command[3:]), command


def test_the_hooks_do_what_make_lint_does():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    done = subprocess.run(["make", "-n", "lint"], cwd=ROOT, capture_output=True, text=True)
    checks = [line for line in done.stdout.splitlines() if re.match(r"\.venv/bin/(?!pip)", line)]
    assert [hook["entry"] for hook in hooks] == checks


def test_every_make_target_is_in_the_help():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True)
    for page in (*RUN, "docs/cluster.md", "CONTRIBUTING.md"):
        for command in commands(page):
            if command[0] == "make":
                assert re.search(rf"^{command[1]}\s", done.stdout, re.M), command
