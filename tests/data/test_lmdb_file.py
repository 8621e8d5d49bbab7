"""LMDB databases are listed as the library lists them, and a damaged one is refused by a sentence."""

import random
import struct
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest
from refusals import sentence_of_error

from cdm_lightning.data.preparation.lmdb_file import LmdbFile
from cdm_lightning.foundation.errors import InputError

SIZES = (0, 1, 13, 100, 1500, 2030, 2100, 4080, 4081, 9000)  # within a page, and on pages of its own


def read(path: Path) -> list[tuple[bytes, bytes]]:
    """(key, value) of each entry, by the places that are listed; each lies in the file."""
    with open(path, "rb") as file:
        database = LmdbFile(file)
        found = [(key, database.read(offset, size), size) for key, offset, size in database.values()]
    assert all(len(value) == size for _, value, size in found)
    return [(key, value) for key, value, _ in found]


def made(folder: Path, entries: int, drawn: random.Random) -> list[tuple[bytes, bytes]]:
    """Write a database in several transactions, which also replace and delete; what the library lists of it."""
    keys = [drawn.randbytes(drawn.choice((1, 2, 20, 40, 500))) for _ in range(entries)]
    with lmdb.open(str(folder), map_size=1 << 28) as environment:
        for start in range(0, entries, 2000):
            with environment.begin(write=True) as transaction:
                for key in [*keys[start : start + 2000], *keys[:start:7]]:
                    transaction.put(key, drawn.randbytes(drawn.choice(SIZES)))
                for key in keys[start // 2 : start : 5]:
                    transaction.delete(key)
        with environment.begin() as transaction:
            return list(transaction.cursor())


@pytest.mark.parametrize("entries", [1, 10, 5000])
def test_a_database_is_listed_as_the_library_lists_it(entries: int, tmp_path: Path) -> None:
    wanted = made(tmp_path, entries, random.Random(entries))
    assert wanted and read(tmp_path / "data.mdb") == wanted


def test_an_empty_database_has_no_entries(tmp_path: Path) -> None:
    made(tmp_path, 0, random.Random(0))
    assert read(tmp_path / "data.mdb") == []


def test_damage_anywhere_ends_in_a_list_or_a_sentence(tmp_path: Path) -> None:
    """No page has a checksum: a letter of a key or a byte of a value may be another without a sign of it."""
    path, drawn = tmp_path / "data.mdb", random.Random(0)
    wanted = made(tmp_path, 400, drawn)
    whole, refused = path.read_bytes(), 0
    heads = [start + place for start in range(0, len(whole), 4096) for place in range(64)]  # and places of nodes
    for number in range(600):
        data = bytearray(whole)
        for _ in range(drawn.choice((1, 1, 4))):
            place = drawn.choice(heads) if number % 2 else drawn.randrange(len(data))
            data[place] = drawn.choice((0, 1, 255, data[place] ^ 1 << drawn.randrange(8)))
        if number % 10 == 0:
            del data[drawn.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            assert len(read(path)) == len(wanted)
        except InputError as error:
            assert str(error).startswith(f"{path} ") and "\n" not in str(error)
            refused += 1
    assert refused > 100


def leaf(data: bytes) -> int:
    """Where the leaf page of a database begins that has one."""
    return next(at for at in range(8192, len(data), 4096) if struct.unpack_from("<H", data, at + 10)[0] == 2)


DAMAGES: dict[str, tuple[Callable[[bytes, int], tuple[int, bytes]], str]] = {
    "several values of a key": (lambda data, page: (92, b"\4"), "has keys with several values"),
    "transaction": (lambda data, page: (145, b"\7"), "its meta pages do not follow each other"),
    "root": (lambda data, page: (128, struct.pack("<Q", 0)), "page 0 is another, or of another kind"),
    "root far away": (lambda data, page: (128, struct.pack("<Q", 1 << 60)), "is cut or damaged: it has"),
    "depth": (lambda data, page: (94, struct.pack("<H", 33)), "its tree is 33 pages deep"),
    "depth of a leaf": (lambda data, page: (94, struct.pack("<H", 2)), "is another, or of another kind"),
    "entries": (lambda data, page: (120, struct.pack("<Q", 4)), "it has 3 of 4 keys"),
    "number": (lambda data, page: (page, b"\x09"), "is another, or of another kind"),
    "no nodes": (lambda data, page: (page + 12, struct.pack("<H", 16)), "holds no nodes"),
    "odd end": (lambda data, page: (page + 12, struct.pack("<H", 21)), "holds no nodes"),
    "place": (lambda data, page: (page + 16, struct.pack("<H", 4094)), "lies outside"),
    "same place": (lambda data, page: (page + 16, data[page + 18 : page + 20]), "its keys are in no order"),
    "size": (lambda data, page: (node(data, page), b"\xff\xff"), "does not end there"),
    "smaller": (lambda data, page: (node(data, page), b"\x01"), "do not fill it"),
    "key": (lambda data, page: (node(data, page) + 6, b"\xff\xff"), "does not end there"),
    "kind of value": (lambda data, page: (node(data, page) + 4, b"\x02"), "holds databases within"),
    "value outside": (lambda data, page: (node(data, page, 1) + 9, b"\xff" * 7), "is cut or damaged"),
    "value on a leaf": (lambda data, page: (node(data, page, 1) + 9, struct.pack("<Q", page // 4096)), "is another"),
    "larger value": (lambda data, page: (node(data, page, 1), struct.pack("<H", 60000)), "does not fit on its pages"),
}  # fmt: skip


def node(data: bytes, page: int, number: int = 0) -> int:
    return page + struct.unpack_from("<H", data, page + 16 + 2 * number)[0]


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_is_named(name: str, tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path), map_size=1 << 20) as database, database.begin(write=True) as transaction:
        for key, size in ((b"a", 40), (b"b", 9000), (b"c", 40)):
            transaction.put(key, bytes(size))
    path = tmp_path / "data.mdb"
    data = path.read_bytes()
    assert len(read(path)) == 3
    of_file, sentence = DAMAGES[name]
    place, value = of_file(data, leaf(data))
    newer = 4096 if data[4096 + 144] > data[144] else 0
    place += newer * (place < 4096)  # a place in the meta page
    path.write_bytes(data[:place] + value + data[place + len(value) :])
    sentence_of_error(lambda: read(path), sentence)


def test_a_database_within_is_refused(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path), map_size=1 << 20, max_dbs=1) as environment:
        inner = environment.open_db(b"inner", dupsort=True)
        with environment.begin(write=True) as transaction:
            transaction.put(b"key", b"value", db=inner)
    sentence_of_error(lambda: read(tmp_path / "data.mdb"), "holds databases within, or keys with several values")
