"""Line charts for a page: a distance over the level s or over network calls, in a light and a dark version."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from cdm_lightning.evaluation.report.page import Drawing

Point = tuple[float, float, float | None]  # s or network calls, value, one standard deviation
THEMES = {  # colours of ground, text, grid and lines; lines also differ in marker and dash
    "light": ("white", "#333333", "#d9d9d6", ("#0b5fa5", "#b4480f", "#4d7a1e")),
    "dark": ("none", "#d6d6d2", "#44444a", ("#7cb8ee", "#f0a070", "#a9cf7a")),
}
STYLES = ("o-", "s--", "^:")
LEVEL_AXIS = "level s of the noise on the low-resolution input"


def line_chart(
    lines: Mapping[str, Sequence[Point]],
    chosen: tuple[str, float] | None,
    y_label: str,
    caption: str,
    x_label: str = LEVEL_AXIS,
    title: str = "",
    floor: tuple[str, float] | None = None,
) -> Drawing:
    """A chart as PNGs for light and dark pages, with alt text and caption. Arguments as in `plot`."""
    light, dark = (plot(lines, chosen, y_label, theme, x_label, title, floor) for theme in ("light", "dark"))
    levels = sorted({s for points in lines.values() for s, _, _ in points})
    alt = (
        f"Line chart of {y_label} over {x_label}, at {', '.join(map(str, levels))}, for {', '.join(lines)}; "
        "the table has the numbers."
    )
    return Drawing(light, alt, dark, caption)


def plot(
    lines: Mapping[str, Sequence[Point]],
    chosen: tuple[str, float] | None,
    y_label: str,
    theme: str,
    x_label: str = LEVEL_AXIS,
    title: str = "",
    floor: tuple[str, float] | None = None,
) -> bytes:
    """PNG of a line chart with error bars: one line per name, and a ring around the chosen point (name, s).

    The y axis starts at 0, so that small differences look small. floor: name and value of a horizontal line.
    """
    import matplotlib as mpl  # slow to import, and most commands draw nothing
    from matplotlib.figure import Figure

    ground, text_colour, grid_colour, colours = THEMES[theme]
    coloured = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    settings: dict[Any, Any] = {**dict.fromkeys(coloured, text_colour), "font.size": 9.5}
    settings |= {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.parse_math": False,  # a $ in a name is no formula
    }
    with mpl.rc_context(settings):
        canvas = Figure(figsize=(5.2, 3.5), layout="constrained", facecolor=ground)
        axes = canvas.subplots()
        axes.set_facecolor("none")
        axes.grid(axis="y", color=grid_colour, linewidth=0.6)
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
            axes.plot(at[0], at[1], "o", markersize=13, markerfacecolor="none", color=text_colour, label=label)
        if floor is not None:
            axes.axhline(floor[1], color=text_colour, linewidth=0.8, linestyle=(0, (1, 3)), label=floor[0])
        if min(value - (spread or 0) for points in lines.values() for _, value, spread in points) >= 0:
            axes.set_ylim(bottom=0)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        canvas.legend(loc="outside lower center", ncols=2, frameon=False)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()
