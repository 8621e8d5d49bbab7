"""`cdm evaluate` on a tiny random cascade: figures as from direct calls, and copies of real images are found."""

import json
import shutil
from dataclasses import asdict
from html import unescape

import numpy as np
import pytest
import torch
from evaluations import CNN, CPU, N, prepare_evaluation
from small_models import smallest_stages

from cdm_lightning import __version__
from cdm_lightning.cascade import CascadeModule
from cdm_lightning.cascade.bundle import write_bundle
from cdm_lightning.data.shards import read_manifest, shards_digest, write_images
from cdm_lightning.evaluation.detectors import features_of, load_detector
from cdm_lightning.evaluation.detectors.loading import FOLDER
from cdm_lightning.evaluation.evaluate import evaluate
from cdm_lightning.evaluation.metrics.measure import measure
from cdm_lightning.evaluation.real_images import read_images
from cdm_lightning.evaluation.references.cards import ReferenceCard, read_card, write_card
from cdm_lightning.evaluation.references.reference import reference
from cdm_lightning.evaluation.report.memorisation import neighbour_rows
from cdm_lightning.evaluation.report.results import PACKAGES, provenance
from cdm_lightning.evaluation.report.stored_samples import resolution_folders, stage_rows
from cdm_lightning.foundation.images import to_uint8
from cdm_lightning.sampling.sample import sample

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def toy(few_real, tmp_path_factory):
    return prepare_evaluation(tmp_path_factory.mktemp("toy"), few_real)


@pytest.fixture(scope="module")
def evaluated(toy):
    """Three sets against both cards: results and folder."""
    return evaluate(toy.samples, toy.cards, toy.root / "out", real=toy.real, seed=4, **CPU), toy.root / "out"


def test_the_figures_are_those_of_direct_calls(toy, evaluated):
    results, _ = evaluated
    judge = load_detector(CNN)
    label, index = torch.arange(N) % 10, torch.arange(N)
    sets = []
    for seed in range(3):
        images = to_uint8(CascadeModule(toy.bundle, seed=seed).sample(label, index)[-1])
        sets.append(features_of(judge, images))
    expected = [figure for card in toy.cards for figure in measure(sets, read_card(card), judge, 4)]
    assert len(results["figures"]) == len(expected) == 8
    for found, figure in zip(results["figures"], map(asdict, expected), strict=True):
        assert found.pop("value") == pytest.approx(figure.pop("value"), rel=1e-3, abs=1e-6)  # another batch size
        assert found.pop("spread") == pytest.approx(figure.pop("spread"), rel=1e-2, abs=1e-6) and found == figure
    names = {f["name"] for f in results["figures"]}
    assert names == {f"{n} ({CNN})" for n in ("Fréchet distance", "kernel distance", "precision", "recall")}


def test_results_and_page_hold_what_was_measured(toy, evaluated):
    results, out = evaluated
    assert json.loads((out / "results.json").read_text()) | {"figures": []} == results | {"figures": []}
    text = unescape((out / "report.html").read_text())
    for part in (f"Fréchet distance ({CNN})", "3 disjoint seeds", "Stages side by side", "Memorisation", "set"):
        assert part in text
    assert results["memorisation"]["split"] == "train" and results["memorisation"]["searched"] == 50
    assert [s["seed"] for s in results["samples"]] == [0, 1, 2] and results["resolution"] == 16
    assert [r["split"] for r in results["references"]] == ["val", "train"] and results["seed"] == 4
    assert results["detector"] == {"name": CNN, "sha256": load_detector(CNN).sha256}
    assert "FID" not in text  # another detector measured
    assert f"SHA-256 {results['detector']['sha256']}" in text and results["made"]["date"] in text
    assert sorted(path.name for path in out.iterdir()) == ["features", "report.html", "results.json"]


