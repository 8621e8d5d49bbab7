"""A page: sections of plain data, which the templates beside this file draw as one HTML file that needs no other.

A block of a section is text for a paragraph, a dict of facts, a `Command`, a `Table`, a `Drawing` or a `Slider`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, UnidentifiedImageError

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import write_atomically


class Command(str):
    """A command line."""


class Chosen(str):
    """A cell of a table that says what was chosen."""


@dataclass(frozen=True)
class Pixels:
    """A cell that is a small image whose pixels stay squares, `wide` CSS pixels in all, with a word below it."""

    png: bytes
    wide: int
    alt: str
    below: str = ""
    flag: bool = False  # whether the word is a warning


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows. A cell is text, a number, `Chosen`, `Pixels`, or a list of these.

    numeric: columns aligned to the right. marked: rows to stand out. pictures: whether the cells are pictures.
    """

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]
    numeric: Collection[int] = ()
    marked: Collection[int] = ()
    pictures: bool = False


@dataclass(frozen=True)
class Drawing:
    """A drawn picture as a PNG, with a second one for readers of dark pages where it has one."""

    png: bytes
    alt: str
    dark: bytes | None = None
    caption: str = ""


@dataclass(frozen=True)
class Slider:
    """Pictures by level s, one below the other, or one at a time where a script may run, at first that of `start`."""

    pictures: Mapping[int, Pixels]
    start: int


Block: TypeAlias = str | dict[str, str] | Table | Drawing | Slider
Section: TypeAlias = tuple[str, Sequence[Block]]  # its heading, and its blocks


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height in pixels; refuses what is no PNG."""
    try:
        return Image.open(io.BytesIO(png), formats=["PNG"]).size
    except UnidentifiedImageError as error:
        raise InputError(f"a picture of {len(png)} bytes on a page is no PNG") from error


def data_uri(png: bytes) -> str:
    """The picture itself where a page would name its file."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


TEMPLATES = Environment(
    loader=PackageLoader("cdm_lightning.evaluation.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters |= {"data_uri": data_uri, "size": size_of, "kind": lambda block: type(block).__name__}


def render_page(title: str, sections: Sequence[Section], lead: str = "") -> str:
    """The HTML of a page: a title, a lead sentence, contents, and the sections; what is empty is left out."""
    filled = [(heading, [block for block in blocks if block]) for heading, blocks in sections]
    kept = [section for section in filled if section[1]]
    return TEMPLATES.get_template("page.html").render(title=title, lead=lead, sections=kept)


def write_page(path: Path, title: str, sections: Sequence[Section], lead: str = "") -> None:
    """Write the page as one file."""
    write_atomically(Path(path), render_page(title, sections, lead).encode())
