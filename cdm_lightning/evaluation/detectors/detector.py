"""The interface of detectors, frozen networks that turn uint8 images into features; and SmallCNN, a small one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import to_float


class Detector(nn.Module):
    """Base class of detectors. forward maps uint8 (B, C, H, W) to features, float32 (B, num_features)."""

    name: str
    sha256: str  # of the weights file
    num_features: int
    canonical: bool = False  # whether distances on its features may be called FID, KID and Inception Score


class SmallCNN(Detector):
    """A classifier of small images. Its features are the 64 activations before the last layer, max(0, a (W h) + b).

    image: uint8 (B, channels, H, W), H, W >= 8; resized to the training size, 32x32, bilinearly without antialiasing.
    Refuses another number of channels and float images.

    channels: 1 for grey images, 3 for colour. width: channels of the first convolution. num_classes: of the classifier.
    """

    name = "small-cnn"
    sha256 = ""  # empty until weights are loaded
    num_features, resolution = 64, 32

    def __init__(self, channels: int = 1, width: int = 24, num_classes: int = 10) -> None:
        super().__init__()
        self.channels, self.num_classes = channels, num_classes
        self.convolutions = nn.Sequential(
            *convolution(channels, width),
            nn.MaxPool2d(2),  # (B, width, 16, 16)
            *convolution(width, 2 * width),
            nn.MaxPool2d(2),  # (B, 2 width, 8, 8)
            *convolution(2 * width, 4 * width),
            nn.MaxPool2d(2),  # (B, 4 width, 4, 4)
            nn.Flatten(),
        )
        self.penultimate = nn.Sequential(
            nn.Linear(4 * width * 4 * 4, self.num_features, bias=False),
            nn.BatchNorm1d(self.num_features),  # keeps features from being zero for all images
            nn.ReLU(),
        )
        self.last = nn.Linear(self.num_features, num_classes)

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor]) -> SmallCNN:
        """A network with these weights; their shapes give its sizes. Raises KeyError or RuntimeError for others."""
        width, channels = state["convolutions.0.weight"].shape[:2]
        network = cls(channels, width, len(state["last.weight"]))
        network.load_state_dict(state)
        return network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Features, float32 (B, 64), of uint8 (B, C, H, W)."""
        with exact_float32():
            return self.features(self.prepare(image))

    def classify(self, image: torch.Tensor) -> torch.Tensor:
        """Logits of the classes, float32 (B, num_classes), of uint8 (B, C, H, W)."""
        return self.last(self(image))

    def prepare(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 (B, C, H, W) to float32 (B, C, 32, 32) in [-1, 1]."""
        channels = self.channels
        fits = (
            image.dtype == torch.uint8 and image.ndim == 4 and image.shape[1] == channels and min(image.shape[2:]) >= 8
        )
        if not fits:
            raise InputError(
                f"detector {self.name} takes uint8 images (B, {channels}, H, W) of 8 pixels or more, "
                f"not {image.dtype} {tuple(image.shape)}"
            )
        size = (self.resolution, self.resolution)
        return F.interpolate(to_float(image), size, mode="bilinear", align_corners=False, antialias=False)

    def features(self, prepared: torch.Tensor) -> torch.Tensor:
        """Features, float32 (B, 64), of prepared images (B, C, 32, 32)."""
        return self.penultimate(self.convolutions(prepared))


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within this context, a GPU computes in full float32, without TF32: figures agree with those of a CPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def convolution(channels: int, out: int) -> list[nn.Module]:
    """A 3x3 convolution without bias, batch norm and ReLU."""
    return [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]


def check_channels(detector: Detector, channels: int) -> None:
    """Refuse a detector that takes images of another number of channels. A TorchScript does not say its number."""
    if (takes := getattr(detector, "channels", channels)) != channels:
        raise InputError(
            f"detector {detector.name} takes images of {takes} channels, not of {channels}: "
            "give another by --detector, such as inception for 3 or fashion-cnn-64 for 1"
        )


@torch.no_grad()
def features_of(detector: Detector, image: torch.Tensor) -> torch.Tensor:
    """float32 (B, d) features of uint8 (B, C, H, W), without autocast. Refuses features that are NaN or infinite."""
    with torch.autocast(image.device.type, enabled=False):
        features = detector(image).float()
    if not features.isfinite().all():
        number = int((~features.isfinite().all(1)).nonzero()[0])
        raise InputError(f"detector {detector.name} makes features of image {number} of a batch that are not finite")
    return features
