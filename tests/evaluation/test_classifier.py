"""The residual network against functional code in float64, its random crops, its schedule, and its figures by numpy."""

import csv

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from folders import FASHION
from refusals import sentence_of_error

from cdm_lightning.__main__ import main
from cdm_lightning.data import ShardDataModule
from cdm_lightning.evaluation.cas.classifier import (
    Classifier,
    ResidualBlock,
    ResNet,
    pad_and_crop,
    random_box,
    resized_crop,
)
from cdm_lightning.evaluation.real_images import read_images
from cdm_lightning.foundation.images import to_float

pytestmark = pytest.mark.filterwarnings("ignore")


def awake(module, seed=0):
    """In float64 and eval mode, with every parameter and running statistic random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.double().state_dict().values():
            if value.is_floating_point():
                value.copy_(0.5 + 0.2 * torch.rand(value.shape, generator=generator))
                if value.ndim == 4:
                    value.copy_(torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5)
    return module.eval()


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def conv(x, weights, name, stride=1):
    """Convolution `name` and the batch normalisation after it, from the state dict alone."""
    before, number = name.rsplit(".", 1)
    weight, norm = weights[f"{name}.weight"], f"{before}.{int(number) + 1}"
    x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
    mean, variance, scale, shift = (
        weights[f"{norm}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (variance + 1e-5).sqrt() * scale + shift


def block(x, weights, stride, bottleneck, prefix=""):
    y = x
    for number, step in zip((0, 3, 6), (1, stride, 1) if bottleneck else (stride, 1), strict=False):
        y = conv(y if number == 0 else y.clamp(min=0), weights, f"{prefix}branch.{number}", step)
    if f"{prefix}shortcut.0.weight" in weights:
        x = conv(x, weights, f"{prefix}shortcut.0", stride)
    return (x + y).clamp(min=0)


# ------------------------------------------------------------------------------------------------------------ networks


def test_parameter_counts():
    """ResNet-50's published number; the small ones by the sum over their layers."""
    assert parameters(ResNet(3, 1000, "resnet50")) == 25_557_032

    def layer(channels, out, size):
        return size * size * channels * out + 2 * out

    for n, architecture in ((1, "resnet8"), (2, "resnet14"), (3, "resnet20")):
        expected, before = layer(3, 16, 3), 16
        for width in (16, 32, 64):
            expected += layer(before, width, 3) + (2 * n - 1) * layer(width, width, 3)
            expected += layer(before, width, 1) if width > before else 0
            before = width
        assert parameters(ResNet(3, 10, architecture)) == expected + 65 * 10
    assert parameters(ResNet(3, 10, "resnet20")) == 272_474


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize(("channels", "stride"), [(4, 2), (4, 1), (None, 1)])
def test_a_block_is_the_functional_one(bottleneck, channels, stride):
    channels = channels or (16 if bottleneck else 4)  # then the shortcut is the identity
    module = awake(ResidualBlock(channels, 4, stride, bottleneck))
    x = torch.randn(2, channels, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = block(x, module.state_dict(), stride, bottleneck)
    assert module(x).shape == (2, 16 if bottleneck else 4, 7 if stride == 1 else 4, 7 if stride == 1 else 4)
    assert expected.std() > 0.1 and (expected == 0).any()
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("architecture", ["resnet14", "resnet50"])
def test_a_network_is_the_functional_one(architecture):
    large = architecture == "resnet50"
    network = awake(ResNet(1, 3, architecture))
    x = torch.randn(2, 1, 40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = network.state_dict()
    y = conv(x, weights, "features.0", 2 if large else 1).clamp(min=0)
    y = F.max_pool2d(y, 3, 2, 1) if large else y
    number, level = (4 if large else 3), 0
    for level, blocks in enumerate([3, 4, 6, 3] if large else [2, 2, 2]):
        for position in range(blocks):
            y = block(y, weights, 2 if level and not position else 1, large, f"features.{number}.")
            number += 1
    assert y.shape[1:] == ((2048, 2, 2) if large else (64, 10, 10))
    expected = y.mean((2, 3)) @ weights["last.weight"].T + weights["last.bias"]
    torch.testing.assert_close(network(x), expected, rtol=1e-10, atol=1e-10)
    assert not expected[0].allclose(expected[1], rtol=1e-4)


def test_a_block_starts_as_its_shortcut_and_logits_stay_float32():
    module = ResidualBlock(4, 4, 1, False)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(module(x), x.clamp(min=0))
    with torch.autocast("cpu", torch.bfloat16):
        assert ResNet(1, 10, "resnet8")(torch.randn(2, 1, 8, 8)).dtype == torch.float32


# --------------------------------------------------------------------------------------------------------------- crops


def test_pad_and_crop_shifts_each_image():
    image = torch.arange(3 * 2 * 6 * 6.0).view(3, 2, 6, 6)
    u = torch.tensor([[0.0, 0.0], [0.5, 0.999], [0.999, 0.3]])
    cropped = pad_and_crop(image, u).numpy()
    for x, y, (down, across) in zip(image.numpy(), cropped, [(0, 0), (4, 8), (8, 2)], strict=True):
        padded = np.pad(x, ((0, 0), (4, 4), (4, 4)), constant_values=-1)
        assert np.array_equal(y, padded[:, down : down + 6, across : across + 6])


def u_of(area, aspect, x, y):
    """The draws whose first box has this area and this ratio of width to height, x and y of the way across."""
    u = torch.full((1, 22), 0.9)
    u[0, :2] = torch.tensor([(area - 0.08) / 0.92, np.log(aspect * 4 / 3) / np.log(16 / 9)])
    u[0, 20:] = torch.tensor([x, y])
    return u


def test_resized_crop_is_the_enlarged_box():
    image = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(resized_crop(image, u_of(1, 1, 0.3, 0.8)), image)
    cropped = resized_crop(image, u_of(0.25, 1, 2 / 4, 1 / 4))  # 4x4 from row 1, column 2
    expected = F.interpolate(image[:, :, 1:5, 2:6], (8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(cropped[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])  # the rim sees its neighbours


def test_random_boxes_lie_inside_and_are_the_first_that_fit():
    u = torch.rand(4000, 22, generator=torch.Generator().manual_seed(0))
    centre, half = random_box(u)
    assert (half > 0).all() and (centre.abs() + half <= 1 + 1e-6).all()
    area, aspect = half.prod(1), half[:, 0] / half[:, 1]
    assert area.min() >= 0.08 and area.max() <= 1 and aspect.min() > 0.7499 and aspect.max() < 1.3334
    assert area.min() < 0.1 and area.max() > 0.9 and abs(aspect.log().mean()) < 0.02
    u = u_of(0.5, 1, 0.5, 0.5)
    u[0, 2:4], u[0, :2] = u[0, :2].clone(), torch.tensor([1.0, 0.0])  # the first try is taller than the square
    torch.testing.assert_close(random_box(u)[1], torch.full((1, 2), 0.5**0.5))
    u[0, :20] = torch.tensor([1.0, 0.0] * 10)
    assert torch.equal(random_box(u)[1], torch.ones(1, 2))


@pytest.mark.parametrize("crop", ["pad", "resized", "none"])
def test_an_images_augmentation_is_a_function_of_its_place(crop):
    image = torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    classifier, other = (Classifier(16, 1, 10, "resnet8", crop=crop, seed=seed) for seed in (0, 1))
    whole = classifier.augment(image, torch.arange(40))
    assert torch.equal(whole[5:9], classifier.augment(image[5:9], torch.arange(5, 9)))
    assert not torch.equal(whole, other.augment(image, torch.arange(40)))
    if crop == "none":
        mirrored = [torch.equal(y, x.flip(2)) for x, y in zip(image, whole, strict=True)]
        assert 8 < sum(mirrored) < 32 and all(
            m or torch.equal(x, y) for m, x, y in zip(mirrored, image, whole, strict=True)
        )
        plain = Classifier(16, 1, 10, "resnet8", crop=crop, flip=False)
        assert torch.equal(plain.augment(image, torch.arange(40)), image)


# ------------------------------------------------------------------------------------------- schedule, figures, errors


def test_the_learning_rate_rises_and_falls():
    cosine = Classifier(8, 1, 10, "resnet8", warmup_steps=9)
    factors = [cosine.lr_factor(step, 109) for step in range(110)]
    assert np.allclose(factors[:10], np.arange(1, 11) / 10)
    assert factors[59] == pytest.approx(0.5) and factors[34] == pytest.approx(0.5 + 8**-0.5) and factors[109] == 0
    steps = Classifier(8, 1, 10, "resnet8", schedule="steps")
    factors = [round(steps.lr_factor(step, 90), 9) for step in range(90)]
    assert factors == [1.0] * 30 + [0.1] * 30 + [0.01] * 20 + [0.001] * 10


def test_an_ordinary_fit_and_test_give_numpys_figures(tmp_path, monkeypatch):
    """Trained on one folder, tested on the validation images of another."""
    (tmp_path / "train").symlink_to(FASHION / "train")
    options = [
        "--model=cdm_lightning.evaluation.cas.classifier.Classifier", "--model.architecture=resnet8",
        "--model.resolution=8", "--model.image_channels=1",
        f"--data.root={tmp_path}", f"--data.val_root={FASHION}", "--data.num_workers=0",
        "--trainer.use_distributed_sampler=false", f"--trainer.default_root_dir={tmp_path}",
        "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.logger=CSVLogger",
        f"--trainer.logger.save_dir={tmp_path}", "--weights_only=true",
    ]  # fmt: skip
    saver = ["--trainer.callbacks=ModelCheckpoint", f"--trainer.callbacks.dirpath={tmp_path}"]
    main(["fit", *options, *saver, "--trainer.callbacks.save_last=true", "--trainer.max_steps=20"])
    main(["test", *options, f"--ckpt_path={tmp_path}/last.ckpt"])
    with (tmp_path / "lightning_logs" / "version_1" / "metrics.csv").open() as lines:
        logged = list(csv.DictReader(lines))[-1]
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    classifier = Classifier(8, 1, 10, "resnet8").eval()
    classifier.load_state_dict(state["state_dict"])
    trainer = L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    trainer.test(classifier, datamodule=ShardDataModule(tmp_path, 64, 0, val_root=FASHION), verbose=False)
    logits, labels = [], []
    with torch.no_grad():
        for image, label in read_images(FASHION, "val", 8, 500):
            logits.append(classifier(to_float(image)).numpy())
            labels.append(label.numpy())
    logits, labels = np.concatenate(logits), np.concatenate(labels)
    order = np.argsort(-logits, axis=1)
    right = order[:, 0] == labels
    assert 0.1 < right.mean() < 0.95
    assert float(logged["test/cas_top1"]) == pytest.approx(right.mean(), abs=1e-6)
    assert float(logged["test/cas_top5"]) == pytest.approx((order[:, :5] == labels[:, None]).any(1).mean(), abs=1e-6)
    per_class = [right[labels == c].mean() for c in range(10)]
    np.testing.assert_allclose(classifier.per_class.numpy(), per_class, atol=1e-6)
    assert np.ptp(per_class) > 0.1


def test_what_cannot_be_classified_is_refused():
    sentence_of_error(lambda: Classifier(8, 1, 1), "num_classes 1: a classifier tells 2 classes or more apart")
    assert Classifier(8, 1, 2).num_classes == 2
    for options in ({"lr": 0.0}, {"momentum": 1.0}, {"label_smoothing": 1.0}):
        sentence_of_error(lambda o=options: Classifier(8, 1, 10, "resnet8", **o), "lr > 0, 0 < momentum < 1")
    classifier = Classifier(8, 1, 10, "resnet8", lr=7.0)
    other = {"hyper_parameters": {**classifier.hparams, "architecture": "resnet50"}}
    sentence_of_error(lambda: classifier.on_load_checkpoint(other), "its architecture is 'resnet50'", "says 'resnet8'")
    with torch.no_grad():
        classifier.network.last.bias[3] = float("nan")
    sentence_of_error(classifier.on_test_epoch_start, "not finite", "at lr 7.0 has diverged")
