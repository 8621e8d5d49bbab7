"""The page of an evaluation, read back with a parser: what it says, what it must not say, and that it stands alone."""

import base64
import re
from dataclasses import dataclass, replace
from html.parser import HTMLParser

import matplotlib.figure
import pytest
import torch
from evaluations import figure

from cdm_lightning.evaluation.metrics.measurements import Accuracy
from cdm_lightning.evaluation.report import paper_results as paper
from cdm_lightning.evaluation.report.figure_tables import cas_table, figures_table, format_number, paper_table
from cdm_lightning.evaluation.report.line_chart import plot
from cdm_lightning.evaluation.report.page import Command, Drawing, render_page, size_of, write_page
from cdm_lightning.evaluation.report.pictures import level_slider, neighbours_grid, stages_grid
from cdm_lightning.evaluation.report.results import settings_table
from cdm_lightning.evaluation.search import level_tables
from cdm_lightning.evaluation.search.level_tables import cost_curve, gap_table, level_curves
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import decode_png, encode_png

VOID = {"meta", "link", "img", "source", "input", "br"}
OWN = "Fréchet distance (fashion-cnn-64)"
FOREIGN_NAMES = r"\b(FID|KID|IS|Inception)\b"
EVIL = '"><script>alert(1)</script>&amp;'


