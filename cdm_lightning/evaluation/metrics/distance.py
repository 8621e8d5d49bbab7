"""FID and KID: the Fréchet distance of two sets of features, from their moments, and the kernel distance.

Only on features of the canonical Inception network are they called FID and KID. With any other detector they are called
"Fréchet distance (<detector>)" and "kernel distance (<detector>)", and only compare with values of the same detector.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from cdm_lightning.foundation.errors import InputError

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # the defaults of torchmetrics and torch-fidelity


@dataclass(frozen=True)
class Moments:
    """n, sum of f (d,), and sum of f f^T (d, d) over a set of n features; float64. Gives mean and covariance."""

    n: int
    total: torch.Tensor
    outer: torch.Tensor

    @classmethod
    def from_features(cls, batches: Iterable[torch.Tensor]) -> Moments:
        """The moments of batches of features (B, d). Only the sums are kept in memory."""
        n, total, outer = 0, torch.zeros(()), torch.zeros(())
        for batch in batches:
            f = batch.double()
            n, total, outer = n + len(f), total + f.sum(0), outer + f.T @ f
        return cls(n, total, outer)

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.n

    @property
    def covariance(self) -> torch.Tensor:
        """The unbiased covariance, divided by n - 1, as in all implementations of FID."""
        return (self.outer - self.n * torch.outer(self.mean, self.mean)) / (self.n - 1)

    @classmethod
    def from_covariance(cls, n: int, mean: torch.Tensor, covariance: torch.Tensor) -> Moments:
        """The moments of n features with this mean and unbiased covariance."""
        mean, covariance = mean.double(), covariance.double()
        return cls(n, n * mean, (n - 1) * covariance + n * torch.outer(mean, mean))


def feature_passthrough(num_features: int) -> nn.Module:
    """The identity, as the network for torchmetrics: its inputs are features already.

    All metrics here get the features of all processes, so they use sync_on_compute=False.
    """
    network = nn.Identity()
    network.num_features = num_features  # type: ignore[assignment]  # torchmetrics reads it
    return network


def frechet_distance(real: Moments, generated: Moments) -> float:
    """d^2 = ||mu_r - mu_g||^2 + Tr(S_r + S_g - 2 (S_r S_g)^(1/2)), by torchmetrics. It is >= 0 up to rounding."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    check_moments(real, generated)
    metric = FrechetInceptionDistance(feature=feature_passthrough(len(real.total)), sync_on_compute=False)
    for side, moments in (("real", real), ("fake", generated)):
        getattr(metric, f"{side}_features_sum").copy_(moments.total)
        getattr(metric, f"{side}_features_cov_sum").copy_(moments.outer)
        getattr(metric, f"{side}_features_num_samples").fill_(moments.n)
    metric.orig_dtype, metric._update_count = torch.float64, 1  # type: ignore[assignment]  # what update() would set
    return float(metric.compute())


class FrechetDistanceTo:
    """The Fréchet distance from one reference to many sets: Tr (S_r S_g)^(1/2) = Tr (S_r^(1/2) S_g S_r^(1/2))^(1/2).

    Many times faster than `frechet_distance`, since the matrix on the right is symmetric.
    """

    def __init__(self, real: Moments) -> None:
        values, vectors = torch.linalg.eigh(real.covariance)
        self.real, self.root = real, (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def __call__(self, generated: Moments) -> float:
        check_moments(self.real, generated)
        inner = self.root @ generated.covariance @ self.root
        cross = torch.linalg.eigvalsh(inner).clamp(min=0).sqrt().sum()
        shift = (self.real.mean - generated.mean).square().sum()
        return float(shift + self.real.covariance.trace() + generated.covariance.trace() - 2 * cross)


def check_moments(real: Moments, generated: Moments) -> None:
    """Refuse sets too small for a covariance, and features of different sizes."""
    if min(real.n, generated.n) < 2:
        raise InputError(
            f"a Fréchet distance takes 2 images or more on each side, not {real.n} real and {generated.n} generated"
        )
    if real.total.shape != generated.total.shape:
        raise InputError(f"features of {len(real.total)} and {len(generated.total)} numbers do not compare")


def kernel_distance(real: torch.Tensor, generated: torch.Tensor, seed: int) -> tuple[float, float, int]:
    """MMD^2 with the kernel (x y / d + 1)^3, by torchmetrics: mean and deviation over 100 subsets, and the subset size.

    real, generated: features (n, d). A subset has 1000 images, or half of the smaller set if that is less. Subsets are
    drawn with `seed`.
    """
    size = min(KID_SUBSET_SIZE, min(len(real), len(generated)) // 2)
    if size < 2:
        raise InputError(
            f"a kernel distance takes 4 images or more, not {len(real)} real and {len(generated)} generated"
        )
    from torchmetrics.image.kid import KernelInceptionDistance

    metric = KernelInceptionDistance(
        feature=feature_passthrough(real.shape[1]), subsets=KID_SUBSETS, subset_size=size, sync_on_compute=False
    )
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return float(mean), float(deviation), size
