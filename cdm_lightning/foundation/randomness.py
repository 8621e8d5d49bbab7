"""Random numbers: one generator per image, seeded by the purpose of its draws and the index of the image."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterable, Iterator, Sequence

import torch

NUMBERS_PER_DRAW = 2**16  # random numbers drawn per call for one image: a quarter of a megabyte


def key(*parts: int | str) -> int:
    """A 63-bit integer, hashed from `parts`: the same on every machine."""
    # Accepts numpy integers too.
    plain = tuple(part if isinstance(part, str) else int(operator.index(part)) for part in parts)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generators(index: Iterable[int], device: torch.device | str, *parts: int | str) -> list[torch.Generator]:
    """One generator per image, seeded with key(*parts) + index.

    Consecutive seeds do not collide even on a CPU, whose generator uses only the lowest 32 bits of a seed.
    """
    start = key(*parts)
    return [torch.Generator(device).manual_seed((start + int(i)) % 2**63) for i in index]


def default_generators(count: int, device: torch.device) -> list[torch.Generator]:
    """torch's own generator of a device, once per image: for images that nothing has to reproduce."""
    if device.type == "cuda":
        number = torch.cuda.current_device() if device.index is None else device.index
        return [torch.cuda.default_generators[number]] * count
    return [torch.default_generator] * count


def randn(shape: Sequence[int], generator: Sequence[torch.Generator]) -> torch.Tensor:
    """Standard normal float32 (B, *shape), image i from generator[i]."""
    return torch.stack([torch.randn(tuple(shape), generator=g, device=g.device) for g in generator])


def randn_ahead(
    shape: Sequence[int], steps: int, device: torch.device, generator: Sequence[torch.Generator] | None
) -> Iterator[torch.Tensor]:
    """Standard normal float32 (B, C, H, W), once per step; the noise of image i comes from generator[i].

    One call draws the noise of an image for many steps: on a GPU, one call per image and step would take longer than
    the network. On a CPU the numbers equal those of `randn` called at each step. Its generator makes them in groups of
    16, so steps are drawn together only if C H W is a multiple of 16. generator None: the global generator.
    """
    image_shape = tuple(shape[1:])
    size = math.prod(image_shape)
    steps_per_draw = max(1, NUMBERS_PER_DRAW // size) if device.type != "cpu" or size % 16 == 0 else 1
    for first in range(0, steps, steps_per_draw):
        count = min(steps_per_draw, steps - first)
        if generator is None:
            yield from torch.randn((count, *shape), device=device)
            continue
        drawn = torch.empty((count, *shape), device=device)
        for image, g in zip(range(shape[0]), generator, strict=True):
            drawn[:, image] = torch.randn((count, *image_shape), generator=g, device=g.device)
        yield from drawn


def rand(generator: Sequence[torch.Generator]) -> torch.Tensor:
    """Uniform float64 in [0, 1), shape (B,), image i from generator[i]."""
    return torch.stack([torch.rand((), generator=g, device=g.device, dtype=torch.float64) for g in generator])
