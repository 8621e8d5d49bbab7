"""What `cdm evaluate` refuses: one sentence that names the value and the rule, and no results under a final name."""

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from evaluations import CNN, CPU, N, prepare_evaluation
from PIL import Image
from refusals import sentence_of_error, sentence_of_refusal

from cdm_lightning.data.shards import (
    read_manifest,
    read_shard,
    shards_digest,
    write_images,
    write_manifest,
    write_shard,
)
from cdm_lightning.evaluation.detectors import SmallCNN
from cdm_lightning.evaluation.detectors.loading import FOLDER
from cdm_lightning.evaluation.evaluate import evaluate
from cdm_lightning.evaluation.references.cards import read_card, write_card
from cdm_lightning.evaluation.report.results import read_cas
from cdm_lightning.evaluation.samples import sample_folders
from cdm_lightning.sampling.sample import sample

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def toy(few_real, tmp_path_factory):
    made = prepare_evaluation(tmp_path_factory.mktemp("toy"), few_real)
    made.bags = made.root / "bags"
    sample(made.bundle, made.bags, count=4, classes=[8], **CPU)
    made.unlike = made.root / "unlike"
    sample(made.bundle, made.unlike, count=N, seed=1, levels=[0], block_size=8, **CPU)
    return made


def other_card(toy, folder, **changes):
    """The validation card with other facts."""
    card = read_card(toy.cards[0])
    about = {name: getattr(card, name) for name in type(card).__dataclass_fields__}
    write_card(type(card)(**about | changes | {"path": folder / "other.safetensors"}))
    return folder / "other.safetensors"


def written(folder, n, **about):
    """n samples of noise, image i of class i mod 10."""
    images = np.random.default_rng(0).integers(0, 256, (n, 16, 16, 1), dtype=np.uint8)
    write_images(folder / "train" / "16", images, np.arange(n) % 10, range(n), list("abcdefghij"), None, **about)
    return folder


def damaged(toy, folder, change):
    """The samples of seed 0, of whose first shard `change` makes something else."""
    shutil.copytree(toy.samples[0], folder / "s")
    change(folder / "s" / "train" / "16" / "000000.tar")
    return folder / "s"


def repacked(path, convert):
    """The same shard with its first image converted, in a folder whose manifest agrees with it."""
    samples = [(s["__key__"], s["png"], int(s["cls"])) for s in read_shard(path)]
    buffer = io.BytesIO()
    convert(Image.open(io.BytesIO(samples[0][1]))).save(buffer, "PNG")
    samples[0] = (samples[0][0], buffer.getvalue(), samples[0][2])
    manifest = read_manifest(path.parent)
    shards = [write_shard(path, samples), *manifest.shards[1:]]
    write_manifest(path.parent, replace(manifest, shards=shards))


def check(toy, out, *parts, samples=None, references=None, **options):
    """Refused in one sentence; there is nothing that looks like a result."""
    samples, references = toy.samples[:1] if samples is None else samples, references or toy.cards[:1]
    sentence_of_error(lambda: evaluate(samples, references, out / "out", **options, **CPU), *parts)
    left = {path.name for path in (out / "out").rglob("*")}
    assert left <= {"features", "0", "about.json", "000000.safetensors", "000001.safetensors", "000002.safetensors"}
    return left


def test_samples_that_are_no_sets_of_one_setting(toy, tmp_path):
    a, b, c = toy.samples
    assert not check(toy, tmp_path, "the samples hold 1 of the 10 classes of", "without class 0", samples=[toy.bags])
    assert not check(toy, tmp_path, "the seeds [0, 1, 0] of", "error bars take disjoint seeds", samples=[a, b, a])
    assert not check(toy, tmp_path, "the samples differ in levels: [[5], [0]]", samples=[a, toy.unlike])
    assert not check(toy, tmp_path, "samples [] names no folder", samples=[])
    empty = tmp_path / "nothing"
    assert not check(toy, tmp_path, f"{empty} does not exist", samples=[empty])
    empty.mkdir()
    assert not check(toy, tmp_path, f"{empty} holds no samples", samples=[empty])
    Image.new("L", (8, 8)).save(empty / "a.png")
    assert not check(toy, tmp_path, f"{empty} holds pictures and no shards: `cdm prepare folder ", samples=[empty])
    assert not check(toy, tmp_path, "no samples of 32x32: stored are [8, 16]", samples=[a], resolution=32)


def test_too_few_images(toy, tmp_path):
    card = other_card(toy, tmp_path, counts=None, classes=None)
    sentences = {1: "takes 2 images or more on each side, not 200 real and 1", 3: "takes 4 images or more, not 100"}
    for n, sentence in sentences.items():
        folder = written(tmp_path / f"{n}", n)
        assert check(toy, tmp_path / f"{n}", sentence, samples=[folder], references=[card])  # features were computed


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"resolution": 32}, "is of images with resolution 32, which do not compare with resolution 16"),
        ({"channels": 3}, "is of images with channels 3, which do not compare with channels 1"),
        ({"detector_sha256": "0" * 64}, f"holds features of {CNN} (SHA-256 {'0' * 64})"),
        ({"classes": list("abcdefghi")}, "has 9 classes, and the images 10"),
        ({"classes": list("abcdefghij")}, "calls class 0 'a', and the images 'T-shirt'"),
        ({"classes": None, "counts": [9] * 9}, "is of 9 classes, which do not compare with 10"),
        ({"detector": "vgg"}, "detector 'vgg' is unknown: known are"),
    ],
)
def test_a_card_of_other_images_or_features(toy, tmp_path, changes, sentence):
    resolution = {"resolution": 16} if "resolution" in changes else {}
    assert not check(toy, tmp_path, sentence, references=[other_card(toy, tmp_path, **changes)], **resolution)


