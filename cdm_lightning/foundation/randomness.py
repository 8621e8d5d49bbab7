"""Random numbers keyed by what they are for: one generator per image, so that nobody shares a stream."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterable, Iterator, Sequence

import torch

NUMBERS_PER_DRAW = 2**16  # numbers drawn by one call for an image, a quarter of a megabyte


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


def randn_ahead(
    shape: Sequence[int], steps: int, device: torch.device, generator: Sequence[torch.Generator] | None
) -> Iterator[torch.Tensor]:
    """Standard normal float32 (B, C, H, W) for each of some steps in turn; image i's from generator[i] alone.

    One call draws an image's noise for many steps, as a call per image and step would cost a GPU more than its network.
    On a CPU these are the numbers of `randn` called step by step: so where they come in sixteens, as it makes them, and
    elsewhere it is called so. generator None: the global one, all images at once.
    """
    one = tuple(shape[1:])
    together = max(1, NUMBERS_PER_DRAW // math.prod(one)) if device.type != "cpu" or math.prod(one) % 16 == 0 else 1
    for first in range(0, steps, together):
        many = min(together, steps - first)
        if generator is None:
            yield from torch.randn((many, *shape), device=device)
            continue
        drawn = torch.empty((many, *shape), device=device)
        for image, g in zip(range(shape[0]), generator, strict=True):
            drawn[:, image] = torch.randn((many, *one), generator=g, device=g.device)
        yield from drawn


def rand(generator: Sequence[torch.Generator]) -> torch.Tensor:
    """Uniform float64 in [0, 1), shape (B,), image i from generator[i]."""
    return torch.stack([torch.rand((), generator=g, device=g.device, dtype=torch.float64) for g in generator])
