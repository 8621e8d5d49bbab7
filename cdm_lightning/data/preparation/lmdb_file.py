"""Reading LMDB databases: where their values lie. The library itself trusts its file, so that damage ends the process.

A database is a file of pages. The first two are meta pages, of which the one of the later transaction names the root of
a tree: branch pages hold the numbers of pages, and leaf pages the keys, each with its value or the number of the page
on which that begins. This is version 1 of the format, as 64-bit little-endian machines write it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

from cdm_lightning.foundation.errors import InputError

MAGIC, VERSION = 0xBEEFC0DE, 1
PAGE_SIZES = {1 << power for power in range(9, 17)}
MAX_DEPTH = 32  # of the tree: LMDB's own bound
META = struct.Struct("<16x II 16x I 44x 4x HH 24x QQ 8x Q")
HEADER = struct.Struct("<Q2xHHH")  # page, kind, end of the places of its nodes, beginning of the nodes
NODE = struct.Struct("<HHHH")  # size of the value (two halves), flags, size of the key; or 48 bits of a page, and that
BRANCH, LEAF, OVERFLOW, KINDS = 1, 2, 4, 0x6F
OUTSIDE = 1  # the flag of a value on pages of its own; others are of databases within, and of several values of a key


class LmdbFile:
    """A database in a file that is open for reading in binary. entries: how many keys it has.

    Raises InputError for what is none, and for damage, when it is met: nothing that the file says is trusted.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.path, self.descriptor, self.size = file.name, file.fileno(), os.fstat(file.fileno()).st_size
        first = self.read(0, META.size)
        self.page_size = META.unpack(first)[2] if len(first) == META.size else 0
        metas = [META.unpack(page) for page in (first, self.read(self.page_size, META.size)) if len(page) == META.size]
        wanted = (MAGIC, VERSION, self.page_size)
        if len(metas) < 2 or self.page_size not in PAGE_SIZES or any(meta[:3] != wanted for meta in metas):
            raise InputError(f"{self.path} is no LMDB database, or its beginning is damaged")
        if abs(metas[0][-1] - metas[1][-1]) > 1:  # transactions take turns
            raise self.damaged("its meta pages do not follow each other")
        *_, flags, self.depth, self.entries, self.root, _ = max(metas, key=lambda meta: meta[-1])
        if flags:
            raise InputError(f"{self.path} has keys with several values, or in an order of their own: no such are read")

    def values(self) -> Iterator[tuple[bytes, int, int]]:
        """(key, offset, size) of each value, in the order of the keys. Values are not read."""
        count, last = 0, b""
        for key, offset, size in self.below(self.root, self.depth) if self.entries else ():
            if count and key <= last:  # so no page is met twice
                raise self.damaged("its keys are in no order")
            count, last = count + 1, key
            yield key, offset, size
        if count != self.entries:
            raise self.damaged(f"it has {count:,} of {self.entries:,} keys")

    def below(self, number: int, depth: int) -> Iterator[tuple[bytes, int, int]]:
        """(key, offset, size) of the values below a page. depth: of the tree from there on, 1 for a leaf."""
        if not 0 < depth <= MAX_DEPTH:
            raise self.damaged(f"its tree is {depth} pages deep")
        start, page = number * self.page_size, self.page(number, BRANCH if depth > 1 else LEAF)
        _, _, lower, upper = HEADER.unpack_from(page)
        if lower % 2 or not HEADER.size < lower <= upper <= len(page):
            raise self.damaged(f"page {number} holds no nodes")
        filled = 0
        for (place,) in struct.iter_unpack("<H", page[HEADER.size : lower]):
            if not upper <= place <= len(page) - NODE.size:
                raise self.damaged(f"a node of page {number} lies outside")
            low, high, flags, length = NODE.unpack_from(page, place)
            behind = place + NODE.size + length  # the key
            size = low | high << 16
            inside = 0 if depth > 1 else 8 if flags & OUTSIDE else size
            if behind + inside > len(page):
                raise self.damaged(f"a node of page {number} does not end there")
            filled += -(-(behind + inside - place) // 2) * 2
            key = page[place + NODE.size : behind]
            if depth > 1:
                yield from self.below(size | flags << 32, depth - 1)
            elif flags & ~OUTSIDE:
                raise InputError(f"{self.path} holds databases within, or keys with several values: no such are read")
            elif flags:
                yield key, self.outside(int.from_bytes(page[behind : behind + 8], "little"), size), size
            else:
                yield key, start + behind, size
        if filled != len(page) - upper:
            raise self.damaged(f"the nodes of page {number} do not fill it")

    def outside(self, number: int, size: int) -> int:
        """The offset of a value of `size` bytes on pages of its own, of which the first has a header."""
        _, _, *count = HEADER.unpack_from(self.page(number, OVERFLOW, HEADER.size))
        pages = count[0] | count[1] << 16
        if HEADER.size + size > pages * self.page_size:
            raise self.damaged(f"a value does not fit on its pages from {number} on")
        if number * self.page_size + HEADER.size + size > self.size:
            raise self.cut(number + pages)
        return number * self.page_size + HEADER.size

    def page(self, number: int, kind: int, size: int = 0) -> bytes:
        """A page, or its first `size` bytes, if it is of the kind that is expected and knows its number."""
        if (number + 1) * self.page_size > self.size:
            raise self.cut(number + 1)
        page = self.read(number * self.page_size, size or self.page_size)
        if len(page) < (size or self.page_size):  # it has become shorter
            raise self.cut(number + 1)
        own, flags, *_ = HEADER.unpack_from(page)
        if own != number or flags & KINDS != kind:
            raise self.damaged(f"page {number} is another, or of another kind, than is expected there")
        return page

    def read(self, start: int, size: int) -> bytes:
        return os.pread(self.descriptor, size, start)

    def damaged(self, what: str) -> InputError:
        return InputError(f"{self.path} is damaged: {what}")

    def cut(self, pages: int) -> InputError:
        return InputError(
            f"{self.path} is cut or damaged: it has {self.size:,} bytes and names a page that ends at "
            f"{pages * self.page_size:,}; is it an unfinished download?"
        )
