"""Reference cards against numpy, one process against two, and ADM's .npz files, read and written."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import FASHION
from safetensors import safe_open
from safetensors.torch import save_file

from cdm_lightning.__main__ import main
from cdm_lightning.data.shards import read_manifest, read_shard, shards_digest, write_manifest, write_shard
from cdm_lightning.evaluation.detectors import Detector, Inception, SmallCNN, load_detector
from cdm_lightning.evaluation.metrics import features
from cdm_lightning.evaluation.metrics.distance import frechet_distance
from cdm_lightning.evaluation.real_images import read_images
from cdm_lightning.evaluation.references import adm
from cdm_lightning.evaluation.references.adm import npz
from cdm_lightning.evaluation.references.cards import (
    Facts,
    bias_note,
    card_names,
    card_summaries,
    check_card,
    read_card,
)
from cdm_lightning.evaluation.references.reference import reference
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import decode_png, downscale

CNN = "fashion-cnn-64"
pytestmark = pytest.mark.filterwarnings("ignore:predict returned None", "ignore:.*isinstance.treespec")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Three shards of the first 120, 60 and 20 validation images."""
    folder = tmp_path_factory.mktemp("few") / "val" / "32"
    read = read_shard(FASHION / "val" / "32" / "000.tar.gz")
    samples = [(s["__key__"], s["png"], int(s["cls"])) for s in islice(read, 200)]
    ends = ((0, 120), (120, 180), (180, 200))
    shards = [write_shard(folder / f"{a}.tar", samples[a:b]) for a, b in ends]
    counts = np.bincount([s[2] for s in samples], minlength=10).tolist()
    whole = read_manifest(FASHION / "val" / "32")
    write_manifest(folder, replace(whole, shards=shards, counts=counts, crop="adm", source="Fashion"))
    return folder.parents[1]


@pytest.fixture(scope="module")
def card(few, tmp_path_factory):
    out = tmp_path_factory.mktemp("card") / "few.safetensors"
    reference(few, out, 16, "val", CNN, keep=130, accelerator="cpu")
    return read_card(out)


def stored(folder):
    """All images (N, 1, 16, 16) and labels, each read on its own."""
    manifest = read_manifest(folder / "val" / "32")
    samples = [s for shard in manifest.shards for s in read_shard(folder / "val" / "32" / shard.name)]
    images = [torch.from_numpy(decode_png(s["png"])).permute(2, 0, 1) for s in samples]
    return downscale(torch.stack(images), 16), [int(s["cls"]) for s in samples]


# -- making one


