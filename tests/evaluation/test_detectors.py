"""The small detector that ships and detectors from files: classes, features, refusals; and its reference cards."""

import numpy as np
import pytest
import torch
from evaluations import LogOfMean
from folders import FASHION

from cdm_lightning.data.shards import read_manifest, shards_digest
from cdm_lightning.evaluation.detectors import features_of, inception, load_detector
from cdm_lightning.evaluation.detectors import loading as detectors
from cdm_lightning.evaluation.metrics.distance import Moments, frechet_distance
from cdm_lightning.evaluation.real_images import read_images
from cdm_lightning.evaluation.references.cards import read_card
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import downscale


@pytest.fixture(scope="module")
def held_out():
    images, labels = zip(*read_images(FASHION, "val", 32, 500), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_the_shipped_detector_knows_the_classes_at_both_resolutions(held_out):
    detector = load_detector("fashion-cnn-64")
    image, label = (part[:500] for part in held_out)
    with torch.no_grad():
        for resolution in (32, 16):
            assert (detector.classify(downscale(image, resolution)).argmax(1) == label).float().mean() > 0.9
        features = detector(image)
    assert features.shape == (500, 64) and features.dtype == torch.float32
    assert torch.linalg.matrix_rank(torch.cov(features.double().T)) > 50  # few features are dead
    assert not detector.training and not any(p.requires_grad for p in detector.parameters())
    assert not detector.canonical  # its distances are no FID


def test_features_do_not_depend_on_the_company_in_the_batch(held_out):
    detector, image = load_detector("fashion-cnn-64"), held_out[0][:9]
    torch.testing.assert_close(detector(image)[4:5], detector(image[4:5]), rtol=1e-4, atol=1e-4)


def test_autocast_does_not_reach_the_features(held_out):
    detector, image = load_detector("fashion-cnn-64"), held_out[0][:20]
    plain = features_of(detector, image)
    with torch.autocast("cpu", torch.bfloat16):
        assert detector(image).dtype == torch.bfloat16  # it would, and is kept from it
        assert torch.equal(features_of(detector, image), plain) and plain.dtype == torch.float32


def test_features_that_are_not_finite_are_refused_by_name():
    image = torch.ones(5, 1, 8, 8, dtype=torch.uint8)
    assert torch.equal(features_of(LogOfMean(), image), torch.zeros(5, 2))
    image[3] = 0
    with pytest.raises(InputError, match="detector broken makes features of image 3 of a batch that are not finite"):
        features_of(LogOfMean(), image)


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(2, 1, 32, 32),
        torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
        torch.zeros(1, 32, 32, dtype=torch.uint8),
    ],
)
def test_the_detector_refuses_what_it_was_not_made_for(image):
    with pytest.raises(InputError, match=r"takes uint8 images \(B, 1, H, W\) of 8 pixels or more"):
        load_detector("fashion-cnn-64")(image)


def test_weights_that_changed_are_refused(tmp_path, monkeypatch):
    data = bytearray((detectors.FOLDER / "fashion-cnn-64.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "fashion-cnn-64.safetensors").write_bytes(data)
    monkeypatch.setattr(detectors, "FOLDER", tmp_path)
    with pytest.raises(InputError, match="is not the detector fashion-cnn-64: its SHA-256 is"):
        load_detector("fashion-cnn-64")
    (tmp_path / "fashion-cnn-64.safetensors").unlink()
    with pytest.raises(InputError, match="is missing"):
        load_detector("fashion-cnn-64")


def test_a_detector_from_a_file(tmp_path):
    shipped = detectors.FOLDER / "fashion-cnn-64.safetensors"
    (tmp_path / "mine.safetensors").write_bytes(shipped.read_bytes())
    detector = load_detector(tmp_path / "mine.safetensors")
    assert detector.name == "mine" and detector.sha256 == detectors.PINNED["fashion-cnn-64"]
    assert load_detector("fashion-cnn-64").name == "fashion-cnn-64"
    (tmp_path / "torn.safetensors").write_bytes(shipped.read_bytes()[:1000])
    with pytest.raises(InputError, match="does not hold the weights of a SmallCNN"):
        load_detector(tmp_path / "torn.safetensors")


@pytest.mark.parametrize("name", ["inception", "inception-2015-12-05"])
def test_inception_is_known_by_two_names(name, monkeypatch):
    monkeypatch.setattr(inception, "load", lambda: "the network in the cache")
    assert load_detector(name) == "the network in the cache"
    with pytest.raises(InputError, match=r"'vgg' is unknown: known are \['inception', 'fashion-cnn-64'\]"):
        load_detector("vgg")


# -- the cards that ship


@pytest.mark.parametrize("split, kept, total", [("val", 3000, 3000), ("train", 5000, 15000)])
def test_the_shipped_cards_are_of_the_shipped_images(split, kept, total):
    card = read_card(FASHION.parent / "references" / f"fashion-{split}-32.safetensors")
    manifest = read_manifest(FASHION / split / "32")
    assert card.shards_sha256 == shards_digest(manifest.shards)
    assert (card.split, card.resolution, card.count, len(card.features)) == (split, 32, total, kept)
    assert (card.classes, card.counts, card.crop) == (manifest.classes, manifest.counts, manifest.crop)
    assert (card.detector, card.detector_sha256) == ("fashion-cnn-64", detectors.PINNED["fashion-cnn-64"])
    image = next(read_images(FASHION, split, 32, 100))[0]
    np.testing.assert_allclose(card.features[:100], load_detector(card.detector)(image), rtol=1e-3, atol=1e-4)
    if kept == total:  # the sums are those of the features beside them
        assert frechet_distance(card.moments, Moments.from_features([card.features])) == pytest.approx(0, abs=1e-8)
