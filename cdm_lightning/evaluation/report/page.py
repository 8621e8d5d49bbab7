"""The page that an evaluation leaves: one HTML file that needs nothing beside it, from blocks that are strings.

A block that has nothing to show is the empty string, and `write_page` leaves its section out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cdm_lightning.evaluation.metrics.figures import Accuracy, Figure, against, spreads
from cdm_lightning.evaluation.report import paper
from cdm_lightning.evaluation.report.elements import escape, notes, number, paragraph, table
from cdm_lightning.evaluation.report.levels import Level, costs, curves, gap_table
from cdm_lightning.evaluation.report.pictures import level_slider, neighbours_grid, picture, stages_grid
from cdm_lightning.foundation.files import write_atomically

__all__ = [
    "Level", "cas_table", "commands", "costs", "curves", "facts", "figures_table", "gap_table", "level_slider", 
    "neighbours_grid", "paper_table", "picture", "stages_grid", "write_page",
]  # fmt: skip
CANONICAL = ("FID", "KID", "Inception Score")  # names that belong to the canonical Inception alone
BETTER = {"fd": "lower", "kd": "lower", "precision": "higher", "recall": "higher", "is": "higher"}
STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"  # nothing is fetched
)


def figures_table(figures: Sequence[Figure], caption: str = "Measured figures") -> str:
    """Each figure with its spread, what the spread is over, and what was compared; nothing where there are none."""
    if not figures:
        return ""
    heads = ["measure", "value", "± one standard deviation over", "against", "better", "n generated", "n real"]
    rows = [
        [f.name, number(f.value, f.spread), f.spread_of if f.spread is not None else "", against(f),
         BETTER.get(f.key, ""), f"{f.n:,}", f"{f.n_reference:,}" if f.n_reference else ""]
        for f in figures
    ]  # fmt: skip
    return table(caption, heads, rows, numeric=(1, 5, 6)) + notes(figures)


def paper_table(resolution: int, figures: Sequence[Figure]) -> str:
    """The measured FID and Inception Score beside the paper's and its baselines'; for ImageNet at that resolution.

    A figure of another detector gets a column of its own under its own name, and the page says that it compares with
    none. Says so where the paper has no figures at this resolution.
    """
    if resolution not in paper.TABLE_1A:
        return paragraph(f"The paper has no figures at {resolution} × {resolution}.")
    columns = {"FID, training set": "fid_train", "FID, validation set": "fid_val", "Inception Score": "is"}
    measured: dict[str, list[str]] = {}
    for f in figures:
        if f.key in ("fd", "is"):
            place = f"{f.name}, {against(f)}" if f.key == "fd" and f.against else f.name
            measured.setdefault(place, []).append(number(f.value, f.spread))
    others = [name for name in measured if name not in columns]
    heads = ["model", *columns, *others]
    rows: list[list[object]] = [["measured here", *(", ".join(measured.get(name, [])) for name in heads[1:])]]
    for model, known in reversed(paper.TABLE_1A[resolution].items()):
        rows.append([f"paper: {model}", *(known.get(key, "") for key in columns.values()), *[""] * len(others)])
    caption = f"Class-conditional ImageNet at {resolution} × {resolution}"
    made: str = table(caption, heads, rows, numeric=range(1, len(heads)), marked=[0])
    made += paragraph(" ".join(cautions([f for f in figures if f.key in ("fd", "is")])))
    for title, ablation in paper.ABLATIONS.get(resolution, {}).items():
        made += table(f"In the paper: {title}", ["setting", "FID, training set"], list(ablation.items()), numeric=[1])
    return made + paragraph(f"Source: {paper.SOURCE}. Its ± is over 10 splits.")


def cautions(figures: Sequence[Figure]) -> list[str]:
    """What keeps measured figures from comparing with the paper's, and what their spread is."""
    said, over = [], spreads(figures)
    foreign = dict.fromkeys(f.name for f in figures if f.name not in CANONICAL)
    if foreign:
        said.append(f"{', '.join(foreign)}: not measured with the canonical Inception, so the columns do not compare.")
    few = ", ".join(f"{n:,}" for n in sorted({f.n for f in figures if f.name in CANONICAL and f.n != paper.N}))
    if few:
        said.append(
            f"Measured here on {few} generated images, in the paper on {paper.N:,}: another n moves the figures."
        )
    return [*said, f"± here: one standard deviation over {over}."] if over else said


def cas_table(rows: Sequence[Accuracy], classifier: str, resolution: int | None = None) -> str:
    """Classification accuracy scores; nothing where there are none.

    classifier: what was trained, such as "ResNet-50". resolution: for ImageNet, to show the paper's beside ours.
    """
    if not rows:
        return ""
    heads = ["trained on", "n", "top-1, %", "top-5, %", "± one standard deviation over"]
    lines: list[list[object]] = [
        [row.trained_on, f"{row.n:,}", number(row.top1, row.spread), "" if row.top5 is None else number(row.top5),
         row.spread_of if row.spread is not None else ""]
        for row in rows
    ]  # fmt: skip
    known = paper.TABLE_1B.get(resolution, {}) if resolution else {}
    lines += [[f"paper: {name}", "", cas["top1"], cas["top5"], ""] for name, cas in known.items()]
    caption = f"Accuracy on real validation images of a {classifier} trained on each set"
    made: str = table(caption, heads, lines, numeric=(1, 2, 3), marked=range(len(rows)) if known else ())
    if known and classifier != paper.CLASSIFIER:
        made += paragraph(
            f"The paper trains a {paper.CLASSIFIER}: its rows do not compare with those of a {classifier}."
        )
    return made + (paragraph(f"Source: {paper.SOURCE}.") if known else "")


def facts(known: Mapping[str, str]) -> str:
    """What was measured with what: date, versions, detector and SHA-256, seeds, n; nothing where there is none."""
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in known.items())
    return f'<dl class="facts">\n{lines}</dl>\n' if known else ""


def commands(lines: Sequence[str]) -> str:
    """The commands that made the page, one after another; nothing where there are none."""
    text = "\n".join(lines)
    return f'<pre tabindex="0"><code>{escape(text)}</code></pre>\n' if lines else ""


def write_page(path: Path, title: str, sections: Sequence[tuple[str, str]], lead: str = "") -> None:
    """Write one HTML file that asks for nothing else: a title, a lead sentence, contents, and the sections.

    sections: (heading as text, the HTML of its blocks); a section without HTML is left out.
    """
    kept = [(f"section-{index}", *section) for index, section in enumerate(sections, 1) if section[1].strip()]
    contents = "".join(f'<li><a href="#{key}">{escape(heading)}</a></li>\n' for key, heading, _ in kept)
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-heading">\n<h2 id="{key}-heading">{escape(heading)}</h2>\n{block}'
        f"</section>\n"
        for key, heading, block in kept
    )
    nav = f'<nav aria-label="Contents">\n<ol>\n{contents}</ol>\n</nav>\n' if kept else ""
    document = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{escape(title)}</h1>\n{f'<p>{escape(lead)}</p>' if lead else ''}\n</header>\n"
        f"{nav}<main>\n{body}</main>\n</body>\n</html>\n"
    )
    write_atomically(Path(path), document.encode())
