"""Features of folders of shards: those of the detector itself, computed once; and the real images a class asks for."""

import json

import pytest
import torch
from evaluations import LogOfMean
from folders import FASHION

from cdm_lightning.data.shards import read_manifest, read_shard
from cdm_lightning.evaluation.detectors import load_detector
from cdm_lightning.evaluation.metrics.features import extract_features, feature_file, read_features
from cdm_lightning.evaluation.real_images import read_images, real_images_for_labels
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import decode_png, downscale

pytestmark = pytest.mark.filterwarnings("ignore:predict returned None", "ignore:.*isinstance.treespec")
CPU = {"accelerator": "cpu"}


@pytest.fixture(scope="module")
def detector():
    return load_detector("fashion-cnn-64")


@pytest.fixture(scope="module")
def extracted(few_real, detector, tmp_path_factory):
    """Features of the 60 training images, reduced to 16x16, 25 at a time: two files."""
    out = tmp_path_factory.mktemp("features")
    return out, extract_features(few_real, "train", 16, detector, out, batch_size=25, **CPU)


def test_features_are_those_of_the_detector_itself(few_real, detector, extracted):
    out, manifest = extracted
    folder = few_real / "train" / "32"
    assert manifest == read_manifest(folder)
    found = list(read_features(out, manifest))
    for (features, label), shard, sizes in zip(found, manifest.shards, ([25, 15], [20]), strict=True):
        samples = list(read_shard(folder / shard.name))  # batches end where a shard ends
        image = torch.stack([torch.from_numpy(decode_png(s["png"])).permute(2, 0, 1) for s in samples])
        expected = torch.cat([detector(part) for part in downscale(image, 16).split(sizes)])
        assert torch.equal(features, expected) and label.tolist() == [int(s["cls"]) for s in samples]


def test_it_goes_on_with_the_shards_that_are_missing(few_real, detector, extracted):
    out, manifest = extracted
    first, second = sorted(out.glob("*.safetensors"))
    written, kept = second.read_bytes(), first.stat().st_mtime_ns
    second.unlink()
    extract_features(few_real, "train", 16, detector, out, batch_size=25, **CPU)
    assert second.read_bytes() == written and first.stat().st_mtime_ns == kept
    assert not list(out.glob("*.partial"))


def test_another_batch_size_goes_on_with_the_same_features(few_real, detector, extracted, tmp_path):
    """Whatever the batch size is of what is done and of what is still to do."""
    whole, manifest = extracted
    extract_features(few_real, "train", 16, detector, tmp_path, batch_size=40, **CPU)
    feature_file(tmp_path, 1).unlink()
    done = feature_file(tmp_path, 0).stat().st_mtime_ns
    extract_features(few_real, "train", 16, detector, tmp_path, batch_size=3, **CPU)
    assert feature_file(tmp_path, 0).stat().st_mtime_ns == done
    for ours, theirs in zip(read_features(tmp_path, manifest), read_features(whole, manifest), strict=True):
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(ours[1], theirs[1])


def test_a_part_is_the_first_images_alone(few_real, detector, tmp_path, monkeypatch):
    """No more images reach the detector than were asked for, and their features are those of a whole extraction."""
    seen = []
    monkeypatch.setattr(type(detector), "__call__", lambda net, image: seen.append(len(image)) or net.forward(image))
    manifest = extract_features(few_real, "val", 16, detector, tmp_path / "part", count=150, batch_size=30, **CPU)
    assert sum(seen) == 150 and [shard.count for shard in manifest.shards] == [120, 60]
    part = [features for features, _ in read_features(tmp_path / "part", manifest)]
    assert [len(features) for features in part] == [120, 30]
    whole = extract_features(few_real, "val", 16, detector, tmp_path / "whole", batch_size=30, **CPU)
    first = [features for features, _ in read_features(tmp_path / "whole", whole)][:2]
    assert torch.equal(part[0], first[0]) and torch.equal(part[1], first[1][:30])
    extract_features(few_real, "val", 16, detector, tmp_path / "edge", count=120, **CPU)
    assert [path.name for path in (tmp_path / "edge").glob("*.safetensors")] == ["000000.safetensors"]


def test_features_of_other_images_are_not_gone_on_with(few_real, detector, extracted):
    out, _ = extracted
    other = LogOfMean()  # another SHA-256
    for split, resolution, judge in (("val", 16, detector), ("train", 32, detector), ("train", 16, other)):
        with pytest.raises(InputError, match="holds features of other images or of another detector: give another"):
            extract_features(few_real, split, resolution, judge, out, **CPU)
    assert json.loads((out / "about.json").read_text())["resolution"] == 16


def test_features_that_are_not_finite_are_not_written(few_real, tmp_path, monkeypatch):
    monkeypatch.setattr(LogOfMean, "forward", lambda self, image: torch.full((len(image), 2), torch.nan))
    with pytest.raises(InputError, match="detector broken makes features of image 0 of a batch that are not finite"):
        extract_features(few_real, "train", 16, LogOfMean(), tmp_path, **CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["about.json"]


# -- real images


def test_real_images_follow_the_labels(few_real):
    image, label = (torch.cat(part) for part in zip(*read_images(FASHION, "val", 32, 500), strict=True))
    wanted = torch.arange(30) % 10
    found = real_images_for_labels(wanted, FASHION, "val", 8)
    for c in range(10):
        assert torch.equal(found[wanted == c], downscale(image[label == c][:3], 8))
    with pytest.raises(InputError, match=r"n = 600 asks for 60 real images of class \d, and .*/val has [12]\d"):
        real_images_for_labels(torch.arange(600) % 10, few_real, "val", 8)
