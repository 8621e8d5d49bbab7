"""Random numbers: every image has a stream of its own, keyed by the purpose of its draws and its index.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is a function of a key and a counter,
so that nothing is stored and a whole batch is drawn at once, on any device.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57  # of Philox4x32
WEYL = 0x9E3779B9, 0xBB67AE85  # added to the two words of the key after every round
ROUNDS = 10
WORD = 2**32 - 1  # the 32 bits of a word, which is kept in an int64


def key(*parts: int | str) -> int:
    """A 63-bit integer, hashed from `parts`: the same on every machine."""
    # Accepts numpy integers too.
    plain = tuple(part if isinstance(part, str) else int(operator.index(part)) for part in parts)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Streams(Protocol):
    """One stream of random numbers per image. Every draw goes on where the last one ended."""

    device: torch.device  # of the numbers

    def __len__(self) -> int: ...

    def rand(self, shape: Sequence[int] = ()) -> torch.Tensor:
        """Uniform float64 in [0, 1), (B, *shape)."""
        ...

    def randn(self, shape: Sequence[int]) -> torch.Tensor:
        """Standard normal float32, (B, *shape)."""
        ...


class KeyedStreams:
    """Streams that depend on `parts` and the index of the image alone: not on the batch, the rank or the device.

    Uniform numbers are the same bits on all devices. Normal ones are computed in float64 and then rounded, so that
    devices whose logarithm and cosine differ nearly always agree too.

    index: the indices of the images, any int64; larger integers wrap. A tensor stays where it is and nothing waits for
    it, if it is on `device` already. parts: what the numbers are for, such as a seed and a purpose.
    """

    def __init__(self, index: Iterable[int] | torch.Tensor, device: torch.device | str, *parts: int | str) -> None:
        if not isinstance(index, torch.Tensor):
            index = torch.tensor([(int(i) + 2**63) % 2**64 - 2**63 for i in index], dtype=torch.int64)
        self.index, self.draws = index.to(device, torch.int64).contiguous(), 0
        self.device = self.index.device
        self.keys = round_keys(key(*parts), self.device)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, part: slice) -> KeyedStreams:
        """The streams of some of the images, at the same draw; those of the whole do not move on with them."""
        some = object.__new__(KeyedStreams)
        some.__dict__ = {**self.__dict__, "index": self.index[part]}
        return some

    def rand(self, shape: Sequence[int] = ()) -> torch.Tensor:
        even, odd = self.next_words(math.prod(shape), 2)
        bits = even.bitwise_left_shift_(21).bitwise_or_(odd.bitwise_right_shift_(11))  # 53, all that a float64 holds
        return self.shaped(bits.double().mul_(2**-53), shape)

    def randn(self, shape: Sequence[int]) -> torch.Tensor:
        even, odd = self.next_words(math.prod(shape), 4)
        radius = even.double().add_(1).mul_(2**-32).log_().mul_(-2).sqrt_()  # Box and Muller 1958, of (0, 1]
        angle = odd.double().mul_(2 * math.pi * 2**-32)
        both = angle.cos().mul_(radius).float(), angle.sin_().mul_(radius).float()
        return self.shaped(torch.cat(both), shape)

    def next_words(self, count: int, per_block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The words of the next draw, as in `philox`, (2, B, blocks): `per_block` numbers come of a block."""
        blocks = -(-count // per_block)
        even = self.index.new_zeros(2, len(self), blocks)
        odd = torch.empty_like(even)
        words(even)[0][0], words(odd)[0][0] = words(self.index[:, None])
        even[1].fill_(self.draws)
        odd[1] = torch.arange(blocks, device=odd.device)
        self.draws += 1
        return philox(even, odd, self.keys)

    def shaped(self, numbers: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """(B, *shape) of (n, B, blocks), whose last numbers may be too many."""
        rows = numbers.transpose(0, 1).flatten(1)[:, : math.prod(shape)]
        return rows.reshape(len(self), *shape).contiguous()


def words(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The low and the high 32 bits of int64 (..., N), as int32 (..., N): views. Processors are little-endian."""
    halves = numbers.view(torch.int32)
    return halves[..., ::2], halves[..., 1::2]


def round_keys(number: int, device: torch.device) -> torch.Tensor:
    """Both words of Philox's key in each round, int32 (ROUNDS, 2, 1, 1), from a 64-bit number."""
    rounds = torch.arange(ROUNDS, device=device)  # made where it is needed: a copy would wait for the device
    first = number & WORD, number >> 32
    keys, _ = words(torch.stack([word + rounds * step for word, step in zip(first, WEYL, strict=True)], 1))
    return keys[..., None, None]


def philox(even: torch.Tensor, odd: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Philox4x32-10 of many counters at once: words 0 and 2, and words 1 and 3, as those of the counters.

    even, odd: int64 (2, B, N), both overwritten. Only the lower 32 bits of `odd` count; the others of `even` are 0.
    keys: of `round_keys`.
    """
    # Four operations a round, since on a GPU each is a launch: halves of the products are read where they are.
    product = torch.empty_like(even)
    (word0, word2), (mixed, _) = even, words(even)
    for round_key in keys.unbind():
        (product2, product0), (_, high), (low, _) = product, words(product), words(odd)
        torch.mul(word2, MULTIPLIERS[1], out=product2)  # modulo 2^64, which keeps all bits
        torch.mul(word0, MULTIPLIERS[0], out=product0)
        torch.bitwise_xor(high, low, out=mixed).bitwise_xor_(round_key)
        product, odd = odd, product  # the low halves are the new odd words
    return even, odd.bitwise_and_(WORD)


class TorchStreams:
    """Streams of torch's own generators, for images that need not depend on their index alone.

    generators: one for each image, as diffusers takes them, on any device; the same one may occur again. None: torch's
    default generator of `device`.
    """

    def __init__(
        self, count: int, device: torch.device | str, generators: Sequence[torch.Generator] | None = None
    ) -> None:
        self.count, self.device, self.generators = count, torch.device(device), generators

    def __len__(self) -> int:
        return self.count

    def rand(self, shape: Sequence[int] = ()) -> torch.Tensor:
        return self.draw(torch.rand, shape, torch.float64)

    def randn(self, shape: Sequence[int]) -> torch.Tensor:
        return self.draw(torch.randn, shape, torch.float32)

    def draw(self, numbers: Any, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """(B, *shape) by torch.rand or torch.randn, on `device`."""
        if self.generators is None:
            return numbers((self.count, *shape), device=self.device, dtype=dtype)
        each = [numbers(tuple(shape), generator=g, device=g.device, dtype=dtype) for g in self.generators]
        return torch.stack(each).to(self.device)
