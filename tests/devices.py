"""The device of the tests in tests/gpu, what they set on it, and how far two results lie apart."""

from contextlib import contextmanager

import pytest
import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a GPU")


@contextmanager
def tf32(allowed):
    """Convolutions and matrix products in TF32, or in full float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=allowed):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def threads(number):
    """More threads for a reference that is computed on the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def error(found, expected):
    """||found - expected|| / ||expected||, in float64."""
    expected = expected.detach().double().cpu()
    return float((found.detach().double().cpu() - expected).norm() / expected.norm())


def levels_apart(one, other):
    """The largest difference of two uint8 images in grey levels, and the share of pixels within one level."""
    apart = (one.cpu().int() - other.cpu().int()).abs()
    return int(apart.max()), float((apart <= 1).double().mean())
