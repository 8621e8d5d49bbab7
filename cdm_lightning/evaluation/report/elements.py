"""The elements of a page: escaped text, numbers, tables, and pictures as data URIs."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Collection, Iterable, Sequence

import torch
from PIL import Image, UnidentifiedImageError

from cdm_lightning.evaluation.metrics.figures import Figure
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import encode_png

Picture = torch.Tensor | bytes  # uint8 (C, H, W), C = 1 or 3, or an encoded PNG
NONE = "–"  # in a cell that has nothing to say


class Html(str):
    """Markup made here; any other string is text and is escaped before it reaches a page."""


def escape(text: object) -> Html:
    """Text as HTML, quotes too, so that it may stand in an attribute; markup stays what it is."""
    return text if isinstance(text, Html) else Html(html.escape(str(text), quote=True))


def places(value: float, spread: float | None = None) -> int:
    """Decimals to print: two or more, enough for two digits of a spread, or for three of a value that has none."""
    digits, size = (1, spread) if spread else (2, value)
    if not size or not math.isfinite(size):
        return 2
    return min(max(2, digits - math.floor(math.log10(abs(size)))), 9)


def number(value: float, spread: float | None = None, decimals: int | None = None) -> str:
    """`value` or `value ± spread`, with so many decimals or as many as they ask for."""
    shown = places(value, spread) if decimals is None else decimals
    text = f"{value:,.{shown}f}" if spread is None else f"{value:,.{shown}f} ± {spread:,.{shown}f}"
    return text.replace("-", "−")


def table(
    caption: str,
    heads: Sequence[object],
    rows: Iterable[Sequence[object]],
    numeric: Collection[int] = (),
    marked: Collection[int] = (),
) -> Html:
    """A table that scrolls sideways where it must; the first cell of a row is its heading.

    numeric: columns aligned to the right. marked: rows to stand out. A cell of None or "" prints a dash.
    """

    def cell(tag: str, column: int, content: object, scope: str = "") -> str:
        shown = NONE if content is None or content == "" else content
        number_class = ' class="number"' if column in numeric else ""
        return f"<{tag}{scope}{number_class}>{escape(shown)}</{tag}>"

    head = "".join(cell("th", column, content, ' scope="col"') for column, content in enumerate(heads))
    body = []
    for index, (first, *others) in enumerate(rows):
        cells = "".join(cell("td", column, content) for column, content in enumerate(others, 1))
        marker = ' class="marked"' if index in marked else ""
        heading = cell("th", 0, first, ' scope="row"')
        body.append(f"<tr{marker}>{heading}{cells}</tr>\n")
    return Html(
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>\n'
        f"<caption><span>{escape(caption)}</span></caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{''.join(body)}</tbody></table></div>\n"
    )


def paragraph(text: object) -> Html:
    return Html(f'<p class="note">{escape(text)}</p>\n') if text else Html()


def notes(figures: Iterable[Figure]) -> Html:
    """What a reader must know of the figures, each note once."""
    return Html("".join(paragraph(note) for note in dict.fromkeys(figure.note for figure in figures)))


def png_of(picture: Picture) -> bytes:
    """PNG bytes of a uint8 image (C, H, W), or the bytes given."""
    if isinstance(picture, bytes):
        return picture
    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] not in (1, 3):
        raise InputError(f"a picture on a page is uint8 (1 or 3, H, W), not {picture.dtype} {tuple(picture.shape)}")
    return encode_png(picture.cpu().permute(1, 2, 0).numpy())


def size_of(picture: Picture) -> tuple[int, int]:
    """Width and height in pixels."""
    if isinstance(picture, torch.Tensor):
        return picture.shape[-1], picture.shape[-2]
    try:
        return Image.open(io.BytesIO(picture), formats=["PNG"]).size
    except UnidentifiedImageError as error:
        raise InputError(f"a picture of {len(picture)} bytes on a page is no PNG") from error


def uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def pixels(picture: Picture, alt: str, shown: int = 0) -> Html:
    """An image whose pixels stay squares, `shown` CSS pixels wide or the next whole multiple of its own width."""
    png = png_of(picture)
    width, height = size_of(picture)
    wide = width * max(1, math.ceil(shown / width))
    return Html(
        f'<img class="pixels" src="{uri(png)}" width="{width}" height="{height}" style="--wide:{wide}px" '
        f'alt="{escape(alt)}">'
    )