def test_it_goes_on_with_the_features_that_are_there(toy, evaluated, monkeypatch):
    _, out = evaluated
    before = json.loads((out / "results.json").read_text())
    monkeypatch.setattr("lightning.pytorch.Trainer.predict", lambda *_, **__: pytest.fail("nothing is left to do"))
    again = evaluate(toy.samples, toy.cards, out, real=toy.real, seed=4, **CPU)
    assert again["figures"] == before["figures"] and again["memorisation"] == before["memorisation"]


def test_another_resolution_and_another_detector(toy, tmp_path):
    """The 8x8 images of the same samples, by a detector from a file, against a card of its own."""
    mine = tmp_path / "mine.safetensors"
    shutil.copy(FOLDER / f"{CNN}.safetensors", mine)
    reference(toy.real, tmp_path / "8.safetensors", 8, "val", str(mine), keep=0, **CPU)
    card = tmp_path / "8.safetensors"
    results = evaluate(toy.samples[:1], [card], tmp_path / "out", detector=str(mine), **CPU)
    (figure,) = results["figures"]  # no features were kept
    assert (figure["name"], figure["n_reference"]) == ("Fréchet distance (mine)", 200)
    assert results["resolution"] == 8 and results["memorisation"] is None
    assert "Copies were not looked for" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("classes", [[7, 1, 4], [3]])
def test_pictures_carry_the_names_of_their_own_classes(toy, tmp_path, classes):
    sample(toy.bundle, tmp_path, count=6, classes=classes, levels=[0], block_size=4, **CPU)
    folders = [tmp_path / "train" / "8", tmp_path / "train" / "16"]
    assert resolution_folders(folders[1]) == folders
    rows, names = stage_rows(folders), read_manifest(folders[0]).classes
    assert [name for name, _ in rows] == [names[c] for c in classes]
    for column, folder in enumerate(folders):
        images = torch.cat([image for image, _ in read_images(tmp_path, "train", int(folder.name), 50)])
        assert all(torch.equal(row[1][column], images[place]) for place, row in enumerate(rows))


def test_pictures_of_a_folder_in_any_order(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (N, 16, 16, 1), dtype=np.uint8)
    write_images(tmp_path / "train" / "16", images, np.arange(N) % 4, range(N), list("abcd"), 3, 2)
    stored, labels = (torch.cat(part) for part in zip(*read_images(tmp_path, "train", 16, 50), strict=True))
    rows, order = stage_rows([tmp_path / "train" / "16"]), list(dict.fromkeys(labels.tolist()))
    assert [name for name, _ in rows] == ["abcd"[c] for c in order] and order != sorted(order)
    for c, (_, [image]) in zip(order, rows, strict=True):
        assert torch.equal(image, stored[labels.tolist().index(c)])


def test_a_score_of_the_same_samples_stands_beside_the_figures(toy, tmp_path):
    one = {"mean": 0.625, "sd": None}
    kind = {"top1": one, "top5": one}
    digest = shards_digest(read_manifest(toy.samples[0] / "train" / "16").shards)
    score = {"generated": kind, "real": kind, "recipe": {"architecture": "resnet8"}, "seeds": [0], "conclusion": "So."}
    (tmp_path / "score.json").write_text(json.dumps(score | {"n": N, "sha256": {"samples": digest}}))
    evaluate(toy.samples[:1], toy.cards, tmp_path / "out", cas=tmp_path / "score.json", **CPU)
    text = unescape((tmp_path / "out" / "report.html").read_text())
    assert "Classification accuracy score" in text and "62.5" in text and "So." in text


def test_cards_of_unknown_split_are_told_apart(toy, tmp_path):
    cards = []
    for name, path in zip(("one", "two"), toy.cards, strict=True):
        about = {**vars(read_card(path)), "split": None, "path": tmp_path / f"{name}.safetensors"}
        write_card(ReferenceCard(**about))
        cards.append(about["path"])
    results = evaluate(toy.samples[:1], cards, tmp_path / "out", **CPU)
    assert [figure["against"] for figure in results["figures"]] == ["one"] * 4 + ["two"] * 4
    assert [card["name"] for card in results["references"]] == ["one", "two"]
    assert "<td>two</td>" in (tmp_path / "out" / "report.html").read_text()


