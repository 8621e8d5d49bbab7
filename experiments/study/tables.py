"""Print the study's tables as Markdown, and draw its curves: `python experiments/study/tables.py [--picture FILE]`.

Reads experiments/study/results/*.json, or those of --results. A cell holds the figures of the training seeds in order,
parted by slashes, or of the first alone; ± is one standard deviation over three sampling seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path("experiments/study/results")
NAMES = {"fashion": "Fashion-MNIST", "cifar": "CIFAR-10", "cifar_wide": "CIFAR-10, wide networks"}
REAL = "real low-res"
ARMS = {  # names of searches -> of arms; behind the whole base, and behind an eighth of its steps
    "none": "no augmentation",
    "blur": "blur",
    "base16": "Gaussian, amortised",
    "truncated": "Gaussian, amortised, truncated",
    "tuned": "no augmentation, then amortised for 200 steps",
    "tuned_half": "no augmentation, then amortised for 1,000 steps",
    "to_2000": "Gaussian, amortised up to s = 2000",
    "none_long": "no augmentation, twice the steps",
    "at_1001": "Gaussian, s = 1001 alone",
    "at_2001": "Gaussian, s = 2001 alone",
    "at_3001": "Gaussian, s = 3001 alone",
    "unlabelled": "as amortised, last stage without labels",
    "no_classes": "as amortised, no labels at all",
}
DECIDING = {  # names of samples -> of arms
    "one_model": "one model at 32x32",
    "none": "no augmentation",
    "zero": "Gaussian, amortised, s = 0",
    "at_1001": "Gaussian, s = 1001 alone",
    "best": "Gaussian, amortised, best s > 0",
}
Found = dict[str, Any]  # the figures of one data set and training seed, by task


class Point:
    """A distance at one s. row: of a search's results.json."""

    def __init__(self, row: dict[str, Any]) -> None:
        figure = row["figures"][0]
        self.s, self.kind, self.sampler, self.steps = row["s"], row["kind"], row["sampler"], row["steps"]
        self.compared, self.value, self.spread = row["compared"], figure["value"], figure["spread"]

    def __str__(self) -> str:
        return number(self.value, self.spread)


def number(value: float, spread: float | None) -> str:
    return f"{value:.2f}" if spread is None else f"{value:.2f} ± {spread:.2f}"


def points(found: Found, search: str, real: bool = False) -> list[Point]:
    """The points of a search over s on generated or on real input, by rising s; [] if it was not measured."""
    rows = found.get(f"search {search}", {}).get("search", {}).get("rows", [])
    own = [Point(row) for row in rows if row["stage"] == "sr32" and not row["compared"]]
    return sorted((p for p in own if (p.kind == REAL) == real), key=lambda p: p.s)


def at(found: list[Point], s: int) -> Point | None:
    return next((p for p in found if p.s == s), None)


def best(found: list[Point], above: int = -1) -> Point | None:
    return min((p for p in found if p.s > above), key=lambda p: p.value, default=None)


def at_level(point: Point | None) -> str | None:
    return point and f"{point} (s = {point.s})"


