"""Detectors, the Fréchet distance, and the search over levels, on exact answers and on tiny random cascades."""

import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from cdm_lightning.evaluation.levels import evaluate
from scipy.linalg import sqrtm

from cdm_lightning import InputError
from cdm_lightning.bundle import read_about, read_bundle, write_bundle
from cdm_lightning.cascade import CascadeModule
from cdm_lightning.datamodule import ShardDataModule
from cdm_lightning.evaluation import detectors
from cdm_lightning.evaluation.detectors import Detector, load_detector
from cdm_lightning.evaluation.distance import FrechetDistance, add_images, frechet_distance, frechet_metric
from cdm_lightning.evaluation.real_images import read_images, real_images_of
from cdm_lightning.evaluation.report import Row, choose, conclude
from cdm_lightning.images import downscale, to_float, to_uint8
from cdm_lightning.shards import read_manifest, read_shard, write_manifest, write_shard
from cdm_lightning.stages import BaseStage, SuperResolutionStage

FASHION = Path(__file__).parents[1] / "data" / "fashion"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Two shards of the first 120 and 80 validation images."""
    folder = tmp_path_factory.mktemp("few") / "val" / "32"
    read = read_shard(FASHION / "val" / "32" / "000.tar.gz")
    samples = [(s["__key__"], s["png"], int(s["cls"])) for s in islice(read, 200)]
    shards = [write_shard(folder / "0.tar", samples[:120]), write_shard(folder / "1.tar", samples[120:])]
    write_manifest(folder, replace(read_manifest(FASHION / "val" / "32"), shards=shards))
    return folder.parents[1]


# -- the detector


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


def test_features_do_not_depend_on_the_company_in_the_batch(held_out):
    detector, image = load_detector("fashion-cnn-64"), held_out[0][:9]
    torch.testing.assert_close(detector(image)[4:5], detector(image[4:5]), rtol=1e-4, atol=1e-4)


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
    with pytest.raises(InputError, match="'inception' is unknown: known are"):
        load_detector("inception")


# -- the distance


class Pixels(Detector):
    """Features that are the pixels themselves, so that means and covariances are known."""

    name, sha256, num_features = "pixels", "", 16

    def forward(self, image):
        return image.flatten(1).float()


def distance_between(real, generated, detector=None):
    metric = frechet_metric(detector or Pixels())
    add_images(metric, real, real=True)
    add_images(metric, generated, real=False)
    return frechet_distance(metric, len(real), len(generated))


def pixels(n, high, seed):
    return torch.randint(0, high, (n, 1, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_equal_sets_have_distance_zero(held_out):
    assert distance_between(held_out[0][:300], held_out[0][:300], load_detector("fashion-cnn-64")) == pytest.approx(
        0, abs=1e-4
    )


def test_a_shift_and_a_scale_give_the_closed_form():
    x = pixels(400, 100, 0)
    assert distance_between(x, x + 10) == pytest.approx(16 * 10**2, rel=1e-5)
    y = x.flatten(1).double()
    doubled = y.mean(0).square().sum() + torch.cov(y.T).trace()  # mu against 2 mu; S + 4 S - 2 * 2 S
    assert distance_between(x, 2 * x) == pytest.approx(float(doubled), rel=1e-5)


@pytest.mark.parametrize("n", [10, 200])  # 10 images leave covariances of rank 9 in 16 dimensions
def test_the_distance_is_that_of_a_float64_matrix_root(n):
    x, y = pixels(n, 255, 1), pixels(n + 7, 180, 2)
    a, b = (z.flatten(1).double().numpy() for z in (x, y))
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(s @ t).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s + t - 2 * root)
    assert distance_between(x, y) == pytest.approx(expected, rel=1e-4)


def test_autocast_does_not_reach_the_features(held_out):
    x, y = held_out[0][:100], held_out[0][100:200]
    plain = distance_between(x, y, load_detector("fashion-cnn-64"))
    with torch.autocast("cpu", torch.bfloat16):
        assert distance_between(x, y, load_detector("fashion-cnn-64")) == plain


def test_a_metric_keeps_its_reference_over_a_reset():
    x, y = pixels(50, 200, 3), pixels(50, 200, 4)
    metric = frechet_metric(Pixels())
    add_images(metric, x, real=True)
    for generated in (x, y, x):
        metric.reset()
        add_images(metric, generated, real=False)
        distance = frechet_distance(metric, 50, 50)
    assert distance == pytest.approx(0, abs=1e-2)


def test_one_image_has_no_covariance():
    with pytest.raises(InputError, match="2 images or more on each side, not 5 real and 1 generated"):
        distance_between(pixels(5, 9, 0), pixels(1, 9, 0))


# -- the callback


class Canned(L.LightningModule):
    """Hands out stored images in a test step; rank 0 has the first 25 pairs, rank 1 the other 15."""

    def test_dataloader(self):
        real, generated = pixels(40, 255, 5), pixels(40, 180, 6)
        share = slice(None) if self.trainer.world_size == 1 else [slice(25), slice(25, None)][self.trainer.global_rank]
        pairs = torch.utils.data.TensorDataset(real[share], generated[share])
        return torch.utils.data.DataLoader(pairs, batch_size=10)

    def test_step(self, batch, batch_idx):
        return {"real": batch[0], "generated": batch[1]}


class Silent(Canned):
    def test_step(self, batch, batch_idx):
        return None


def callback():
    made = FrechetDistance()
    made.detector = Pixels()
    return made


def trainer(folder, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(default_root_dir=folder, use_distributed_sampler=False, **{**quiet, **options})


two_processes = "ddp_spawn" if torch.cuda.is_available() else "ddp_fork"  # quicker, but not after CUDA has started


@pytest.mark.parametrize("strategy, devices", [("auto", 1), (two_processes, 2)])
def test_the_callback_measures_the_images_of_all_processes(tmp_path, strategy, devices):
    expected = distance_between(pixels(40, 255, 5), pixels(40, 180, 6))
    (logged,) = trainer(tmp_path, callbacks=[callback()], strategy=strategy, devices=devices).test(Canned())
    assert logged["test/fd_pixels"] == pytest.approx(expected, rel=1e-5)
    assert logged["test/fd_pixels_n"] == 40


def test_the_callback_belongs_to_a_cascade(tmp_path):
    with pytest.raises(InputError, match="belongs to the test of a cascade: Silent makes no images"):
        trainer(tmp_path, callbacks=[callback()]).test(Silent())


def test_the_callback_on_a_cascade_and_the_shards(bundle, tmp_path):
    cascade = CascadeModule(bundle, levels=[5, 0])
    data = ShardDataModule(FASHION, batch_size=20, num_workers=0)
    judged = {"callbacks": [FrechetDistance("fashion-cnn-64")], "limit_test_batches": 2, "precision": "bf16-mixed"}
    runner = trainer(tmp_path, **judged)
    (logged,) = runner.test(cascade, data)
    assert logged["test/fd_fashion-cnn-64"] > 1 and logged["test/fd_fashion-cnn-64_n"] == 40
    assert not any("detector" in name or "metric" in name for name in cascade.state_dict())


# -- real images


def test_real_images_follow_the_labels(held_out):
    image, label = held_out
    wanted = torch.arange(30) % 10
    found = real_images_of(wanted, FASHION, "val", 8)
    for c in range(10):
        assert torch.equal(found[wanted == c], downscale(image[label == c][:3], 8))


# -- the search over levels


def stages(augmentations=("gaussian", "none"), **options):
    """A base stage of 8x8 and one super-resolution stage per augmentation, random in all their weights."""
    torch.manual_seed(0)
    tiny = {
        "image_channels": 1, "num_classes": 10, "channels": 4, "channel_mult": [1], "num_res_blocks": 1,
        "attention_resolutions": [], "num_heads": 1, "norm_groups": 2, "timesteps": 20, "sampling_steps": 2, **options,
    }  # fmt: skip
    made = [BaseStage(resolution=8, **tiny)]
    for number, kind in enumerate(augmentations):
        low = 8 * 2**number
        clock = {"low_res_timesteps": 20, "low_res_schedule": "cosine"} if kind == "gaussian" else {}
        made.append(SuperResolutionStage(low_resolution=low, augmentation=kind, resolution=2 * low, **clock, **tiny))
    for parameter in (p for stage in made for p in stage.parameters()):
        torch.nn.init.normal_(parameter, std=0.2)  # the last layers start at zero
    return made


@pytest.fixture
def bundle(tmp_path):
    write_bundle(tmp_path / "bundle", stages(), {"name": "tiny"})
    return tmp_path / "bundle"


def test_evaluate_from_end_to_end(bundle, held_out, few, tmp_path, capsys):
    weights = {path.name: path.read_bytes() for path in bundle.glob("*.safetensors")}
    results = evaluate(bundle, tmp_path / "out", few, n=20, levels=[4, 9], batch_size=7, seed=3, store=True)
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    *rows, final = results["rows"]
    kinds = ("truncated", "non-truncated", "real low-res")
    assert {(r["s"], r["kind"]) for r in rows} == {(s, k) for s in (0, 4, 9) for k in kinds} and len(rows) == 9
    for row in rows:
        ran = 1 if row["kind"] == "real low-res" else 2
        about = (row["stage"], row["resolution"], row["n"], row["n_reference"], row["seed"], row["detector"])
        assert about == ("sr16", 16, 20, 200, 3, "fashion-cnn-64")
        assert row["sampling_steps"] == [2] * ran and row["sampler"] == ["ddpm"] * ran and row["distance"] > 0
        assert row["detector_sha256"] == detectors.PINNED["fashion-cnn-64"]
    best = min((r for r in rows if r["s"] and r["kind"] != "real low-res"), key=lambda r: r["distance"])
    assert results["levels"] == [best["s"], 0] and results["truncated"] == (best["kind"] == "truncated")
    assert (final["stage"], final["resolution"], final["s"], final["kind"]) == ("sr32", 32, best["s"], best["kind"])
    assert len({r["distance"] for r in results["rows"]}) == 9  # all differ, but the two kinds at s = 0
    assert "20 images do not span 64 features" in results["warning"]
    printed = capsys.readouterr().out
    assert "Fréchet distance (fashion-cnn-64) of sr16" in printed and results["conclusion"] in printed
    assert (tmp_path / "out" / "fd_levels.png").read_bytes().startswith(b"\x89PNG")
    about = read_about(bundle)
    assert about["levels"] == results["levels"] and about["results"] == results and about["name"] == "tiny"
    assert weights == {path.name: path.read_bytes() for path in bundle.glob("*.safetensors")}
    read_bundle(bundle)
    cascade = CascadeModule(bundle, seed=3)  # takes the stored choice, and makes what was measured
    assert cascade.levels == results["levels"] and cascade.truncated == results["truncated"]
    generated = to_uint8(cascade.sample(torch.arange(20) % 10, torch.arange(20))[-1])
    expected = distance_between(held_out[0][:200], generated, load_detector("fashion-cnn-64"))
    assert final["distance"] == pytest.approx(expected, rel=1e-3)


def test_a_row_is_the_distance_of_the_cascade_it_names(few, tmp_path):
    write_bundle(tmp_path / "bundle", stages(["gaussian"]), {})
    before = (tmp_path / "bundle" / "bundle.json").read_bytes()
    results = evaluate(tmp_path / "bundle", tmp_path, few, n=20, levels=[5], truncated=True, sampling_steps=[3, 2])
    assert (tmp_path / "bundle" / "bundle.json").read_bytes() == before  # store was not asked for
    assert results["levels"] == [5] and results["truncated"] and len(results["rows"]) == 6  # sr16 is the last stage
    label, index = torch.arange(20) % 10, torch.arange(20)
    reference = torch.cat([image for image, _ in read_images(few, "val", 16, 64)])
    real = to_float(real_images_of(label, few, "val", 8))
    for kind, image in (("truncated", None), ("non-truncated", None), ("real low-res", real)):
        cascade = CascadeModule(tmp_path / "bundle", None, [5], kind == "truncated", sampling_steps=[3, 2])
        generated = to_uint8(cascade.sample(label, index, image)[-1])
        expected = distance_between(reference, generated, load_detector("fashion-cnn-64"))
        row = next(r for r in results["rows"] if (r["s"], r["kind"]) == (5, kind))
        assert row["distance"] == pytest.approx(expected, rel=1e-3)


def rows_of(truncated, non_truncated, real):
    """Rows at s = 0, 1, 2 with these distances."""
    about = ("fashion-cnn-64", "", 500, 3000, 0, ["ddpm"], [25])
    kinds = {"truncated": truncated, "non-truncated": non_truncated, "real low-res": real}
    return [Row("sr16", 16, s, kind, d, *about) for kind, line in kinds.items() for s, d in enumerate(line)]


def test_the_choice_is_the_least_distance_on_generated_images_with_noise():
    rows = rows_of([9.0, 4.0, 5.0], [9.0, 6.0, 3.0], [1.0, 2.0, 2.5])
    assert [(choose(rows, t).s, choose(rows, t).kind) for t in (None, True, False)] == [
        (2, "non-truncated"), (1, "truncated"), (2, "non-truncated"),
    ]  # fmt: skip
    sentence = conclude(rows, choose(rows, None))
    assert "non-truncated, lowers the Fréchet distance of sr16 (9.00 at s = 0, 3.00 at s = 2) after gen" in sentence
    assert "and does not lower the Fréchet distance of sr16 (1.00 at s = 0, 2.50 at s = 2) after real" in sentence
    rows = rows_of([2.0, 4.0, 5.0], [2.0, 6.0, 3.0], [1.0, 2.0, 2.5])  # s = 0 is best, but is no choice
    assert choose(rows, None).s == 2 and "truncated, does not lower" in conclude(rows, choose(rows, None))


@pytest.mark.parametrize(
    "augmentations, options, arguments, sentence",
    [
        (["gaussian"], {}, {"n": 1}, "n = 1, batch_size = 100: a distance takes n >= 2"),
        (["gaussian"], {}, {"n": 3010}, "n = 3010 asks for 301 real images of class 0, and .*/val has 300"),
        (["gaussian"], {}, {"detector": "vgg"}, "detector 'vgg' is unknown"),
        (["gaussian"], {}, {"levels": [0]}, "holds no s > 0 to choose"),
        (["gaussian"], {}, {"levels": [20]}, "level 20 of stage sr16 lies outside 0 <= s <= 20, s < T"),
        (["gaussian"], {}, {"levels": [5], "sampler": "ddim"}, "stop_at 5 is not on DDIM's grid"),
        (["gaussian"], {}, {"sampling_steps": [5]}, "has 1 entries for 2 stages"),
        (["gaussian"], {}, {"shards": Path("nowhere")}, "nowhere/val does not exist"),
        (["gaussian"], {"image_channels": 3}, {}, "holds images of 1 channels, and the cascade makes 3"),
        (["blur"], {}, {}, "no stage with Gaussian augmentation"),
        (["gaussian", "none", "none"], {}, {}, "has no shards for resolution 64: stored are"),
    ],
)
def test_what_evaluate_refuses(augmentations, options, arguments, sentence, tmp_path):
    write_bundle(tmp_path / "bundle", stages(augmentations, **options), {})
    with pytest.raises(InputError, match=sentence):
        evaluate(tmp_path / "bundle", tmp_path / "out", **{"shards": FASHION, **arguments})
    assert not (tmp_path / "out").exists()


def test_a_folder_cut_short_is_refused(tmp_path):
    write_bundle(tmp_path / "bundle", stages(["gaussian"]), {})
    shutil.copytree(FASHION / "val" / "32", tmp_path / "shards" / "val" / "32")
    shard = tmp_path / "shards" / "val" / "32" / "002.tar.gz"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match="it was cut"):
        evaluate(tmp_path / "bundle", tmp_path / "out", tmp_path / "shards", n=10)