# -- a cascade without classes


@pytest.fixture(scope="module")
def unlabelled(toy):
    """Samples of a cascade without classes, whose bundle knows the names of the classes it was trained on."""
    stages = smallest_stages(num_classes=None)
    for stage in stages:
        stage.trained = {"classes": read_manifest(toy.real / "val" / "32").classes}
    write_bundle(toy.root / "unlabelled", stages, {"levels": [5], "classes": stages[0].trained["classes"]})
    sample(toy.root / "unlabelled", toy.root / "any", count=N, block_size=8, **CPU)
    return toy.root / "any"


def test_samples_without_classes_compare_with_images_of_ten(toy, unlabelled, tmp_path):
    results = evaluate([unlabelled], toy.cards, tmp_path, real=toy.real, seed=4, **CPU)
    images = to_uint8(CascadeModule(toy.root / "unlabelled").sample(torch.zeros(N).long(), torch.arange(N))[-1])
    judge = load_detector(CNN)
    features = [features_of(judge, images)]
    expected = [figure for card in toy.cards for figure in measure(features, read_card(card), judge, 4)]
    for found, figure in zip(results["figures"], expected, strict=True):
        assert (found["name"], found["against"]) == (figure.name, figure.against)
        assert found["value"] == pytest.approx(figure.value, rel=1e-3, abs=1e-6)  # another batch size
    rows = stage_rows(resolution_folders(unlabelled / "train" / "16"))
    assert [name for name, _ in rows] == [f"image {place}" for place in range(8)]
    text = (tmp_path / "report.html").read_text()
    assert "image 7" in text and "T-shirt" not in text


# -- copies


@pytest.fixture(scope="module")
def planted(toy):
    """A folder of samples written by hand: those of seed 0 with training image 31 at place 7."""
    source = toy.samples[0] / "train" / "16"
    images, labels = (torch.cat(part) for part in zip(*read_images(toy.samples[0], "train", 16, 50), strict=True))
    real = torch.cat([image for image, _ in read_images(toy.real, "train", 16, 50)])[31]
    images[7] = real
    classes = read_manifest(source).classes
    folder = toy.root / "planted" / "train" / "16"
    write_images(folder, images.permute(0, 2, 3, 1).numpy(), labels.numpy(), np.arange(N), classes, None, 8)
    return folder, real


def test_a_planted_training_image_is_found(toy, planted, tmp_path):
    folder, real = planted
    results = evaluate([folder.parents[1]], toy.cards, tmp_path, real=toy.real, **CPU)
    found = results["memorisation"]
    assert found["least"] < 0.01 * found["threshold"] and found["share"] == 1 / N
    assert "1 of the 8 images shown count as copies" in (tmp_path / "report.html").read_text()
    clean = evaluate(toy.samples[:1], toy.cards, tmp_path / "clean", **CPU)["memorisation"]
    assert clean["share"] == 0 and clean["least"] > found["threshold"]
    judge, card = load_detector(CNN), read_card(toy.cards[1])
    features = torch.cat([features_of(judge, image) for image, _ in read_images(folder.parents[1], "train", 16, 8)])
    rows = neighbour_rows(card, features, folder, toy.real)
    image, neighbours, distances, is_copy = rows[0]
    assert is_copy and torch.equal(image, real) and torch.equal(neighbours[0], real)
    assert distances[0] == pytest.approx(found["least"], abs=1e-3) and distances == sorted(distances)
    assert not any(row[3] for row in rows[1:]) and [r[2][0] for r in rows] == sorted(r[2][0] for r in rows)


def test_figures_say_the_version_where_the_package_is_not_installed(monkeypatch):
    monkeypatch.setattr("cdm_lightning.evaluation.report.results.version", {name: "1" for name in PACKAGES}.__getitem__)
    assert f"cdm_lightning {__version__}, torch 1" in provenance()["versions"]
