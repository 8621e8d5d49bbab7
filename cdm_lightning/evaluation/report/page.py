"""HTML pages: sections of plain data, rendered by templates/ into one self-contained file.

A block of a section is a str (a paragraph), a dict of facts, a `Command`, a `Table`, `Folded` tables, a `Drawing` or a
`Slider`.
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
    """A block: a command line."""


class Chosen(str):
    """A table cell that is marked as chosen."""


@dataclass(frozen=True)
class Pixels:
    """A table cell: a small PNG, enlarged to `wide` CSS pixels without smoothing, with a text below it."""

    png: bytes
    wide: int
    alt: str
    below: str = ""
    flag: bool = False  # whether the text below is a warning


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows. A cell is text, a number, `Chosen`, `Pixels`, or a list of these.

    A column without content is not shown.
    numeric: indices of right-aligned columns. marked: indices of highlighted rows. pictures: cells are `Pixels`.
    """

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]
    numeric: Collection[int] = ()
    marked: Collection[int] = ()
    pictures: bool = False

    @property
    def columns(self) -> list[int]:
        """The indices of the columns with content."""
        return [i for i in range(len(self.heads)) if any(row[i] not in (None, "", []) for row in self.rows)]


@dataclass(frozen=True)
class Folded:
    """A block: tables under a line that opens them."""

    summary: str
    tables: Sequence[Table]


@dataclass(frozen=True)
class Drawing:
    """A block: a chart as a PNG, with a second version for dark pages if there is one."""

    png: bytes
    alt: str
    dark: bytes | None = None
    caption: str = ""


@dataclass(frozen=True)
class Slider:
    """A block: pictures by level s. With JavaScript, a slider shows one at a time, first s = start; without, all."""

    pictures: Mapping[int, Pixels]
    start: int


Block: TypeAlias = str | dict[str, str] | Table | Folded | Drawing | Slider
Section: TypeAlias = tuple[str, Sequence[Block]]  # heading, blocks


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height in pixels. Raises InputError for bytes that are not a PNG."""
    try:
        return Image.open(io.BytesIO(png), formats=["PNG"]).size
    except UnidentifiedImageError as error:
        raise InputError(f"a picture of {len(png)} bytes on a page is no PNG") from error


def data_uri(png: bytes) -> str:
    """A data: URI, which embeds the picture in the page."""
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
    """The HTML of a page: title, lead sentence, contents and sections. Leaves out empty blocks and sections."""
    filled = [(heading, [block for block in blocks if block]) for heading, blocks in sections]
    kept = [section for section in filled if section[1]]
    return TEMPLATES.get_template("page.html").render(title=title, lead=lead, sections=kept)


def write_page(path: Path, title: str, sections: Sequence[Section], lead: str = "") -> None:
    """Render a page and write it atomically."""
    write_atomically(Path(path), render_page(title, sections, lead).encode())