@pytest.mark.parametrize("name", ["crop", "filter"])
def test_a_card_of_otherwise_prepared_images(toy, tmp_path, name):
    card = other_card(toy, tmp_path, classes=None, **{name: "adm"})
    folder = written(tmp_path / "s", N, **{name: "area"})
    sentence = f"is of images with {name} adm, which do not compare with {name} area"
    assert not check(toy, tmp_path, sentence, samples=[folder], references=[card])
    evaluate(toy.samples[:1], [card], tmp_path / "unknown", **CPU)  # of these nothing is known


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "it was cut or changed"),
        (lambda path: path.unlink(), "is missing: the manifest lists it with 8 images"),
        (lambda path: (path.parent / "manifest.json").unlink(), "it is no finished folder"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "is not the file its manifest lists"),
        (lambda path: repacked(path, lambda i: i.convert("I;16")), "an image of mode I;16 is neither 8-bit grey"),
        (lambda path: repacked(path, lambda i: i.convert("P")), "an image of mode P is neither 8-bit grey"),
        (lambda path: repacked(path, lambda i: i.convert("RGB")), "has shape (16, 16, 3) where its manifest says"),
    ],
)
def test_damaged_samples(toy, tmp_path, change, sentence):
    check(toy, tmp_path, sentence, samples=[damaged(toy, tmp_path, change)])


def test_files_that_are_not_what_they_should_be(toy, few_real, tmp_path):
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((FOLDER / f"{CNN}.safetensors").read_bytes()[:1000])
    assert not check(toy, tmp_path, "torn.safetensors does not hold the weights of a SmallCNN", detector=torn)
    assert not check(toy, tmp_path, "torn.safetensors is no reference card", references=[torn])
    assert not check(toy, tmp_path, "nowhere.safetensors does not exist", references=[tmp_path / "nowhere.safetensors"])
    sentence_of_error(lambda: evaluate(toy.samples, [], tmp_path / "out"), "references [] names no card")
    # the shards of another preparation, of which a card knows nothing, and scores that are none
    other = tmp_path / "other"
    shutil.copytree(few_real / "train", other / "val")
    assert not check(toy, tmp_path, f"{other}/val/32 does not hold the images that", real=other)
    assert not check(toy, tmp_path, "val does not exist", real=tmp_path / "nowhere")
    card = other_card(toy, tmp_path, shards_sha256=None)
    assert not check(toy, tmp_path, "does not say which images it was made of", references=[card], real=few_real)
    score = tmp_path / "score.json"
    assert not check(toy, tmp_path, "is not the results.json of `cdm cas`: [Errno 2]", cas=score)
    for text in ("{", "[]", json.dumps({"figures": []})):
        score.write_text(text)
        assert not check(toy, tmp_path, "is not the results.json of `cdm cas`", cas=score)


def test_the_inception_score_is_refused_before_anything_is_spent(toy, tmp_path, monkeypatch):
    sentence = "the Inception Score takes the classifier head of the canonical Inception, which makes nothing of"
    assert not check(toy, tmp_path, sentence, head="head.pth")
    monkeypatch.setattr(SmallCNN, "canonical", True)
    few, card = written(tmp_path / "few", 9), other_card(toy, tmp_path, counts=None, classes=None)
    sentence = "the Inception Score over 10 splits takes 10 images or more, not 9"
    assert not check(toy, tmp_path, sentence, samples=[few], references=[card], head="head.pth")
    assert not check(toy, tmp_path, "is missing: it should be torch-fidelity's weights", head=tmp_path / "nowhere.pth")


def test_a_score_of_other_samples_is_not_shown_beside_these(toy, tmp_path):
    score, digests = (
        tmp_path / "score.json",
        [shards_digest(read_manifest(f / "train" / "16").shards) for f in toy.samples],
    )
    about = dict.fromkeys(("generated", "real", "recipe", "seeds", "conclusion"))
    score.write_text(json.dumps(about))
    assert not check(toy, tmp_path, "is not the results.json of `cdm cas`: 'sha256'", cas=score)
    score.write_text(json.dumps(about | {"sha256": {"samples": digests[1]}}))
    sentence = f"is the score of samples of SHA-256 {digests[1][:16]}, and those to evaluate are of {digests[0][:16]}"
    assert not check(toy, tmp_path, sentence, cas=score)
    two = sample_folders(toy.samples[:2], 16)[1]  # of several sets it may be any one's
    assert read_cas(score, two)["sha256"]["samples"] == digests[1]


@pytest.mark.parametrize("name", ["batch_size", "devices"])
def test_numbers_that_make_no_sense(toy, tmp_path, name):
    assert not check(toy, tmp_path, f"{name} is 0: it must be at least 1", **{name: 0})


def test_the_command_line_says_it_in_one_sentence(toy, tmp_path, capsys, monkeypatch):
    command = [
        "evaluate",
        "--samples",
        f"[{toy.bags}]",
        "--references",
        f"[{toy.cards[0]}]",
        "--out",
        f"{tmp_path}/out",
    ]
    assert "the samples hold 1 of the 10 classes" in sentence_of_refusal(capsys, command)
    assert not (tmp_path / "out").exists()
