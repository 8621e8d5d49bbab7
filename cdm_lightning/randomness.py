"""Random numbers keyed by what they are for: one generator per image, so that nobody shares a stream."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Sequence

import torch


def key(*parts: int | str) -> int:
    """A 63-bit integer that is a function of `parts` alone: equal parts, equal number, on every machine."""
    plain = tuple(part if isinstance(part, str) else int(operator.index(part)) for part in parts)  # numpy's ints too
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generators(index: Iterable[int], device: torch.device | str, *parts: int | str) -> list[torch.Generator]:
    """One generator per image, seeded key(parts) + index.

    Consecutive seeds cannot collide even on a CPU, whose generator keeps only the lowest 32 bits of a seed.
    """
    start = key(*parts)
    return [torch.Generator(device).manual_seed((start + int(i)) % 2**63) for i in index]


def randn(shape: Sequence[int], generator: Sequence[torch.Generator]) -> torch.Tensor:
    """Standard normal float32 (B, *shape), image i from generator[i]."""
    return torch.stack([torch.randn(tuple(shape), generator=g, device=g.device) for g in generator])


def rand(generator: Sequence[torch.Generator]) -> torch.Tensor:
    """Uniform float64 in [0, 1), shape (B,), image i from generator[i]."""
    return torch.stack([torch.rand((), generator=g, device=g.device, dtype=torch.float64) for g in generator])
