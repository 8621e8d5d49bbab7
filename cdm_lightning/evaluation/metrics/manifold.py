"""Neighbours in a detector's space: improved precision and recall, and the search for memorised images."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cdm_lightning.foundation.errors import InputError

CHUNK = 1000  # rows at a time, so that memory does not grow with n^2


def precision_recall(real: torch.Tensor, generated: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """Shares of each set inside the other's manifold, the union of balls that reach to each point's k-th neighbour.

    Precision: generated images within a real image's ball; recall: real images within a generated image's
    (Kynkäänniemi et al., 2019, eq. 1). real: (m, d), generated: (n, d); n near m compares best.
    """
    if min(len(real), len(generated)) <= k:
        raise InputError(f"k = {k} neighbours take more images than {len(real)} real and {len(generated)} generated")
    real, generated = centred(real, generated)
    return share_inside(generated, real, radii(real, k)), share_inside(real, generated, radii(generated, k))


def radii(points: torch.Tensor, k: int) -> torch.Tensor:
    """The distance of every point to its k-th neighbour among the others, (n,)."""
    found = []
    for start, distance in distances(points, points):
        rows = torch.arange(len(distance))
        distance[rows, start + rows] = torch.inf  # itself, by its place: a twin elsewhere is a neighbour
        found.append(distance.kthvalue(k, dim=1).values)
    return torch.cat(found)


def share_inside(points: torch.Tensor, centres: torch.Tensor, radius: torch.Tensor) -> float:
    inside = sum(int((distance <= radius).any(1).sum()) for _, distance in distances(points, centres))
    return inside / len(points)


def nearest(real: torch.Tensor, generated: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest real images of every generated one: distances in rising order and their rows, (n, k) each."""
    real, generated = centred(real, generated)
    parts = [distance.topk(min(k, len(real)), largest=False) for _, distance in distances(generated, real)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def copy_threshold(real: torch.Tensor, quantile: float = 0.01) -> float:
    """The distance below which a real image has its nearest other real image in a share `quantile` of all cases.

    Of honest samples about that share lies nearer than this to a training image; more of them is memorisation.
    """
    (real,) = centred(real)
    return float(radii(real, 1).double().quantile(quantile)) if len(real) > 1 else 0.0


def centred(*sets: torch.Tensor) -> list[torch.Tensor]:
    """The sets around the mean of the first, where float32 loses least of a difference."""
    middle = sets[0].double().mean(0)
    return [(points.double() - middle).float() for points in sets]


def distances(points: torch.Tensor, others: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Euclidean distances (rows, len(others)) of a chunk of points at a time, and the number of its first point."""
    for start in range(0, len(points), CHUNK):
        yield start, torch.cdist(points[start : start + CHUNK], others)