class Reader(HTMLParser):
    """Checks that every element is closed in order, and keeps tags, texts and the cells of tables."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts, self.tables, self.style = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.style += data
        elif self.open and self.open[-1] != "script":
            self.texts.append(data)
            if {"td", "th"} & set(self.open):
                self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def read(blocks):
    """A page of these blocks alone, read back."""
    return Reader(render_page("", [("", blocks)]))


@dataclass(frozen=True)
class Row:
    stage: str
    s: int
    kind: str
    sampler: str
    steps: int
    calls: float
    figures: list


def level(s, kind, value, spread=0.03, sampler="dpm++", steps=25, **others):
    return Row("sr16", s, kind, sampler, steps, 50.0, [figure(value, spread, **others)])


def levels():
    kinds = ("truncated", "non-truncated", "real low-res")
    found = {0: (7.31, 7.32, 5.99), 501: (7.05, 7.37, 6.26)}
    return [level(s, kind, value) for s, values in found.items() for kind, value in zip(kinds, values, strict=True)]


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (3, 1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, images):
    """A page with every block, each fed with text that would be markup if it were not escaped."""
    png = encode_png(images[0].permute(1, 2, 0).numpy())
    rows = levels()
    path = tmp_path_factory.mktemp("page") / "page.html"
    sections = [
        (f"Figures {EVIL}", figures_table([figure(note=EVIL), figure(0.4031, None, "recall", EVIL)], EVIL)),
        ("Beside the paper", paper_table(64, [figure(name=EVIL)])),
        ("Accuracy", cas_table([Accuracy(EVIL, 100, 51.25, 75.5, 0.25, EVIL)], EVIL, 128)),
        ("Levels", level_curves([replace(row, sampler=EVIL) for row in rows])),
        ("Gap", gap_table(rows)),
        ("Nothing", neighbours_grid([])),
        ("Stages", stages_grid([(EVIL, [images[0], png])], EVIL)),
        ("Slider", level_slider({0: png, 501: png}, 501, EVIL)),
        ("Neighbours", neighbours_grid([(png, [images[1], images[2]], [0.5, 1.25], True)], EVIL)),
        ("How", [{EVIL: EVIL}, Command(f"cdm evaluate\n{EVIL}"), EVIL, Drawing(png, EVIL, png, EVIL)]),
    ]
    write_page(path, f"Title {EVIL}", sections, lead=EVIL)
    assert [other.name for other in path.parent.iterdir()] == ["page.html"]
    return Reader(path.read_text(encoding="utf-8"))


# -- the document


def test_the_page_needs_nothing_beside_it(whole):
    links = [
        (tag, key, v) for tag, a in whole.tags for key, v in a.items() if key in ("src", "href", "srcset", "action")
    ]
    assert {tag for tag, _, _ in links} == {"a", "img", "source", "link"}
    for tag, key, value in links:
        assert value.startswith("#" if tag == "a" else "data:"), (tag, key, value[:60])
    assert whole.style and "url(" not in whole.style and "@import" not in whole.style
    policy = next(a["content"] for a in whole.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "http" not in policy


def test_the_contents_lead_to_every_section_that_has_something(whole):
    headings = ["Beside the paper", "Accuracy", "Levels", "Gap", "Stages", "Slider", "Neighbours", "How"]
    ids = [attributes["id"] for _, attributes in whole.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert [a["href"][1:] for a in whole.all("a")] == [a["id"] for a in whole.all("section")]
    assert {a["aria-labelledby"] for a in whole.all("section")} == {a["id"] for a in whole.all("h2")}
    assert len(whole.all("section")) == 1 + len(headings) and len(whole.all("h1")) == 1
    assert all(heading in whole.text for heading in headings) and "Nothing" not in whole.text


def test_a_page_of_empty_blocks_has_no_contents(tmp_path):
    blocks = [
        figures_table([]), cas_table([], "ResNet-50"), level_curves([]), gap_table([]), cost_curve([]), stages_grid([]),
        neighbours_grid([]), level_slider({}), [{}], [Command("")], [""], [],
    ]  # fmt: skip
    write_page(tmp_path / "page.html", "Empty", [(f"part {i}", block) for i, block in enumerate(blocks)])
    empty = Reader((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert not empty.all("section") and not empty.all("nav") and empty.text == "Empty Empty"


def test_text_stays_text(whole):
    assert len(whole.all("script")) == 1  # the slider's
    assert not any("onerror" in a or "alert(1)" in a for _, attributes in whole.tags for a in attributes)
    assert whole.texts.count(EVIL) >= 12 and "<script>alert(1)</script>&amp;, generated, 16 × 16" in str(
        whole.all("img")
    )
    evil = read(stages_grid([("<script>", [torch.zeros(3, 8, 8, dtype=torch.uint8)])]))
    assert not evil.all("script") and evil.tables[0][1][0] == "<script>"


def test_pictures_have_alternatives_and_heads_have_scopes(whole):
    assert all(a["alt"].strip() for a in whole.all("img")) and all(a["scope"] for a in whole.all("th"))
    assert all(a.get("class") in ("pixels", None) for a in whole.all("img"))
    regions = [attributes for attributes in whole.all("div") if "scroll" in attributes.get("class", "").split()]
    assert len(regions) == len(whole.tables) == len(whole.all("caption"))
    assert all((a["role"], a["tabindex"]) == ("region", "0") and a["aria-label"].strip() for a in regions)
    assert "image-rendering: pixelated" in whole.style and "prefers-color-scheme: dark" in whole.style


# -- figures


@pytest.mark.parametrize(
    ("value", "spread", "text"),
    [
        (7.05, None, "7.05"), (7.05, 0.1, "7.05 ± 0.10"), (128.8, None, "128.80"),
        (0.00312, 0.00004, "0.003120 ± 0.000040"),
        (0.4031, None, "0.403"), (-0.00012, None, "−0.000120"), (12345.6, 1.97, "12,345.60 ± 1.97"),
        (0.0, 0.0, "0.00 ± 0.00"), (float("nan"), None, "nan"),
    ],
)  # fmt: skip
def test_numbers_show_the_digits_they_have(value, spread, text):
    assert format_number(value, spread) == text


def test_every_figure_is_shown_with_what_its_spread_is_over():
    figures = [
        figure(note="n = 500 is small"),
        figure(0.00312, 0.0004, "kd", "kernel distance", spread_of="100 subsets of 500", note="n = 500 is small"),
        figure(0.712, None, "precision", "precision (fashion-cnn-64)", spread_of=""),
        figure(6.812, 0.21, "is", "Inception Score", spread_of="10 splits", against="", n=50000, n_reference=0),
    ]
    shown = read(figures_table(figures))
    assert shown.tables[0][1:] == [
        [OWN, "7.050 ± 0.080", "3 disjoint seeds", "validation set", "lower", "500", "3,000"],
        ["kernel distance", "0.00312 ± 0.00040", "100 subsets of 500", "validation set", "lower", "500", "3,000"],
        ["precision (fashion-cnn-64)", "0.712", "–", "validation set", "higher", "500", "3,000"],
        ["Inception Score", "6.81 ± 0.21", "10 splits", "–", "higher", "50,000", "–"],
    ]
    assert shown.text.count("n = 500 is small") == 1
    aligned = [attributes.get("class") for attributes in shown.all("td")[:6]]
    assert aligned == ["number", None, None, None, "number", "number"]


def test_another_detector_is_never_called_fid(images):
    rows = [*levels(), level(251, "truncated", 0.0031, None, key="kd", name="kernel distance (fashion-cnn-64)")]
    score = figure(2.5, None, "is", "class-entropy score (fashion-cnn-64)")
    shown = read([*figures_table([figure(), score]), *level_curves(rows, rows[0]), *gap_table(rows)])
    assert OWN in shown.text and not re.search(FOREIGN_NAMES, shown.text)
    assert not any(re.search(FOREIGN_NAMES, a.get("alt", "")) for a in shown.all("img"))
    beside = read(paper_table(64, [figure(7.05, None), score]))
    head, ours, cdm = beside.tables[0][:3]
    assert head[4:] == [f"{OWN}, validation set", "class-entropy score (fashion-cnn-64)"]
    assert ours == ["measured here", "–", "–", "–", "7.05", "2.50"] and cdm[4:] == ["–", "–"]
    assert (
        f"{OWN}, {score.name}: not measured with the canonical Inception, so the columns do not compare" in beside.text
    )


def test_a_canonical_figure_stands_in_the_papers_columns():
    inception = [
        figure(9.31, 0.06, name="FID", against="train", n=50_000), figure(10.02, None, name="FID", n=50_000),
        figure(41.2, 0.9, "is", "Inception Score", spread_of="10 splits", against="", n=50_000),
        figure(0.7, None, "precision", "precision (inception)"),
    ]  # fmt: skip
    shown = read(paper_table(256, inception))
    assert shown.tables[0][:3] == [
        ["model", "FID, training set", "FID, validation set", "Inception Score"],
        ["measured here", "9.310 ± 0.060", "10.02", "41.20 ± 0.90"],
        ["paper: CDM", "4.88", "4.63", "158.71 ± 2.26"],
    ]
    assert "compare" not in shown.text and "FID: 3 disjoint seeds; Inception Score: 10 splits" in shown.text
    few = read(paper_table(256, [replace(inception[0], n=10_000)]))
    assert "Measured here on 10,000 generated images, in the paper on 50,000" in few.text
    assert "no figures at 16 × 16" in read(paper_table(16, inception)).text


def test_accuracies_stand_beside_the_papers_only_where_told_to():
    rows = [Accuracy("generated", 15000, 71.25, None, 0.25, "3 seeds"), Accuracy("real", 15000, 90.5, 99.5)]
    plain = read(cas_table(rows, "ResNet-18"))
    assert plain.tables[0][1:] == [
        ["generated", "15,000", "71.25 ± 0.25", "–", "3 seeds"],
        ["real", "15,000", "90.50", "99.50", "–"],
    ]
    beside = read(cas_table(rows, "ResNet-18", 128))
    assert ["paper: HAM", "–", "54.05", "77.33", "–"] in beside.tables[0] and "do not compare" in beside.text
    assert "do not compare" not in read(cas_table(rows, "ResNet-50", 128)).text


# -- levels


def test_the_levels_are_a_plot_and_a_table_with_the_chosen_one_marked():
    rows = levels()
    shown = read(level_curves(rows, rows[3]))
    assert shown.tables[0] == [
        ["s", "truncated", "non-truncated", "real low-res", "± one standard deviation over", "n generated"],
        ["0", "7.310 ± 0.030", "7.320 ± 0.030", "5.990 ± 0.030", "3 disjoint seeds", "500"],
        ["501", "chosen 7.050 ± 0.030", "7.370 ± 0.030", "6.260 ± 0.030", "3 disjoint seeds", "500"],
    ]
    assert shown.tables[1][2] == ["501", "50", "50", "50"] and len(shown.all("mark")) == 1
    assert len(shown.all("picture")) == 1 and size_of(payload(shown.all("img")[0]["src"])) == (748, 504)
    plain = read(level_curves(rows))
    assert "chosen" not in plain.text and not plain.all("mark")
    alone = read(level_curves([level(0, "truncated", 7.0, None)]))  # a column without content is not shown
    assert alone.tables[0] == [["s", "truncated", "n generated"], ["0", "7.00", "500"]]
    assert shown.text.index("more figures") > shown.text.index("7.050 ± 0.030") and len(shown.all("details")) == 1


def test_samplers_and_single_levels_share_no_plot():
    rows = [*levels(), level(0, "truncated", 6.9, steps=50), level(501, "truncated", 6.8, steps=50)]
    assert len(read(level_curves(rows)).all("picture")) == 2
    shown = read(level_curves([*levels(), level(0, "truncated", 6.9, sampler="ddpm")]))
    assert len(shown.all("picture")) == 1 and "ddpm with 25 steps" in shown.text and "6.900" in shown.text


def test_the_plot_draws_the_ring_and_the_error_bars():
    lines = {"truncated": [(0, 7.3, 0.3), (501, 7.0, 0.3)], "real low-res": [(0, 6.0, None), (501, 6.2, None)]}
    bare = {name: [(s, value, None) for s, value, _ in points] for name, points in lines.items()}
    made = [
        plot(lines, ("truncated", 501), OWN, "light"), plot(lines, ("truncated", 0), OWN, "light"),
        plot(lines, None, OWN, "light"), plot(bare, None, OWN, "light"), plot(bare, None, OWN, "dark"),
        plot(bare, None, r"distance ($\nothing$)", "light"),
    ]  # fmt: skip
    assert len(set(made)) == 6 and plot(lines, ("truncated", 77), OWN, "light") == made[2]


def test_the_plot_does_not_magnify_small_differences(monkeypatch):
    seen = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda canvas, *_, **__: seen.append(canvas.axes[0]))
    plot({"a": [(0, 7.3, 0.3), (9, 7.0, None)]}, None, OWN, "light", floor=("as many real images", 0.5))
    plot({"a": [(0, 0.1, 0.3), (9, 0.0, None)]}, None, OWN, "light")
    assert seen[0].get_ylim()[0] == 0 and seen[1].get_ylim()[0] < -0.2
    assert [line.get_ydata()[0] for line in seen[0].lines if line.get_label() == "as many real images"] == [0.5]


def test_settings_are_a_table_and_no_json():
    cards = [{"split": "val", "made": {"date": "now"}, "sha": "5d" * 32, "counts": [1], "levels": [4, 9]}, {"n": None}]
    shown = read(settings_table("Cards", [*cards, {"split": "train", "levels": list(range(99))}]))
    assert shown.tables == [[
        ["setting", "1", "3"], ["split", "val", "train"], ["made, date", "now", "–"],
        ["sha", "5d5d5d5d5d5d5d5d …", "–"], ["levels", "4, 9", "99 values"], ["n", "–", "–"],
    ]]  # fmt: skip
    assert settings_table("Cards", []) == []


def test_the_gap_is_generated_minus_real():
    recall = dict(key="recall", name="recall")
    rows = [
        level(0, "truncated", 7.31, 0.03), level(0, "real low-res", 5.99, 0.04),
        level(501, "truncated", 6.0, None), level(501, "real low-res", 6.26, 0.03),
        level(501, "truncated", 6.0, sampler="ddpm"), level(77, "truncated", 6.0),  # without real input to compare
        level(0, "truncated", 0.9, 0.1, **recall), level(0, "real low-res", 0.8, 0.1, **recall),  # no distances
    ]  # fmt: skip
    shown = read(gap_table(rows))
    assert len(shown.tables) == 1 and shown.tables[0][1:] == [
        ["0", "truncated", "7.310 ± 0.030", "5.990 ± 0.040", "1.320 ± 0.050", "3 disjoint seeds"],
        ["501", "truncated", "6.000", "6.260 ± 0.030", "−0.260", "3 disjoint seeds"],
    ]
    assert gap_table([level(0, "truncated", 7.3)]) == []


# -- pictures


def payload(source):
    return base64.b64decode(source.removeprefix("data:image/png;base64,"))


def pixels_of(source):
    return torch.from_numpy(decode_png(payload(source))).permute(2, 0, 1)


def test_pictures_keep_every_pixel(images):
    colour = torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    shown = read(stages_grid([("dog", [images[0], colour])]))
    assert shown.tables[0] == [["class", "16 × 16", "32 × 32"], ["dog", "", ""]]
    for source, image in zip(shown.all("img"), (images[0], colour), strict=True):
        assert torch.equal(pixels_of(source["src"]), image) and source["style"] == "--wide:128px"


def test_neighbours_are_in_order_and_copies_are_called_so(images):
    rows = [(images[0], [images[1], images[2]], [0.5, 1.25], True), (images[2], [images[1]], [2.0], False)]
    rows.append((images[1], [], [], False))
    shown = read(neighbours_grid(rows, "features of fashion-cnn-64"))
    assert shown.tables[0] == [
        ["generated", "nearest", "nearest 2"], ["copy", "0.500", "1.25"], ["generated", "2.00", "–"],
        ["generated", "–", "–"],
    ]  # fmt: skip
    order = [images[i] for i in (0, 1, 2, 2, 1, 1)]
    assert all(torch.equal(pixels_of(a["src"]), image) for a, image in zip(shown.all("img"), order, strict=True))
    assert (
        "1 of the 3 images shown" in shown.text
        and [a.get("class") for a in shown.all("tr")][1:] == ["marked", None, None]
        and "distance in features of fashion-cnn-64" in shown.text
    )


def test_the_slider_shows_every_level_without_a_script(images):
    pngs = {s: encode_png(images[i].permute(1, 2, 0).numpy()) for i, s in enumerate((501, 0, 251))}
    shown = read(level_slider(pngs, start=251))
    assert [int(a["data-s"]) for a in shown.all("figure")] == [0, 251, 501]
    assert [payload(a["src"]) for a in shown.all("img")] == [pngs[0], pngs[251], pngs[501]]
    assert shown.all("input")[0]["value"] == "1" and "hidden" in next(a for a in shown.all("p") if "hidden" in a)
    assert all(f"Samples at s = {s}" in shown.text for s in pngs)


@pytest.mark.parametrize("picture", [b"GIF89a", torch.zeros(1, 8, 8), torch.zeros(8, 8, dtype=torch.uint8)])
def test_what_is_no_picture_is_refused(picture):
    with pytest.raises(InputError, match="a picture"):
        stages_grid([("dog", [picture])])


# -- the paper, typed a second time: FID against train, against val, Inception Score; top-1, top-5


def test_the_papers_figures_are_the_papers():
    fidelity = """
        32 CDM 1.11 1.99 26.01±0.59
        64 CDM 1.48 2.48 67.95±1.97 | 64 BigGAN-deep 4.06 | 64 Improved_DDPM 2.92 | 64 ADM 2.07
        128 CDM 3.52 3.76 128.80±2.51 | 128 BigGAN-deep 5.7 - 124.5 | 128 BigGAN-deep,_max_IS 25 - 253
        128 LOGAN 3.36 - 148.2 | 128 ADM 5.91
        256 CDM 4.88 4.63 158.71±2.26 | 256 BigGAN-deep 6.9 - 171.4 | 256 BigGAN-deep,_max_IS 27 - 317
        256 VQ-VAE-2 31.11 | 256 Improved_DDPM 12.26 | 256 SR3 11.30 | 256 ADM 10.94 - 100.98
        256 ADM,_upsampling 7.49 - 127.49"""
    accuracy = """
        128 real_images 68.82 88.79 | 128 BigGAN-deep 40.64 64.44 | 128 HAM 54.05 77.33 | 128 CDM 59.84 81.79
        256 real_images 73.09 91.47 | 256 BigGAN-deep 42.65 65.92 | 256 VQ-VAE-2 54.83 77.59 | 256 CDM 63.02 84.06"""
    assert flat(paper.TABLE_1A) == typed(fidelity, ("fid_train", "fid_val", "is"))
    assert flat(paper.TABLE_1B) == typed(accuracy, ("top1", "top5"))
    ablations = {r: [list(a.values()) for a in of.values()] for r, of in paper.ABLATIONS.items()}
    assert ablations == {
        64: [["2.35", "6.02", "3.41", "2.13"], ["1.71", "1.48"]],
        256: [["6.18", "5.75", "5.00", "4.88"]],
    }


def flat(tables):
    return {
        (r, model, key): v.replace(" ", "") for r, t in tables.items() for model, f in t.items() for key, v in f.items()
    }


def typed(text, keys):
    found = {}
    for entry in text.replace("\n", "|").split("|"):
        resolution, model, *values = entry.split() or [0, ""]
        known = {key: value for key, value in zip(keys, values, strict=False) if value != "-"}
        found |= {(int(resolution), model.replace("_", " "), key): value for key, value in known.items()}
    return found


@pytest.mark.parametrize("resolution", [32, 64, 128, 256])
def test_the_page_shows_all_the_paper_has_at_a_resolution(resolution):
    shown = read(paper_table(resolution, []) + cas_table([Accuracy("generated", 9, 1.0)], "x", resolution))
    cells = {cell for table in shown.tables for row in table for cell in row}
    for table in (paper.TABLE_1A, paper.TABLE_1B, paper.ABLATIONS):
        known = {value for figures in table.get(resolution, {}).values() for value in figures.values()}
        assert known <= cells


def test_the_generated_point_at_s_0_belongs_to_both_curves(monkeypatch):
    drawn = []
    monkeypatch.setattr(level_tables, "line_chart", lambda *given, **more: drawn.append((*given, more)))
    rows = [level(0, "generated", 9.0), level(0, "real low-res", 5.0), level(251, "real low-res", 6.0)]
    rows += [level(251, "truncated", 8.0), level(251, "non-truncated", 7.0)]
    shown = read(level_curves(rows, rows[0], ("500 real images", 0.5)))
    lines, mark, *_, more = drawn[0]
    assert {kind: [(s, value) for s, value, _ in points] for kind, points in lines.items()} == {
        "generated input, truncated": [(0, 9.0), (251, 8.0)], "generated input, non-truncated": [(0, 9.0), (251, 7.0)],
        "real input": [(0, 5.0), (251, 6.0)],
    }  # fmt: skip
    assert mark == ("generated input, truncated", 0) and more["floor"] == ("500 real images", 0.5)
    assert [line[:4] for line in shown.tables[0][1:]] == [
        ["0", "chosen 9.000 ± 0.030", "chosen 9.000 ± 0.030", "5.000 ± 0.030"],
        ["251", "8.000 ± 0.030", "7.000 ± 0.030", "6.000 ± 0.030"],
    ]


def test_samplers_and_steps_are_one_table_and_one_plot_over_calls(monkeypatch):
    drawn = []
    monkeypatch.setattr(level_tables, "line_chart", lambda *given: drawn.append(given))
    rows = [replace(level(501, "truncated", 9.0, sampler="ddpm", steps=4), calls=29)]
    rows += [replace(level(501, "truncated", 8.0, sampler="dpm++", steps=10), calls=35)]
    shown = read(cost_curve(rows))
    assert shown.tables == [[
        ["sampler", "steps", "calls", f"{OWN} against the validation set"],
        ["ddpm", "4", "29", "9.000 ± 0.030"], ["dpm++", "10", "35", "8.000 ± 0.030"],
    ]]  # fmt: skip
    assert drawn[0][0] == {"ddpm": [(29, 9.0, 0.03)], "dpm++": [(35, 8.0, 0.03)]}
    assert cost_curve([]) == []
