"""The classification accuracy score: images that teach and images that do not, the control, the refusals, going on."""

import json
import subprocess
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import ROOT
from folders import FASHION, make_folder, read_raw
from refusals import sentence_of_error, sentence_of_refusal

from cdm_lightning.__main__ import main
from cdm_lightning.data.shards import read_manifest, write_images
from cdm_lightning.evaluation.cas import classifier as module
from cdm_lightning.evaluation.cas.cas import cas
from cdm_lightning.evaluation.cas.classifier import Classifier
from cdm_lightning.evaluation.cas.protocol import Recipe, proportional_counts
from cdm_lightning.evaluation.cas.report import plot_classes, summarise
from cdm_lightning.evaluation.real_images import read_images, write_subset
from cdm_lightning.foundation.images import downscale

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = Recipe(architecture="resnet8", steps=45, batch_size=64, lr=0.1, crop="none", warmup_steps=5)
COUNTS = [60, 50, 60, 60, 60, 60, 60, 60, 60, 60]
CPU = {"accelerator": "cpu"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Fashion at 8x8: `real` images, and `samples` of other ones, `shuffled` with labels that say nothing."""
    first = islice(read_images(FASHION, "train", 8, 1000), 3)
    images, labels = (torch.cat(part).numpy() for part in zip(*first, strict=True))
    images = images.transpose(0, 2, 3, 1)
    classes = read_manifest(FASHION / "train/32").classes
    own = [np.flatnonzero(labels == c) for c in range(10)]
    root = tmp_path_factory.mktemp("toy")

    def write(folder, chosen, given=None, **about):
        chosen = np.concatenate(chosen)
        assert len(set(chosen)) == len(chosen) >= 500
        given = labels[chosen] if given is None else given
        return write_images(folder, images[chosen], given, chosen, classes, 0, 100, **about)

    write(root / "real/train/8", [c[:70] for c in own])
    write(root / "real/val/8", [c[70:130] for c in own])
    generated = [c[130 : 130 + n] for c, n in zip(own, COUNTS, strict=True)]
    facts = {"samples": {"bundle": "abc", "levels": [251, 0]}}
    write(root / "samples/train/8", generated, extra=facts)
    make_folder(root / "samples/train/4", [20], 4)  # a lower resolution is there too
    even = np.concatenate([np.arange(c, c + n) % 10 for c, n in enumerate(COUNTS)])  # each class gets all labels alike
    write(root / "shuffled/train/8", generated, even)
    return root


@pytest.fixture(scope="module")
def scored(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("scored")
    return out, cas(toy / "samples", out, toy / "real", QUICK, seeds=[0, 1], **CPU)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------------------------ the score


def test_images_that_teach_score_high_and_the_report_says_what_was_done(scored, toy):
    out, results = scored
    assert results == json.loads((out / "results.json").read_text())
    for kind in ("generated", "real"):
        runs = [json.loads((out / "runs" / f"{kind}-{seed}" / "result.json").read_text()) for seed in (0, 1)]
        top1 = [run["top1"] for run in runs]
        assert min(top1) > 0.5 and results[kind]["top1"]["per_seed"] == top1
        assert results[kind]["top1"]["mean"] == pytest.approx(sum(top1) / 2)
        assert results[kind]["top1"]["sd"] == pytest.approx(abs(top1[0] - top1[1]) / 2**0.5)
        for run in runs:
            assert run["top5"] > run["top1"] and run["steps"] == 45
            assert np.mean(run["per_class"]) == pytest.approx(run["top1"], abs=1e-6)  # 60 validation images each
    both = (results[kind]["top1"]["per_seed"] for kind in ("generated", "real"))
    ratio = [g / r for g, r in zip(*both, strict=True)]
    assert results["ratio"]["top1"]["per_seed"] == pytest.approx(ratio) and len(set(ratio)) == 2
    expected = {
        "n": 590, "n_real_training": 700, "n_validation": 600, "seeds": [0, 1], "resolution": 8, "counts": COUNTS,
        "protocol": "fewer images", "samples": {"bundle": "abc", "levels": [251, 0]},
    }  # fmt: skip
    assert {name: results[name] for name in expected} == expected
    assert results["classes"][8] == "bag" and results["recipe"]["lr"] == 0.1 and results["epochs"] == 45 * 64 / 590
    assert "this is fewer" in results["conclusion"] and (out / "cas.png").stat().st_size > 5000


def test_labels_that_say_nothing_score_as_chance(scored, toy, tmp_path):
    results = cas(toy / "shuffled", tmp_path, toy / "real", QUICK, seeds=[0], **CPU)
    assert results["generated"]["top1"]["mean"] < 0.2 < 0.5 < results["real"]["top1"]["mean"]
    assert results["generated"]["top1"]["sd"] is None


def test_the_control_has_the_same_counts_of_real_images(scored, toy):
    out, _ = scored
    manifest = read_manifest(out / "real/train/8")
    real, chosen = read_raw(toy / "real/train/8"), read_raw(out / "real/train/8")
    assert manifest.counts == COUNTS
    assert np.bincount([label for _, label in chosen.values()]).tolist() == COUNTS
    assert all(np.array_equal(image, real[k][0]) and label == real[k][1] for k, (image, label) in chosen.items())
    assert not (out / "generated").exists()  # all of them: trained on where they are


def test_a_count_takes_a_share_of_each_class(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "train", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cas(toy / "samples", tmp_path, toy / "real", QUICK, count=100, **CPU)
    for kind in ("generated", "real"):
        assert read_manifest(tmp_path / kind / "train/8").counts == proportional_counts(100, COUNTS)
    assert proportional_counts(100, COUNTS) == [11, 9, 10, 10, 10, 10, 10, 10, 10, 10]  # of 10.17 and 8.47
    assert (
        proportional_counts(5, [2, 2, 2]) == [2, 2, 1]
        and proportional_counts(7, [1, 5, 3]) == [1, 4, 2]
        and proportional_counts(3, [3, 0]) == [3, 0]
    )


# --------------------------------------------------------------------------------------------------------- going on


def test_it_goes_on_after_the_trainings_that_are_done(scored, toy, tmp_path, monkeypatch):
    recipe, titles, train = Recipe(architecture="resnet8", steps=2, batch_size=8, crop="none"), [], module.train

    def stopping(*arguments):
        titles.append(arguments[-1])
        if len(titles) == 2:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(module, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        cas(toy / "samples", tmp_path, toy / "real", recipe, seeds=[3], **CPU)
    before = files(tmp_path / "runs")
    assert not (tmp_path / "results.json").exists() and "generated-3/result.json" in before
    assert cas(toy / "samples", tmp_path, toy / "real", recipe, seeds=[3], **CPU)["seeds"] == [3]
    assert [t.split(" (")[0] for t in titles] == [f"{kind} images, seed 3" for kind in ("generated", "real", "real")]
    after = files(tmp_path / "runs")
    assert all(after[name] == data for name, data in before.items())
    cas(toy / "samples", tmp_path, toy / "real", recipe, seeds=[3], **CPU)
    assert len(titles) == 3 and files(tmp_path / "runs") == after
    for options, name in (
        ({"recipe": Recipe(architecture="resnet8", steps=3, batch_size=8)}, "steps 2, not 3"),
        ({"count": 50}, "counts"),
        ({"samples": toy / "shuffled"}, "samples"),
    ):
        arguments = {"samples": toy / "samples", "out": tmp_path, "shards": toy / "real", "recipe": recipe, **CPU}
        sentence_of_error(lambda a={**arguments, **options}: cas(**a), "was begun with", name, "choose another folder")


def test_a_training_goes_on_from_its_checkpoint_to_the_same_bits(toy, tmp_path, monkeypatch):
    recipe, step, ran = Recipe(architecture="resnet8", steps=20, batch_size=8), Classifier.training_step, []

    def weights(out):
        state = torch.load(out / "runs/generated-0/checkpoints/last.ckpt", weights_only=True)
        return state["state_dict"] | {"step": torch.tensor(state["global_step"])}

    def run(out):
        cas(toy / "samples", out, toy / "real", recipe, seeds=[0], **CPU)

    def stopping(self, batch, batch_idx):
        ran.append(self.global_step)
        if len(ran) == 13:
            raise RuntimeError("power cut")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", stopping)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "cut")
    assert weights(tmp_path / "cut")["step"] == 12
    run(tmp_path / "cut")
    assert ran[:33] == [*range(13), *range(12, 20), *range(12)]  # and then the control
    run(tmp_path / "whole")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole["step"] == 20 and all(torch.equal(value, cut[name]) for name, value in whole.items())


# ---------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_scored_is_refused_and_nothing_is_written(toy, tmp_path):
    def score(*words, samples="samples", shards="real", **options):
        out = tmp_path / "out"
        sentence_of_error(lambda: cas(toy / samples, out, toy / shards, **{"recipe": QUICK, **CPU, **options}), *words)
        assert not out.exists()

    make_folder(toy / "colour/train/8", [30], 8, 3)
    make_folder(toy / "three/train/8", [30], 8, 1, classes=3)
    make_folder(toy / "other/train/8", [30])
    for split in ("train", "val"):
        make_folder(toy / f"one/{split}/8", [9], classes=1)
    write_images(toy / "any/train/8", np.zeros((20, 8, 8, 1), np.uint8), np.zeros(20, int), range(20), ["0"], None)
    write_subset(toy / "real", "train", 8, [20] * 10, toy / "small", 0)
    (toy / "small/val").symlink_to(toy / "real/val")
    score("nowhere/train holds no shards", samples="nowhere")
    score("nowhere/train does not exist", shards="nowhere")
    score("colour has 3 channels, and", "real/train 1", samples="colour")
    score("three has 3 classes, and", "real/train 10", samples="three")
    score("one has 1 class: a classification accuracy takes 2 or more", samples="one", shards="one")
    score("any is of a cascade without classes, and a classification accuracy needs classes", samples="any")
    score("other calls class 0 'class 0', and", "/train 'T-shirt'", samples="other")
    score("60 of class T-shirt, and there are 20: ask for a smaller count", shards="small")
    score("count 9 must lie between one image a class and the 590", count=9)
    score("count 591 must lie between", count=591)
    score("batch_size 64 cannot be shared by 3 devices", devices=3)
    score("seeds [] must be", seeds=[])
    score("seeds [1, 1] must be", seeds=[1, 1])
    score("lr > 0", recipe=Recipe(architecture="resnet8", lr=-1.0))
    score("steps 0 must be at least 1", recipe=Recipe(steps=0))


def test_a_class_without_images_is_refused(toy, tmp_path):
    write_subset(toy / "real", "train", 8, [3] * 9 + [0], toy / "lacking", 0)
    sentence_of_error(
        lambda: cas(toy / "lacking", tmp_path / "x", toy / "real", QUICK), "has no images of class 9 (ankle boot)"
    )


# --------------------------------------------------------------------------------------------------------- the subset


def test_a_subset_is_a_random_choice_of_exact_counts(tmp_path):
    make_folder(tmp_path / "a/train/8", [90, 210, 100], classes=4)
    source, counts = read_raw(tmp_path / "a/train/8"), [40, 0, 99, 1]
    first = write_subset(tmp_path / "a", "train", 8, counts, tmp_path / "one", 0)
    chosen = read_raw(tmp_path / "one/train/8")
    assert first.counts == counts and first.split == "train" and first.count == len(chosen) == 140
    assert np.bincount([label for _, label in chosen.values()], minlength=4).tolist() == counts
    assert all(np.array_equal(image, source[k][0]) and label == source[k][1] for k, (image, label) in chosen.items())
    keys = np.array([int(k) for k in chosen])
    assert 140 < keys[[label == 0 for _, label in chosen.values()]].mean() < 260  # from all of it, not its beginning
    before = files(tmp_path / "one")
    assert write_subset(tmp_path / "a", "train", 8, counts, tmp_path / "one", 0) == first
    assert files(tmp_path / "one") == before
    write_subset(tmp_path / "a", "train", 8, counts, tmp_path / "two", 1)
    assert set(read_raw(tmp_path / "two/train/8")) != set(chosen)
    write_subset(tmp_path / "a", "train", 4, counts, tmp_path / "low", 0)
    low = read_raw(tmp_path / "low/train/4")
    assert low.keys() == chosen.keys()
    for k, (image, _) in low.items():
        assert torch.equal(torch.from_numpy(image), downscale(torch.from_numpy(chosen[k][0]), 4))
    sentence_of_error(
        lambda: write_subset(tmp_path / "a", "train", 8, [1, 1, 1, 1], tmp_path / "one", 0), "another choice of images"
    )
    for counts, words in (
        ([101, 0, 0, 0], "101 images of class 0 (class 0) are asked for"),
        ([1], "1 counts are given"),
    ):
        sentence_of_error(lambda c=counts: write_subset(tmp_path / "a", "train", 8, c, tmp_path / "x", 0), words)
    assert not (tmp_path / "x").exists()


def test_a_subset_that_was_cut_is_written_again(tmp_path):
    make_folder(tmp_path / "a/train/8", [40], classes=4)
    whole = write_subset(tmp_path / "a", "train", 8, [5, 5, 5, 5], tmp_path / "whole", 0)
    (tmp_path / "cut/train/8").mkdir(parents=True)
    (tmp_path / "cut/train/8/000000.tar").write_bytes(b"torn")
    assert write_subset(tmp_path / "a", "train", 8, [5, 5, 5, 5], tmp_path / "cut", 0) == whole


# ------------------------------------------------------------------------------------------------ report and recipes


def test_the_report_of_many_classes_and_of_an_accuracy_of_zero(tmp_path):
    random, names = np.random.default_rng(0), [f"n{c}" for c in range(50)]
    figures = {
        kind: [{"top1": 0.0, "top5": 0.5, "per_class": random.random(50).tolist()} for _ in range(2)]
        for kind in ("generated", "real")
    }
    results = summarise(figures, names, 100, 100) | {"classes": names, "seeds": [0, 1]}
    assert results["ratio"]["top1"] is None and results["ratio"]["top5"]["mean"] == 1
    assert results["protocol"] == "as published" and "fewer" not in results["conclusion"]
    plot_classes(results, tmp_path / "cas.png")
    assert (tmp_path / "cas.png").stat().st_size > 5000


@pytest.mark.parametrize("name", ["fashion", "imagenet"])
def test_the_recipes_run(name, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    path = ROOT / "experiments" / name / "cas.yaml"
    given = ["cas", f"--config={path}", f"--samples={toy}/samples", f"--out={tmp_path}/out"]
    with pytest.raises(SystemExit) as stop:
        main([*given, "--print_config"])
    stated, printed = yaml.safe_load(path.read_text()), yaml.safe_load(capsys.readouterr().out)
    assert stop.value.code == 0 and stated["recipe"].keys() == printed["recipe"].keys()
    assert Recipe(**stated["recipe"]) == Recipe(**printed["recipe"]) and printed["shards"] == f"data/{name}"
    tiny = [
        "--recipe.architecture=resnet8",
        "--recipe.steps=2",
        "--recipe.batch_size=4",
        "--seeds=[0]",
        "--devices=1",
        "--num_workers=0",
    ]
    main([*given, *tiny, f"--shards={toy}/real", "--accelerator=cpu"])
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["recipe"] == printed["recipe"] | {"architecture": "resnet8", "steps": 2, "batch_size": 4}
    assert "generated / real" in capsys.readouterr().out


def test_the_imagenet_recipe_marks_its_numbers():
    lines = (ROOT / "experiments/imagenet/cas.yaml").read_text().split("recipe:")[1].splitlines()
    bare = [line.strip() for line in lines if ":" in line and "# ours" not in line and "# paper" not in line]
    assert bare == ["num_workers: 8"]


def test_the_command_line_refuses_in_one_sentence(capsys, toy, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = ["cas", "--samples", "nowhere", "--out", "x", "--shards", str(toy / "real")]
    assert sentence_of_refusal(capsys, command).startswith("nowhere/train holds no shards")
    made = subprocess.run(["make", "-n", "cas", "SAMPLES=s", "CAS=o"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "cas --config experiments/fashion/cas.yaml --samples s --out o" in made and not (ROOT / "x").exists()