def test_a_card_holds_numpys_mean_and_covariance(few, card):
    detector, (image, label) = load_detector(CNN), stored(few)
    parts = [chunk for shard in image.split([120, 60, 20]) for chunk in shard.split(50)]
    found = torch.cat([detector(part) for part in parts])
    assert card.features.dtype == torch.float32 and torch.equal(card.features, found[:130])
    assert torch.equal(card.places, torch.arange(130)) and card.moments.outer.dtype == torch.float64
    f = found.double().numpy()
    np.testing.assert_allclose(card.moments.mean.numpy(), f.mean(0), rtol=1e-13)
    np.testing.assert_allclose(card.moments.covariance.numpy(), np.cov(f, rowvar=False), rtol=1e-10, atol=1e-12)
    manifest = read_manifest(few / "val" / "32")
    assert card.count == card.moments.n == 200 and card.counts == np.bincount(label, minlength=10).tolist()
    assert (card.source, card.split, card.resolution, card.channels) == ("Fashion", "val", 16, 1)
    assert (card.crop, card.filter, card.classes) == ("adm", "none", manifest.classes)
    assert (card.detector, card.detector_sha256, card.canonical) == (CNN, detector.sha256, False)
    assert card.shards_sha256 == shards_digest(manifest.shards) and card.made["stored_resolution"] == 32
    assert card.made["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert [p.name for p in card.path.parent.iterdir()] == ["few.safetensors"]  # nothing else is left


def test_a_part_is_exactly_the_first_images(few, tmp_path, capsys):
    reference(few, tmp_path / "c.safetensors", 16, "val", CNN, keep=10_000, count=150, accelerator="cpu")
    card, (image, label) = read_card(tmp_path / "c.safetensors"), stored(few)
    assert card.count == card.moments.n == len(card.features) == 150
    assert card.counts == np.bincount(label[:150], minlength=10).tolist()
    f = card.features.double().numpy()
    np.testing.assert_allclose(card.moments.covariance.numpy(), np.cov(f, rowvar=False), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(card.features[120:150], load_detector(CNN)(image[120:150]), rtol=1e-4, atol=1e-4)
    assert card.shards_sha256 == shards_digest(read_manifest(few / "val" / "32").shards[:2])
    assert "note: n = 150 is less than 50,000" in capsys.readouterr().out
    reference(few, tmp_path / "none.safetensors", 16, "val", CNN, keep=0, count=2, accelerator="cpu")
    bare = read_card(tmp_path / "none.safetensors")
    assert bare.features is None and bare.places is None and bare.count == 2


def content(path):
    """All tensors of a card, and what it says but for the date."""
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["card"])
        facts["made"].pop("date")
        return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118  # no mapping


def assert_same(one, other):
    (tensors, facts), (others, other_facts) = content(one), content(other)
    assert facts == other_facts and tensors.keys() == others.keys() and len(tensors) == 4
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_it_goes_on_after_an_interruption(few, card, tmp_path, monkeypatch):
    real, written = features.write_atomically, []

    def stopped(path, data):
        if len(written) == 3:  # about.json and two shards are done
            raise KeyboardInterrupt
        written.append(path.name)
        real(path, data)

    monkeypatch.setattr(features, "write_atomically", stopped)
    options = {"split": "val", "detector": CNN, "keep": 130, "accelerator": "cpu"}
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        reference(few, tmp_path / "c.safetensors", 16, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors.partial-features"]
    with pytest.raises(InputError, match="features of other images or of another detector"):
        reference(few, tmp_path / "c.safetensors", 8, **options)
    monkeypatch.setattr(features, "write_atomically", lambda path, data: (written.append(path.name), real(path, data)))
    reference(few, tmp_path / "c.safetensors", 16, **options)
    assert written == ["about.json", "000000.safetensors", "000001.safetensors", "000002.safetensors"]
    assert_same(tmp_path / "c.safetensors", card.path)


def test_one_class_is_said(tmp_path, capsys):
    folder = tmp_path / "val" / "32"
    png = next(iter(read_shard(FASHION / "val" / "32" / "000.tar.gz")))["png"]
    shard = write_shard(folder / "0.tar", [("a", png, 3), ("b", png, 3)])
    counts = [0, 0, 0, 2, 0, 0, 0, 0, 0, 0]
    write_manifest(folder, replace(read_manifest(FASHION / "val" / "32"), shards=[shard], counts=counts))
    reference(tmp_path, tmp_path / "c.safetensors", 32, "val", CNN, accelerator="cpu")
    assert "note: all of them are of one class, dress" in capsys.readouterr().out
    assert read_card(tmp_path / "c.safetensors").counts == [0, 0, 0, 2, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"out": "c.npz"}, r"does not end in \.safetensors"),
        ({"count": 1}, "count is 1: moments take 2 images or more, and .* holds 200"),
        ({"count": 201}, "count is 201: .* holds 200"),
        ({"keep": -1}, "keep is -1: it must be at least 0"),
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"resolution": 12}, "no shards for resolution 12"),
        ({"detector": "colour.safetensors"}, "takes images of 3 channels, not of 1: give another by --detector"),
    ],
)
def test_requests_that_make_no_sense(few, tmp_path, tmp_path_factory, monkeypatch, options, sentence):
    monkeypatch.chdir(tmp_path_factory.mktemp("detector"))
    save_file(SmallCNN(channels=3).state_dict(), "colour.safetensors")
    asked = {"out": "c.safetensors", "resolution": 16, "split": "val", "detector": CNN, **options}
    asked["out"] = tmp_path / asked["out"]
    with pytest.raises(InputError, match=sentence):
        reference(few, **asked)
    assert not any(tmp_path.iterdir())


