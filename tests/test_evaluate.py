"""`cdm evaluate` and `cdm test`: the same figures, from any number of processes, and what is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from conftest import tiny

from cdm_lightning import InputError
from cdm_lightning.bundle import write_bundle
from cdm_lightning.cascade import CascadeModule
from cdm_lightning.datamodule import ShardDataModule
from cdm_lightning.evaluation.callback import CascadeFigures
from cdm_lightning.evaluation.cards import read_card
from cdm_lightning.evaluation.detectors import load_detector
from cdm_lightning.evaluation.evaluate import evaluate
from cdm_lightning.evaluation.features import features_of
from cdm_lightning.evaluation.measure import measure
from cdm_lightning.evaluation.memory import neighbour_rows
from cdm_lightning.evaluation.real_images import read_images
from cdm_lightning.evaluation.reference import reference
from cdm_lightning.images import encode_png
from cdm_lightning.sampling import sample
from cdm_lightning.shards import read_manifest, write_images, write_manifest, write_shard

N, CNN = 40, "fashion-cnn-64"
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def made(tmp_path_factory, few_real):
    """A tiny cascade 8 -> 16, two sets of samples of it, and cards of the real images at 16x16."""
    root = tmp_path_factory.mktemp("made")
    names = read_manifest(few_real / "val" / "32").classes
    write_bundle(root / "bundle", tiny(), {"classes": names})
    for seed in (0, 1):
        sample(root / "bundle", root / f"s{seed}", count=N, seed=seed, levels=[5], block_size=20)
    for split in ("train", "val"):
        reference(few_real, root / f"{split}.safetensors", 16, split, CNN)
    return root


def cards(made):
    return [made / "train.safetensors", made / "val.safetensors"]


def test_it_leaves_the_figures_and_a_page(made, few_real, tmp_path):
    results = evaluate([made / "s0"], cards(made), tmp_path, real=few_real)
    assert results == json.loads((tmp_path / "results.json").read_text())
    judge = load_detector(CNN)
    images = torch.cat([image for image, _ in read_images(made / "s0", "train", 16, 7)])
    expected = [f for path in cards(made) for f in measure([features_of(judge, images)], read_card(path), judge)]
    assert len(results["figures"]) == len(expected) == 8
    for got, figure in zip(results["figures"], expected, strict=True):
        assert (got["name"], got["against"], got["n"]) == (figure.name, figure.against, N)
        assert got["value"] == pytest.approx(figure.value, rel=1e-4, abs=1e-9)
    page = (tmp_path / "report.html").read_text()
    assert f"Fréchet distance ({CNN})" in page and "FID" not in page and "Memorisation" in page


def test_two_processes_give_the_figures_of_one(made, tmp_path):
    one = evaluate([made / "s0", made / "s1"], cards(made), tmp_path / "one")
    command = [
        sys.executable, "-m", "cdm_lightning", "evaluate", "--samples", f"[{made}/s0,{made}/s1]", "--references",
        f"[{made}/train.safetensors,{made}/val.safetensors]", "--out", str(tmp_path / "two"), "--devices", "2",
        "--accelerator", "cpu",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["figures"] == one["figures"] and two["memorisation"] == one["memorisation"]


two_processes = "ddp_spawn" if torch.cuda.is_available() else "ddp_fork"  # quicker, but not after CUDA has started


@pytest.mark.parametrize("strategy, devices", [("auto", 1), (two_processes, 2)])
def test_a_test_gives_what_an_evaluation_of_the_same_samples_gives(made, few_real, tmp_path, strategy, devices):
    cascade = CascadeModule(made / "bundle", levels=[5], seed=0)
    data = ShardDataModule(few_real, batch_size=20 * devices, num_workers=0)
    options = {**QUIET, "limit_test_batches": 2 // devices, "strategy": strategy, "devices": devices}
    figures = CascadeFigures(cards(made))
    runner = L.Trainer(default_root_dir=tmp_path, callbacks=[figures], use_distributed_sampler=False, **options)
    (logged,) = runner.test(cascade, data, verbose=False)
    results = evaluate([made / "s0"], cards(made), tmp_path / "e")
    assert logged["test/n"] == N and not any("detector" in name for name in cascade.state_dict())
    for figure in results["figures"]:
        name = f"test/{figure['key']}_{CNN}"
        assert logged[f"{name}_{figure['against']}"] == pytest.approx(figure["value"], rel=1e-3, abs=1e-3)
        if figure["against"] == "train":  # the first card's have the plain name too
            assert logged[name] == logged[f"{name}_train"]
    assert (tmp_path / "report.html").is_file()


def test_the_callback_belongs_to_a_cascade(made, few_real, tmp_path):
    runner = L.Trainer(default_root_dir=tmp_path, callbacks=[CascadeFigures(cards(made))], **QUIET)
    with pytest.raises(InputError, match="belongs to the test of a cascade: BaseStage is none"):
        runner.test(tiny()[0], ShardDataModule(few_real, batch_size=20, num_workers=0), verbose=False)


def write_samples(folder, images, labels, like):
    """A folder of samples by hand, with the facts of another one."""
    about = read_manifest(like / "train" / "16")
    target = folder / "train" / str(images.shape[1])
    write_images(target, images, labels, range(len(images)), about.classes, None, source="samples", extra=about.extra)
    return folder


def test_a_planted_training_image_is_found(made, few_real, tmp_path):
    real = torch.cat([image for image, _ in read_images(few_real, "train", 16, 60)])
    images = torch.cat([image for image, _ in read_images(made / "s0", "train", 16, N)])
    images[17] = real[33]
    labels = torch.arange(N).numpy() % 10
    planted = write_samples(tmp_path / "s", images.permute(0, 2, 3, 1).numpy(), labels, made / "s0")
    results = evaluate([planted], cards(made), tmp_path / "e", real=few_real)
    assert results["memorisation"]["least"] < 0.01 and results["memorisation"]["share"] >= 1 / N
    card, judge = read_card(made / "train.safetensors"), load_detector(CNN)
    image, around, distance, copy = neighbour_rows(
        card, features_of(judge, images), planted / "train" / "16", few_real
    )[0]
    assert copy and distance[0] < 0.01 and torch.equal(image, real[33]) and torch.equal(around[0], real[33])
    assert "copy" in (tmp_path / "e" / "report.html").read_text()


def test_three_seeds_give_error_bars(made, tmp_path):
    sample(made / "bundle", tmp_path / "s2", count=N, seed=2, levels=[5], block_size=20)
    results = evaluate([made / "s0", made / "s1", tmp_path / "s2"], cards(made)[:1], tmp_path / "e")
    assert all(f["spread_of"] == "3 disjoint seeds" for f in results["figures"])
    assert all(f["spread"] > 0 for f in results["figures"] if f["key"] in ("fd", "kd"))


def other(made, tmp_path, few_real, **options):
    sample(made / "bundle", tmp_path / "other", **{"count": N, "levels": [5], "block_size": 20, **options})
    return [tmp_path / "other"]


def cut_short(made, tmp_path, few_real):
    (folder,) = other(made, tmp_path, few_real)
    shard = folder / "train" / "16" / "000001.tar"
    shard.write_bytes(shard.read_bytes()[:-700])
    return [folder]


def wrong_picture(made, tmp_path, few_real):
    """A picture of colours in a shard whose manifest says grey."""
    (folder,) = other(made, tmp_path, few_real)
    target, manifest = folder / "train" / "16", read_manifest(folder / "train" / "16")
    colour = encode_png(torch.zeros(16, 16, 3, dtype=torch.uint8).numpy())
    shard = write_shard(target / "000001.tar", [(f"{i:08d}", colour, i % 10) for i in range(20)])
    write_manifest(target, replace(manifest, shards=[manifest.shards[0], shard]))
    return [folder]


@pytest.mark.parametrize(
    "samples, options, sentence",
    [
        (lambda *a: other(*a, classes=[3]), {}, "hold 1 of the 10 classes of .*, without class 0"),
        (lambda *a: other(*a, classes=[3], count=1), {}, "hold 1 of the 10 classes"),
        (lambda made, *a: [made / "s0", made / "s0"], {}, r"the seeds \[0, 0\] of .* repeat"),
        (lambda made, *a: [made / "s0", *other(made, *a, seed=1, levels=[0])], {}, "the samples differ in levels"),
        (cut_short, {}, "it was cut"),
        (wrong_picture, {}, "has shape .* where its manifest says"),
        (lambda made, tmp_path, *a: [tmp_path], {}, "holds no samples: `cdm sample` leaves them in"),
        (lambda *a: [], {}, r"samples \[\] names no folder"),
        (lambda made, *a: [made / "s0"], {"references": []}, r"references \[\] names no card"),
        (lambda made, *a: [made / "s0"], {"resolution": 32}, r"holds no samples of 32x32: stored are \[8, 16\]"),
        (lambda made, *a: [made / "s0"], {"resolution": 8}, "is of images with resolution 16"),
        (lambda made, *a: [made / "s0"], {"detector": "vgg"}, "detector 'vgg' is unknown"),
        (lambda made, *a: [made / "s0"], {"references": [Path("none.safetensors")]}, "none.safetensors"),
        (lambda made, *a: [made / "s0"], {"real": Path("data/fashion")}, "does not hold the images that"),
    ],
)
def test_what_is_refused(made, few_real, tmp_path, monkeypatch, samples, options, sentence):
    monkeypatch.chdir(Path(__file__).parents[1])
    given = {"references": cards(made), **options}
    with pytest.raises(InputError, match=sentence):
        evaluate(samples(made, tmp_path, few_real), out=tmp_path / "out", **given)
    assert not list((tmp_path / "out").glob("re*"))  # neither results.json nor report.html
