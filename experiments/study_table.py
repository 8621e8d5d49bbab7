"""Gather what experiments/study.mk measured: `python experiments/study_table.py runs/study [--plot docs/study.png]`.

Prints Markdown: every arm with each seed's value, the distance over s, the cascade gap, and the numbers of steps. With
`--best KIND` and the folder of a search: the folder of its samples of least distance at s > 0.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

ARMS = {
    "single": "one model at 32x32", "plain": "cascade, no augmentation", "clean": "cascade, Gaussian, s = 0",
    "truncated": "cascade, Gaussian, s = 501, truncated", "noised": "cascade, Gaussian, s = 501, non-truncated",
    "best_truncated": "cascade, Gaussian, best s > 0, truncated",
    "best_noised": "cascade, Gaussian, best s > 0, non-truncated", "blur": "cascade, blur",
    "unlabelled": "as s = 501 non-truncated, last stage without labels",
}  # fmt: skip
STEPS = {"4steps": "4", "25steps": "25", "100steps": "100"}
KINDS = ("generated", "truncated", "non-truncated", "real low-res")


def read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def figure(results: Any, key: str, against: str) -> Any:
    return next(f for f in results["figures"] if (f["key"], f["against"]) == (key, against))


def cells(values: list[float | None], digits: int) -> str:
    """The values of the seeds, apart by a slash; a dash where there is none."""
    return " / ".join("–" if value is None else f"{value:.{digits}f}" for value in values)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def arms(seeds: list[Path], names: dict[str, str]) -> str:
    """A row per arm: distances, precision and recall, and the classification accuracy score with its control."""
    head = ["arm", "FD train", "FD val", "KD val", "precision", "recall", "CAS top-1", "of the control"]
    rows = []
    for arm, title in names.items():
        found = [read(seed / "evaluations" / arm / "results.json") for seed in seeds]
        cas = [read(seed / "cas" / arm / "results.json") for seed in seeds]
        if not any(found):
            continue

        def of(key: str, against: str, found: list[Any] = found) -> list[float | None]:
            return [None if f is None else figure(f, key, against)["value"] for f in found]

        kernel = " / ".join(
            "–" if f is None else f"{1000 * (k := figure(f, 'kd', 'val'))['value']:.0f} ± {1000 * k['spread']:.0f}"
            for f in found
        )
        top1 = [None if c is None else 100 * c["generated"]["top1"]["mean"] for c in cas]
        ratio = [None if c is None else c["ratio"]["top1"]["mean"] for c in cas]
        rows.append([
            title, cells(of("fd", "train"), 2), cells(of("fd", "val"), 2), kernel, cells(of("precision", "val"), 2),
            cells(of("recall", "val"), 2), cells(top1, 1), cells(ratio, 2),
        ])  # fmt: skip
    return table(head, rows)


def levels(seeds: list[Path]) -> str:
    """The distance over s by kind of low-resolution input."""
    searches = [read(seed / "search" / "results.json") for seed in seeds]
    every = sorted({row["s"] for search in searches if search for row in search["rows"]})
    rows = []
    for s in every:
        line = [str(s)]
        for kind in KINDS[1:]:
            values = [value_at(search, s, kind) for search in searches if search]
            line.append(cells(values, 2))
        rows.append(line)
    return table(["s", *KINDS[1:]], rows)


def value_at(search: Any, s: int, kind: str) -> float | None:
    kinds = (kind,) if kind == "real low-res" else (kind, "generated")
    rows = [row for row in search["rows"] if row["s"] == s and row["kind"] in kinds and not row["compared"]]
    return rows[0]["figures"][0]["value"] if rows else None


def best(search: Path, kind: str) -> dict[str, Any]:
    """The row of least distance at s > 0 on generated input of one kind."""
    rows = read(search / "results.json")["rows"]
    return min((row for row in rows if row["s"] and row["kind"] == kind), key=lambda row: row["figures"][0]["value"])


def inception(seeds: list[Path]) -> str:
    """FID and KID with the canonical network, where measured."""
    rows = []
    for arm, title in ARMS.items():
        found = [read(seed / "inception" / arm / "results.json") for seed in seeds]
        if any(found):
            kid = " / ".join("–" if f is None else cells_with_spread(figure(f, "kd", "val")) for f in found)
            fid = [None if f is None else figure(f, "fd", "val")["value"] for f in found]
            rows.append([title, cells(fid, 2), kid])
    return table(["arm", "FID val", "1000 KID val"], rows) if rows else ""


def cells_with_spread(kernel: Any) -> str:
    return f"{1000 * kernel['value']:.1f} ± {1000 * kernel['spread']:.1f}"


def plot(root: Path, names: list[str], path: Path) -> None:
    """One panel a data set: the distance over s, a line per kind and seed."""
    canvas = Figure(figsize=(5 * len(names), 3.6), layout="constrained")
    panels = canvas.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for number, seed in enumerate(sorted((root / name).glob("[0-9]*"))):
            search = read(seed / "search" / "results.json")
            if not search:
                continue
            for kind, style, colour in zip(KINDS[1:], ("o-", "s--", "^:"), ("C0", "C1", "C2"), strict=True):
                grid = sorted({row["s"] for row in search["rows"]})
                values = [(s, v) for s in grid if (v := value_at(search, s, kind)) is not None]
                label = kind if number == 0 else None
                axes.plot(*zip(*values, strict=True), style, color=colour, label=label, alpha=1 - 0.4 * number)
        axes.set(title=f"{name}, 32x32 from 8x8", xlabel="s", ylabel="Fréchet distance (small CNN)")
        axes.set_ylim(bottom=0)
        axes.legend()
    canvas.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--best", choices=["truncated", "non-truncated"])
    arguments = parser.parse_args()
    if arguments.best:
        print(best(arguments.root, arguments.best)["folders"][0])
        return
    names = sorted(folder.name for folder in arguments.root.iterdir() if folder.is_dir())
    if not names:
        raise SystemExit(f"{arguments.root} holds no data set: make -f experiments/study.mk makes them")
    for name in names:
        seeds = sorted((arguments.root / name).glob("[0-9]*"))
        print(f"### {name}, seeds {', '.join(seed.name for seed in seeds)}\n")
        print(arms(seeds, ARMS))
        searched = [seed / "search" for seed in seeds if (seed / "search" / "results.json").is_file()]
        chosen = {kind: " / ".join(str(best(search, kind)["s"]) for search in searched) for kind in KINDS[1:3]}
        print("Best s > 0: " + "; ".join(f"{kind} {found}" for kind, found in chosen.items()) + "\n")
        print(levels(seeds))
        print(inception(seeds))
        print(arms(seeds, {name: f"last stage at {steps} steps" for name, steps in STEPS.items()}))
    if arguments.plot:
        plot(arguments.root, names, arguments.plot)


if __name__ == "__main__":
    main()
