"""The pictures of a page: curves, stages side by side, nearest real neighbours, and samples by level."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas

from cdm_lightning.evaluation.report.elements import (
    Html,
    Picture,
    escape,
    number,
    paragraph,
    pixels,
    size_of,
    table,
    uri,
)

Point = tuple[float, float, float | None]  # s or calls, value, one standard deviation
THEMES = {  # text, grid, and a colour per line; each line has a marker and a dash of its own besides
    "light": ("#333333", "#d9d9d6", ("#0b5fa5", "#b4480f", "#4d7a1e")),
    "dark": ("#d6d6d2", "#44444a", ("#7cb8ee", "#f0a070", "#a9cf7a")),
}
STYLES = ("o-", "s--", "^:")


LEVEL = "level s of the noise on the low-resolution input"


def plot(
    lines: Mapping[str, Sequence[Point]], chosen: tuple[str, float] | None, axis: str, theme: str, across: str = LEVEL
) -> bytes:
    """PNG of value against s, or what `across` says: a line per name, a ring around the point (name, s) chosen."""
    ink, faint, colours = THEMES[theme]
    inked = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    settings: dict[Any, Any] = {**dict.fromkeys(inked, ink), "font.size": 9.5}
    settings |= {"axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}  # names are text
    with mpl.rc_context(settings):
        canvas = Canvas(figsize=(5.2, 3.5), layout="constrained", facecolor="none")
        axes = canvas.subplots()
        axes.set_facecolor("none")
        axes.grid(axis="y", color=faint, linewidth=0.6)
        for index, (name, points) in enumerate(lines.items()):
            s, value, spread = zip(*sorted(points), strict=True)
            colour = colours[index % 3]
            axes.plot(s, value, STYLES[index % 3], label=name, color=colour, linewidth=1.4, markersize=5)
            bars = [(x, y, e) for x, y, e in zip(s, value, spread, strict=True) if e is not None]
            if bars:
                x, y, e = zip(*bars, strict=True)
                axes.errorbar(x, y, e, fmt="none", color=colour, elinewidth=1.1, capsize=3)
        for at in (point for name, points in lines.items() for point in points if (name, point[0]) == chosen):
            label = f"chosen: s = {at[0]}"
            axes.plot(at[0], at[1], "o", markersize=13, markerfacecolor="none", color=ink, label=label)
        axes.set_xlabel(across)
        axes.set_ylabel(axis)
        canvas.legend(loc="outside lower center", ncols=2, frameon=False)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="png", dpi=144, transparent=True)
    return buffer.getvalue()


def picture(png: bytes, alt: str) -> Html:
    """A picture that was drawn elsewhere."""
    width, height = size_of(png)
    return Html(f'<figure><img src="{uri(png)}" width="{width}" height="{height}" alt="{escape(alt)}"></figure>\n')


def curve(
    lines: Mapping[str, Sequence[Point]],
    chosen: tuple[str, float] | None,
    axis: str,
    caption: str,
    across: str = LEVEL,
) -> Html:
    """A plot with its caption, in the reader's colours, light or dark."""
    light, dark = (plot(lines, chosen, axis, theme, across) for theme in ("light", "dark"))
    width, height = size_of(light)
    levels = sorted({s for points in lines.values() for s, _, _ in points})
    alt = (
        f"Line chart of {axis} over {across}, at {', '.join(map(str, levels))}, for {', '.join(lines)}; "
        "the table has the numbers."
    )
    return Html(
        f'<figure class="curve"><picture><source media="screen and (prefers-color-scheme: dark)" srcset="{uri(dark)}">'
        f'<img src="{uri(light)}" width="{width}" height="{height}" alt="{escape(alt)}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )


def stages_grid(rows: Sequence[tuple[str, Sequence[Picture]]], caption: str = "") -> Html:
    """The stages side by side: a class each row, a resolution each column, all of one size, their pixels squares.

    rows: (name of the class, one image per resolution, from low to high). Nothing where there are none.
    """
    if not rows or not rows[0][1]:
        return Html()
    widths = [size_of(picture)[0] for picture in rows[0][1]]
    shown = max(112, *widths)
    shown = max(widths) * -(-shown // max(widths))  # a whole multiple of the largest, and so of the others too
    heads = ["class", *(f"{width} × {width}" for width in widths)]
    lines = []
    for name, images in rows:
        alts = [f"{name}, generated, {size_of(image)[0]} × {size_of(image)[1]}" for image in images]
        lines.append([name, *(pixels(image, alt, shown) for image, alt in zip(images, alts, strict=True))])
    caption = caption or "Generated images, each row one image as the stages of the cascade make it"
    return Html(f'<div class="pictures">{table(caption, heads, lines)}</div>\n')


def neighbours_grid(
    rows: Sequence[tuple[Picture, Sequence[Picture], Sequence[float], bool]], measured_in: str = ""
) -> Html:
    """Generated images with their nearest real ones, nearest first; copies of a real image are marked by a word.

    rows: (generated image, real neighbours, their distances, whether it counts as a copy). measured_in: the space of
    the distances, such as "features of inception". Nothing where there are none.
    """
    if not rows:
        return Html()
    lines: list[list[object]] = []
    copies = [index for index, row in enumerate(rows) if row[3]]
    for index, (image, neighbours, distances, is_copy) in enumerate(rows, 1):
        shown = max(96, size_of(image)[0])
        word = '<strong class="flag">copy</strong>' if is_copy else "generated"
        cells: list[object] = [Html(f"{pixels(image, f'generated image {index}', shown)}<small>{word}</small>")]
        for rank, (neighbour, distance) in enumerate(zip(neighbours, distances, strict=True), 1):
            alt = f"real neighbour {rank} of generated image {index}, at distance {number(distance)}"
            cells.append(Html(f"{pixels(neighbour, alt, shown)}<small>{number(distance)}</small>"))
        lines.append(cells)
    most = max(len(cells) for cells in lines)
    lines = [[*cells, *[None] * (most - len(cells))] for cells in lines]
    space = f", with the distance in {measured_in}" if measured_in else ", with the distance"
    caption = f"Generated images and their nearest real neighbours{space}"
    heads = ["generated", *(f"nearest {rank}" if rank > 1 else "nearest" for rank in range(1, most))]
    said = f"{len(copies)} of the {len(rows)} images shown count as copies of a real one."
    return Html(f'<div class="pictures">{table(caption, heads, lines, marked=copies)}</div>\n{paragraph(said)}')


SLIDER = """<script>
(function (box) {
  var pictures = Array.from(box.querySelectorAll("figure")), control = box.querySelector(".control");
  var slider = control.querySelector("input"), output = control.querySelector("output");
  function show() {
    pictures.forEach(function (figure, index) { figure.classList.toggle("off", index !== Number(slider.value)); });
    output.textContent = pictures[slider.value].dataset.s;
    slider.setAttribute("aria-valuetext", "s = " + output.textContent);
  }
  slider.addEventListener("input", show);
  control.hidden = false;
  show();
})(document.currentScript.parentElement);
</script>"""


def level_slider(pictures: Mapping[int, bytes], start: int | None = None, what: str = "Samples") -> Html:
    """The samples of each level s: all of them one below the other, or behind a slider where a script may run.

    pictures: PNG bytes per s. start: the s shown first, the least one otherwise. Nothing where there are none.
    """
    if not pictures:
        return Html()
    levels = sorted(pictures)
    first = levels.index(start) if start in levels else 0
    figures = [
        f'<figure data-s="{s}">{pixels(pictures[s], f"{what} at s = {s}", 480)}'
        f"<figcaption>{escape(what)} at s = {s}</figcaption></figure>\n"
        for s in levels
    ]
    return Html(
        f'<div class="levels"><p class="control" hidden><label>s = <output>{levels[first]}</output> '
        f'<input type="range" min="0" max="{len(levels) - 1}" step="1" value="{first}"></label></p>\n'
        f"{''.join(figures)}{SLIDER}</div>\n"
    )
