"""Distances between two sets of features: Fréchet's from their moments, the kernel distance from the features.

"FID" and "KID" are their names on the canonical Inception network alone; on any other detector they are written
"Fréchet distance (<detector>)" and "kernel distance (<detector>)", and compare with those of the same detector only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from cdm_lightning.foundation.errors import InputError

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # torchmetrics' defaults, which are torch-fidelity's


@dataclass(frozen=True)
class Moments:
    """n, sum of f, sum of f f^T: what a Fréchet distance needs of a set of features; float64, (d,) and (d, d)."""

    n: int
    total: torch.Tensor
    outer: torch.Tensor

    @classmethod
    def from_features(cls, batches: Iterable[torch.Tensor]) -> Moments:
        """Summed over batches of features (B, d) as they come; nothing but the sums is kept."""
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
        """The unbiased one, over n - 1, as every implementation of FID has it."""
        return (self.outer - self.n * torch.outer(self.mean, self.mean)) / (self.n - 1)

    @classmethod
    def from_covariance(cls, n: int, mean: torch.Tensor, covariance: torch.Tensor) -> Moments:
        """The sums behind a mean and an unbiased covariance."""
        mean, covariance = mean.double(), covariance.double()
        return cls(n, n * mean, (n - 1) * covariance + n * torch.outer(mean, mean))


def feature_passthrough(num_features: int) -> nn.Module:
    """What torchmetrics is given for a network: features are its input already.

    Whoever measures has the features of all processes, so that no metric here asks others for theirs (sync_on_compute).
    """
    network = nn.Identity()
    network.num_features = num_features  # type: ignore[assignment]  # torchmetrics looks for it
    return network


def frechet_distance(real: Moments, generated: Moments) -> float:
    """d^2 = ||mu_r - mu_g||^2 + Tr(S_r + S_g - 2 (S_r S_g)^(1/2)), by torchmetrics; >= 0 up to rounding."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    check_moments(real, generated)
    metric = FrechetInceptionDistance(feature=feature_passthrough(len(real.total)), sync_on_compute=False)
    for side, moments in (("real", real), ("fake", generated)):
        getattr(metric, f"{side}_features_sum").copy_(moments.total)
        getattr(metric, f"{side}_features_cov_sum").copy_(moments.outer)
        getattr(metric, f"{side}_features_num_samples").fill_(moments.n)
    metric.orig_dtype, metric._update_count = torch.float64, 1  # type: ignore[assignment]  # what update() would leave
    return float(metric.compute())


class FrechetDistanceTo:
    """The same distance from one reference to many sets: Tr (S_r S_g)^(1/2) = Tr (S_r^(1/2) S_g S_r^(1/2))^(1/2).

    The inner matrix is symmetric, whose eigenvalues are found many times faster than those of the product.
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
    """Refuse sets too small for a covariance, and features of two sizes."""
    if min(real.n, generated.n) < 2:
        raise InputError(
            f"a Fréchet distance takes 2 images or more on each side, not {real.n} real and {generated.n} generated"
        )
    if real.total.shape != generated.total.shape:
        raise InputError(f"features of {len(real.total)} and {len(generated.total)} numbers do not compare")


def kernel_distance(real: torch.Tensor, generated: torch.Tensor, seed: int) -> tuple[float, float, int]:
    """MMD^2 with the kernel (x y / d + 1)^3 by torchmetrics: mean and standard deviation over 100 subsets, their size.

    real, generated: features (n, d). Subsets have 1000 images, or half of the smaller set where that is less, and are
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