def test_what_exists_is_kept_and_cut_shards_are_refused(few, card, tmp_path):
    before = card.path.read_bytes()
    with pytest.raises(InputError, match="exists already: remove it or give another name"):
        reference(few, card.path, 16, "val", CNN)
    assert card.path.read_bytes() == before
    folder = tmp_path / "val" / "32"
    folder.mkdir(parents=True)
    for file in (few / "val" / "32").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    data = (folder / "120.tar").read_bytes()
    (folder / "120.tar").write_bytes(data[:-5000])
    with pytest.raises(InputError, match="it was cut or changed"):
        reference(tmp_path, tmp_path / "c.safetensors", 16, "val", CNN)
    (folder / "120.tar").write_bytes(
        data[:9000] + bytes(len(data) - 9000)
    )  # the size is right, the images are not there
    with pytest.raises(InputError, match=r"120\.tar is not the file its manifest lists"):
        reference(tmp_path, tmp_path / "c.safetensors", 16, "val", CNN, accelerator="cpu")
    assert not (tmp_path / "c.safetensors").exists()


# -- reading one


def damaged(card, tmp_path, **change):
    with safe_open(card.path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        facts = json.loads(file.metadata()["card"])
    facts |= {name: value for name, value in change.items() if name in Facts.__dataclass_fields__}
    tensors |= {name: value for name, value in change.items() if name not in Facts.__dataclass_fields__}
    save_file(
        {n: t for n, t in tensors.items() if t is not None}, tmp_path / "x.safetensors", {"card": json.dumps(facts)}
    )
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize(
    "change",
    [
        {"count": 1}, {"count": "many"}, {"detector_sha256": None}, {"total": None}, {"places": None},
        {"total": torch.zeros(63, dtype=torch.float64)}, {"outer": torch.zeros(64, 64)},
        {"total": torch.full((64,), torch.nan, dtype=torch.float64)}, {"features": torch.zeros(130, 63)},
        {"features": torch.zeros(129, 64)},
    ],
)  # fmt: skip
def test_damaged_cards_are_refused(card, tmp_path, change):
    with pytest.raises(InputError, match="is no reference card"):
        read_card(damaged(card, tmp_path, **change))


def test_torn_and_missing_cards_are_refused(card, tmp_path):
    assert read_card(damaged(card, tmp_path)).counts == card.counts  # an undamaged copy passes
    assert not read_card(damaged(card, tmp_path)).canonical
    for data in (card.path.read_bytes()[:-100], b"", b"\0" * 50):
        (tmp_path / "torn.safetensors").write_bytes(data)
        with pytest.raises(InputError, match="is no reference card"):
            read_card(tmp_path / "torn.safetensors")
    save_file({"total": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="is no reference card"):
        read_card(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="does not exist: it should be a reference card"):
        read_card(tmp_path / "none.safetensors")


# -- ADM's reference statistics and samples


class Pixels(Detector):
    """Features that are sums over rows, so that means and covariances are known."""

    name, sha256, num_features = "pixels", "1" * 64, 12

    def forward(self, image):
        return image.float().sum(3).flatten(1)


@pytest.fixture
def eight(monkeypatch):
    monkeypatch.setattr(Inception, "num_features", 8)
    random = np.random.default_rng(0)
    data = random.normal(size=(50, 8))
    return {"mu": data.mean(0), "sigma": np.cov(data, rowvar=False), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}


def test_adms_statistics_become_a_card(eight, tmp_path):
    np.savez(tmp_path / "ref.npz", **eight)
    for count in (None, 50):
        card = read_card(tmp_path / "ref.npz", count=count)
        np.testing.assert_allclose(card.moments.mean.numpy(), eight["mu"], rtol=1e-12)
        np.testing.assert_allclose(card.moments.covariance.numpy(), eight["sigma"], rtol=1e-9, atol=1e-12)
        assert (card.detector, card.detector_sha256, card.canonical) == (Inception.name, Inception.sha256, True)
        assert card.count == count and card.moments.n == (count or 2)
        unknown = ("source", "split", "resolution", "channels", "crop", "filter", "classes", "counts", "features")
        assert all(getattr(card, name) is None for name in unknown)
    shifted = {**eight, "mu": eight["mu"] + 2}
    np.savez(tmp_path / "shifted.npz", **shifted)
    distance = frechet_distance(card.moments, read_card(tmp_path / "shifted.npz").moments)
    assert distance == pytest.approx(8 * 2**2, rel=1e-9)
    with pytest.raises(InputError, match="count is 1: mu and sigma are of 2 images or more"):
        read_card(tmp_path / "ref.npz", count=1)


def test_images_beside_the_statistics_are_measured_by_the_same_detector_alone(eight, tmp_path, monkeypatch):
    images = np.random.default_rng(1).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "ref.npz", **eight, arr_0=images)
    assert read_card(tmp_path / "ref.npz").features is None and read_card(tmp_path / "ref.npz").resolution == 4
    assert read_card(tmp_path / "ref.npz", Pixels()).features is None
    monkeypatch.setattr(Inception, "sha256", Pixels.sha256)
    card = read_card(tmp_path / "ref.npz", Pixels())
    assert card.features.shape == (3, 12) and card.count is None and torch.equal(card.places, torch.arange(3))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_alone_are_measured(tmp_path, save):
    images = np.random.default_rng(2).integers(0, 256, (120, 4, 4, 3), dtype=np.uint8)
    labels = np.arange(120) % 7
    save(tmp_path / "s.npz", images, labels)
    with pytest.raises(InputError, match="holds images and no statistics: a detector must be given"):
        read_card(tmp_path / "s.npz")
    card = read_card(tmp_path / "s.npz", Pixels())
    f = images.astype(np.float64).transpose(0, 3, 1, 2).sum(3).reshape(120, 12)
    assert np.array_equal(card.features.numpy(), f)
    np.testing.assert_allclose(card.moments.mean.numpy(), f.mean(0), rtol=1e-13)
    np.testing.assert_allclose(card.moments.covariance.numpy(), np.cov(f, rowvar=False), rtol=1e-8)
    assert (card.count, card.resolution, card.channels, card.canonical) == (120, 4, 3, False)
    assert card.counts == np.bincount(labels).tolist() and card.detector == "pixels"


def edited(arrays, **change):
    return {name: value for name, value in {**arrays, **change}.items() if value is not None}


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"sigma": np.eye(9)}, r"mu \(8,\) and sigma \(9, 9\), where"),
        ({"mu": np.zeros((1, 8))}, r"mu \(1, 8\)"),
        ({"mu": np.full(8, np.nan)}, "numbers in mu that are not finite"),
        ({"sigma": np.full((8, 8), np.inf)}, "numbers in sigma that are not finite"),
        ({"mu": np.array([{}] * 8)}, "holds no array mu of numbers: .*allow_pickle"),
        ({"mu": np.array(["a"] * 8)}, "holds mu as <U1, where numbers are expected"),
        ({"sigma": None}, "neither mu and sigma nor images arr_0"),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, "holds arr_0 as float64, where uint8 images"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, r"arr_0 of shape \(2, 3, 4, 4\)"),
        ({"arr_0": np.zeros((2, 4, 5, 3), np.uint8)}, r"arr_0 of shape \(2, 4, 5, 3\)"),
    ],
)
def test_other_statistics_are_refused(eight, tmp_path, change, sentence):
    np.savez(tmp_path / "x.npz", **edited(eight, **change))
    with pytest.raises(InputError, match=sentence):
        read_card(tmp_path / "x.npz", Pixels())