def table(heads: list[str], lines: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    yield from (f"| {' | '.join(line)} |" for line in lines if any(cell not in ("", "–") for cell in line[1:]))


def over_seeds(seeds: list[Found], cell: Any) -> str:
    """The cells of the seeds up to the last that has one, parted by slashes; a dash where there is none."""
    cells = ["–" if value is None else str(value) for value in map(cell, seeds)]
    while len(cells) > 1 and cells[-1] == "–":
        cells.pop()
    return " / ".join(cells)


def growth(seeds: list[Found]) -> Iterator[str]:
    """The best s of the amortised stage against the base's own distance; gain: what that s takes from s = 0."""
    lines = []
    for search, share in bases(seeds).items():

        def base(found: Found, search: str = search) -> str | None:
            figures = found.get(f"search {search}", {}).get("base", {}).get("figures")
            return number(figures[0]["value"], figures[0]["spread"]) if figures else None

        def gain(found: Found, search: str = search) -> str | None:
            own = points(found, search)
            zero, least = at(own, 0), best(own)
            return f"{100 * (1 - least.value / zero.value):.0f} %" if zero and least else None

        lines.append([
            share, over_seeds(seeds, base), over_seeds(seeds, lambda f, n=search: at(points(f, n), 0)),
            over_seeds(seeds, lambda f, n=search: (p := best(points(f, n))) and p.s),
            over_seeds(seeds, lambda f, n=search: best(points(f, n))), over_seeds(seeds, gain),
        ])  # fmt: skip
    yield from table(["steps of the base", "base at 16x16", "sr32 at s = 0", "best s", "sr32 at best s", "gain"], lines)


def bases(seeds: list[Found]) -> dict[str, str]:
    """The searches behind bases of growing training, the first of an eighth of its steps, and their shares of them."""
    begun = [int(step) for found in seeds for key in found if (step := key.partition("search base16@")[2])]
    whole = 8 * min(begun, default=160)
    return {**{f"base16@{whole // part}": f"1/{part}" for part in (8, 4, 2)}, "base16": "all"}


def others(seeds: list[Found]) -> list[str]:
    """The searches that have no place in the study's list: those of a plan of one's own."""
    names = [key.removeprefix("search ") for found in seeds for key in found if key.startswith("search ")]
    return [name for name in dict.fromkeys(names) if name not in (*ARMS, "steps") and "@" not in name]


def arms(seeds: list[Found]) -> Iterator[str]:
    """Every last stage, behind the whole base and behind the weak one (an eighth of its steps)."""
    lines = []
    for search, name in {**ARMS, **{n: n for n in others(seeds)}}.items():
        weak = f"{search}@{next(iter(bases(seeds))).partition('@')[2]}"
        real = over_seeds(seeds, lambda f, n=search: at(points(f, n, True), 0) or at_level(best(points(f, n, True))))
        zero = [over_seeds(seeds, lambda f, n=n: at(points(f, n), 0)) for n in (search, weak)]
        above = [over_seeds(seeds, lambda f, n=n: at_level(best(points(f, n), 0))) for n in (search, weak)]
        lines.append([name, real, zero[0], above[0], zero[1], above[1]])
    single = over_seeds(seeds, lambda f: (e := f.get("reference one_model")) and number(
        e["evaluate"]["figures"][0]["value"], e["evaluate"]["figures"][0]["spread"]))  # fmt: skip
    lines.append(["one model at 32x32", "–", single, "–", "–", "–"])
    heads = ["arm", "real input, lowest s", "s = 0", "best s > 0", "weak base, s = 0", "weak base, best s > 0"]
    yield from table(heads, lines)


def curve(seeds: list[Found]) -> Iterator[str]:
    """FD(s) of the amortised stage, on generated input of every base and on real input."""
    columns = [("base16", True), *((search, False) for search in bases(seeds))]
    levels = sorted({p.s for found in seeds for column in columns for p in points(found, *column)})
    lines = [[str(s), *(over_seeds(seeds, lambda f, c=c, s=s: at(points(f, *c), s)) for c in columns)] for s in levels]
    yield from table(["s", "real input", *(f"base after {share}" for share in bases(seeds).values())], lines)


def steps(seeds: list[Found]) -> Iterator[str]:
    """Sampler and number of steps of the amortised stage, behind the whole base and at its best s."""
    rows = [[Point(row) for row in f.get("search steps", {}).get("search", {}).get("rows", []) if row["compared"]]
            for f in seeds]  # fmt: skip
    counts = sorted({p.steps for own in rows for p in own})
    lines = [[sampler, *(" / ".join(str(p) for own in rows for p in own if (p.sampler, p.steps) == (sampler, n)) or "–"
                         for n in counts)] for sampler in ("dpm++", "ddpm")]  # fmt: skip
    yield from table(["sampler", *(f"{n} steps" for n in counts)], lines)


def deciding(seeds: list[Found]) -> Iterator[str]:
    """Of one larger draw each (10,000 images, wide networks 5,000), what was measured."""
    lines = []
    for arm, name in DECIDING.items():

        def figure(found: Found, card: str, index: int, scale: float, arm: str = arm) -> str | None:
            e = found.get(f"{card} deciding_{arm}")
            return number(scale * e["evaluate"]["figures"][index]["value"], None) if e else None

        def top1(found: Found, arm: str = arm) -> str | None:
            c = found.get(f"cas deciding_{arm}", {}).get("cas")
            return c and f"{number(100 * c['top1'], c['sd'] and 100 * c['sd'])} ({c['ratio']:.2f})"

        distances = [("reference", 0, 1), ("inception", 0, 1), ("inception", 1, 1000)]
        cells = [over_seeds(seeds, lambda f, d=d: figure(f, *d)) for d in distances]
        lines.append([name, *cells, over_seeds(seeds, top1)])
    lines = [["arm", "FD", "FID", "KID x 1000", "CAS top-1, % (of the control)"], *lines]
    measured = [column for column in zip(*lines, strict=True) if set(column[1:]) != {"–"}]
    heads, *lines = map(list, zip(*measured, strict=True))
    yield from table(heads, lines)


def draw(data: dict[str, list[Found]], path: Path) -> None:
    """FD(s): a panel a data set, a line a base and one for real input, thick for the first seed; others after."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(5.2 * len(data), 4.2), layout="constrained")
    for axes, (name, seeds) in zip(canvas.subplots(1, len(data), squeeze=False)[0], data.items(), strict=True):
        shades = {"real input": ("base16", True, "#777777")}
        blues = ("#9ecae1", "#6baed6", "#3182bd", "#08519c")
        shades |= {
            f"base after {s} of its steps": (n, False, c) for (n, s), c in zip(bases(seeds).items(), blues, strict=True)
        }
        shades |= {n: (n, False, f"C{i}") for i, n in enumerate(others(seeds))}
        for label, (search, real, colour) in shades.items():
            for number_, found in enumerate(seeds):
                own = points(found, search, real)
                if own:
                    bars = [p.spread or 0 for p in own]
                    axes.errorbar([p.s for p in own], [p.value for p in own], bars, color=colour, capsize=2, marker="o",
                                  markersize=3, linewidth=1.6 / (1 + number_), label=None if number_ else label,
                                  linestyle="--" if real else "-")  # fmt: skip
                least = best(own) if own and not real else None
                if least:
                    axes.plot(least.s, least.value, "o", markersize=10, markerfacecolor="none", color=colour)
        axes.set(title=NAMES.get(name, name), xlabel="level s of the noise on the low-resolution input", ylim=(0, None))
        axes.grid(axis="y", linewidth=0.4)
    canvas.axes[0].set_ylabel("Fréchet distance at 32x32, small classifier")
    canvas.axes[0].legend(frameon=False)
    canvas.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of figures")
    arguments = parser.parse_args()
    data: dict[str, list[Found]] = {name: [] for name in NAMES}
    for path in sorted(arguments.results.glob("*-[0-9]*.json"), key=lambda path: int(path.stem.rpartition("-")[2])):
        data.setdefault(path.stem.rpartition("-")[0], []).append(json.loads(path.read_text()))
    data = {name: seeds for name, seeds in data.items() if seeds}
    if not data:
        parser.error(f"{arguments.results} holds no figures DATA-SEED.json")
    for name, seeds in data.items():
        for part in (growth, curve, arms, steps, deciding):
            lines = list(part(seeds))
            if len(lines) > 2:
                print(f"{NAMES.get(name, name)}. {part.__doc__}\n", *lines, "", sep="\n")
    if arguments.picture:
        draw(data, arguments.picture)


if __name__ == "__main__":
    main()
