"""Nearest neighbours in feature space: improved precision and recall, and the detection of memorised images."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cdm_lightning.foundation.errors import InputError

CHUNK = 1000  # rows at a time, so that memory does not grow with n^2


def precision_recall(real: torch.Tensor, generated: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., 2019, eq. 1).

    The manifold of a set is the union of balls around its points; each reaches to the point's k-th nearest neighbour.
    Precision is the share of generated images inside the manifold of the real ones; recall is the reverse.
    real: (m, d), generated: (n, d); n should be close to m.
    """
    if min(len(real), len(generated)) <= k:
        numbers = f"{len(real)} real and {len(generated)} generated"
        raise InputError(f"k = {k} neighbours need more than {k} images on each side, not {numbers}")
    real, generated = centred(real, generated)
    return share_inside(generated, real, radii(real, k)), share_inside(real, generated, radii(generated, k))


def radii(points: torch.Tensor, k: int) -> torch.Tensor:
    """The distance of every point to its k-th nearest neighbour among the others, (n,)."""
    parts = []
    for start, distance in distances(points, points):
        rows = torch.arange(len(distance))
        distance[rows, start + rows] = torch.inf  # not its own neighbour; an equal point elsewhere is one
        parts.append(distance.kthvalue(k, dim=1).values)
    return torch.cat(parts)


def share_inside(points: torch.Tensor, centres: torch.Tensor, radius: torch.Tensor) -> float:
    """The share of points that lie in at least one of the balls."""
    inside = sum(int((distance <= radius).any(1).sum()) for _, distance in distances(points, centres))
    return inside / len(points)


def nearest(real: torch.Tensor, generated: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest real images of every generated image: distances in rising order, and row numbers, (n, k) each."""
    real, generated = centred(real, generated)
    parts = [distance.topk(min(k, len(real)), largest=False) for _, distance in distances(generated, real)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def copy_threshold(real: torch.Tensor, quantile: float = 0.01) -> float:
    """The `quantile` of the distances of real images to their nearest other real image.

    Without memorisation, about this share of the samples is nearer than this to a training image; a larger share points
    to memorisation.
    """
    (real,) = centred(real)
    return float(radii(real, 1).double().quantile(quantile)) if len(real) > 1 else 0.0


def centred(*sets: torch.Tensor) -> list[torch.Tensor]:
    """The sets minus the mean of the first, so that float32 loses the least precision in differences."""
    middle = sets[0].double().mean(0)
    return [(points.double() - middle).float() for points in sets]


def distances(points: torch.Tensor, others: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Euclidean distances, in chunks of points: (row of the first point, distances (chunk, len(others)))."""
    for start in range(0, len(points), CHUNK):
        yield start, torch.cdist(points[start : start + CHUNK], others)