def test_other_samples_are_refused(tmp_path):
    images = np.random.default_rng(3).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "one.npz", images[:1])
    with pytest.raises(InputError, match="holds 1 image, and moments take 2 or more"):
        read_card(tmp_path / "one.npz", Pixels())
    for labels in (np.arange(8), np.zeros(9), np.arange(9) - 1):
        np.savez(tmp_path / "l.npz", images, labels)
        with pytest.raises(InputError, match="not the class numbers of 9 images"):
            read_card(tmp_path / "l.npz", Pixels())
    np.savez(tmp_path / "s.npz", images)
    data = (tmp_path / "s.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"is no \.npz file: BadZipFile"):
        read_card(tmp_path / "cut.npz", Pixels())
    (tmp_path / "bits.npz").write_bytes(data.replace(images[5].tobytes(), bytes(64 * 64 * 3)))
    with pytest.raises(InputError, match="cannot be read: BadZipFile: Bad CRC"):
        read_card(tmp_path / "bits.npz", Pixels())


# -- cards and what is compared with them


def test_a_card_is_compared_with_its_like_alone(card):
    detector, classes = load_detector(CNN), list(card.classes)
    check_card(card, detector, 16, 1, classes, "adm", "none")
    check_card(card, detector)  # what is not known is not compared
    check_card(replace(card, resolution=None, classes=None, crop=None), None, 64, 1, ["a"], "area")
    for given, sentence in (
        ({"detector": Pixels()}, rf"features of {CNN} \(SHA-256 {detector.sha256}\), .* pixels \(SHA-256 1111"),
        ({"resolution": 32}, "with resolution 16, which do not compare with resolution 32"),
        ({"channels": 3}, "with channels 1, which do not compare with channels 3"),
        ({"crop": "area"}, "with crop adm, which do not compare with crop area"),
        ({"filter": "box"}, "with filter none, which do not compare with filter box"),
        ({"classes": classes[:9]}, "has 10 classes, and the images 9"),
        ({"classes": [*classes[:9], "hat"]}, "calls class 9 'ankle boot', and the images 'hat'"),
    ):
        with pytest.raises(InputError, match=sentence):
            check_card(card, **given)


@pytest.mark.parametrize(
    "cards, names",
    [
        ([("val", "a"), ("train", "b")], ["val", "train"]),
        ([(None, "a/x"), (None, "a/y"), ("val", "z")], ["x", "y", "val"]),
        ([("val", "x"), ("val", "y"), ("train", "z")], ["val_x", "val_y", "train"]),
        ([("val", "x"), (None, "val"), (None, "y")], ["val_x", "val", "y"]),
        ([(None, "a/x"), (None, "b/x"), ("val", "x"), ("val", "b/x")], ["x_1", "x_2", "val_x_3", "val_x_4"]),
    ],
)
def test_every_card_has_a_name_of_its_own(card, cards, names):
    made = [replace(card, split=split, path=Path(f"{file}.safetensors")) for split, file in cards]
    assert card_names(made) == names and [about["name"] for about in card_summaries(made)] == names


def test_the_bias_is_said_of_small_sets_alone():
    assert bias_note(50_000) == bias_note(1_281_167) == ""
    assert "n = 49,999 is less than 50,000" in bias_note(49_999) and "equal n only" in bias_note(49_999)
    assert "not known" in bias_note(None)


# -- writing ADM's samples


@pytest.mark.parametrize("resolution", [None, 16])
def test_samples_as_adms_npz(few, tmp_path, resolution):
    command = ["npz", "--samples", str(few), "--split", "val", "--out", str(tmp_path / "deep" / "s.npz")]
    main(command + (["--resolution", "16"] if resolution else []))
    expected = [batch for batch in read_images(few, "val", resolution or 32, 7)]
    with np.load(tmp_path / "deep" / "s.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {"arr_0", "arr_1"}
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.dtype == np.uint8 and labels.dtype == np.int64 and images.shape[1:] == (resolution or 32,) * 2 + (1,)
    assert np.array_equal(images, torch.cat([i for i, _ in expected]).permute(0, 2, 3, 1).numpy())
    assert np.array_equal(labels, torch.cat([c for _, c in expected]).numpy()) and len(labels) == 200
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["s.npz"]
    images = adm.find_images(tmp_path / "deep" / "s.npz")  # what we write we read
    assert images.shape == (200, *(resolution or 32,) * 2, 1) and sum(map(len, images)) == 200


def test_a_failing_npz_leaves_nothing(few, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"is the name of no \.npz file"):
        npz(few, tmp_path / "s.zip", split="val")
    with pytest.raises(InputError, match="does not exist"):
        npz(few, tmp_path / "s.npz")
    folder = tmp_path / "in" / "val" / "32"
    folder.mkdir(parents=True)
    for file in (few / "val" / "32").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    data = (folder / "180.tar").read_bytes()
    (folder / "180.tar").write_bytes(bytes(len(data)))
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"180\.tar"):
        npz(tmp_path / "in", tmp_path / "out" / "s.npz", split="val")
    assert not any((tmp_path / "out").iterdir())
