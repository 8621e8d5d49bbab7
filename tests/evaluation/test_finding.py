"""The finding of a search: a sentence that the rows support, and a picture of the stored samples themselves."""

from pathlib import Path

import pytest
import torch
from evaluations import figure
from PIL import Image
from small_models import smallest_stages

from cdm_lightning.cascade.bundle import write_bundle
from cdm_lightning.data.shards import read_manifest
from cdm_lightning.evaluation.metrics.measurements import Figure
from cdm_lightning.evaluation.real_images import real_images_for_labels
from cdm_lightning.evaluation.report.stored_samples import read_pictures
from cdm_lightning.evaluation.search.finding import draw_side_by_side, finding, rows_side_by_side
from cdm_lightning.evaluation.search.level_search import Row
from cdm_lightning.evaluation.search.search import search

OWN = "Fréchet distance (fashion-cnn-64)"
ONE_SEED = "one seed of 500 images, so no error bars."
NON, CUT, REAL, BOTH = "non-truncated", "truncated", "real low-res", "generated"


def row(s, kind, value, spread=None, stage="sr32", compared=False, lower=0):
    seeds = 3 if spread else 1
    return Row(stage, 32, s, [lower, s], kind, "dpm++", 10, 30, [figure(value, spread)], ["samples"] * seeds, compared)


def said(chosen, *rows, kind=None):
    """The sentence, where another stage and the comparison of samplers lie far lower."""
    kind = kind or (NON if chosen.kind == BOTH else chosen.kind)
    others = [row(9, NON, 0.1, stage="sr16"), row(0, REAL, 0.2, stage="sr16"), row(9, NON, 0.1, compared=True)]
    return finding([*others, *rows], chosen, kind)


def test_noise_that_helps():
    best = row(2001, NON, 5.60)
    rows = [row(0, BOTH, 6.39), row(0, REAL, 3.67), row(1001, NON, 6.0), row(1001, CUT, 5.1), best]
    assert said(best, *rows, row(2001, REAL, 5.22)) == (
        f"Conditioning augmentation helped sr32: on generated input the {OWN} falls from 6.39 at s = 0 to 5.60 at "
        "s = 2001 (non-truncated), which closes 29 % of the cascade gap of 2.72 "
        f"(real input: 3.67 at s = 0, 5.22 at s = 2001); {ONE_SEED}"
    )


def test_noise_that_does_not_help():
    zero = row(0, BOTH, 5.0)
    rows = [zero, row(0, REAL, 4.0), row(1001, NON, 5.8), row(1001, CUT, 5.7), row(2001, CUT, 5.9), row(1001, REAL, 5)]
    assert said(zero, *rows, kind=CUT) == (
        f"Conditioning augmentation did not help sr32: on generated input the {OWN} is least at s = 0, 5.00; the best "
        "s > 0, 1001 (truncated), gives 5.70; the cascade gap at s = 0 is 1.00 "
        f"(real input: 4.00 at s = 0, 5.00 at s = 1001); {ONE_SEED}"
    )


@pytest.mark.parametrize(
    ("zero", "value", "verdict", "change"),
    [
        (
            6.2,
            6.0,
            "No clear gain from conditioning augmentation in",
            "of 0.20 ± 0.50, within twice the spread over seeds;",
        ),
        (
            6.0,
            6.9,
            "No clear gain from conditioning augmentation in",
            "of 0.90 ± 0.50, within twice the spread over seeds;",
        ),
        (7.1, 6.0, "Conditioning augmentation helped", "falls from 7.10 ± 0.30 at s = 0 to 6.00 ± 0.40 at s = 9 ("),
        (6.0, 7.1, "Conditioning augmentation did not help", "is least at s = 0, 6.00 ± 0.30; the best s > 0, 9 ("),
    ],
)
def test_a_difference_is_compared_with_the_spread_over_seeds(zero, value, verdict, change):
    rows = [row(0, BOTH, zero, 0.3), row(9, CUT, value, 0.4)]
    sentence = said(min(rows, key=lambda r: r.figures[0].value), *rows, kind=CUT)
    assert sentence.startswith(f"{verdict} sr32: ") and change in sentence
    assert sentence.endswith("; ± is one standard deviation over 3 disjoint seeds of 500 images.")


def test_one_seed_shows_no_difference_of_a_few_per_cent():
    rows = [row(0, BOTH, 6.00), row(9, NON, 5.75), row(0, REAL, 4.0)]
    assert said(rows[1], *rows) == (
        f"No clear gain from conditioning augmentation in sr32: on generated input the {OWN} is 5.75 at s = 9 "
        "(non-truncated) and 6.00 at s = 0, a difference of 0.25, less than 5 %; the cascade gap at s = 0 is 2.00 "
        f"(real input: 4.00 at s = 0); {ONE_SEED}"
    )


def test_the_sentence_is_of_the_chosen_kind_of_sampling():
    rows = [row(0, BOTH, 5.0), row(9, CUT, 4.0), row(9, NON, 6.0)]
    assert "did not help sr32" in said(rows[0], *rows, kind=NON) and "helped sr32" in said(rows[0], *rows, kind=CUT)


def test_a_gap_within_its_spread_is_not_closed():
    rows = [row(0, BOTH, 6.0, 0.03), row(9, NON, 5.8, 0.04), row(0, REAL, 5.99, 0.04)]
    assert "; there is no clear cascade gap to close, as real input gives 5.990 ± 0.040 at s = 0; ± is" in said(
        rows[1], *rows
    )


def test_without_real_input_there_is_no_gap():
    rows = [row(0, BOTH, 6.39), row(2001, NON, 5.60)]
    assert said(rows[1], *rows) == (
        f"Conditioning augmentation helped sr32: on generated input the {OWN} falls from 6.39 at s = 0 to 5.60 at "
        f"s = 2001 (non-truncated); {ONE_SEED}"
    )


def test_without_s_0_there_is_nothing_to_compare_with():
    rows = [row(6, NON, 5.1), row(6, REAL, 4.0), row(10, NON, 5.5)]
    assert said(rows[0], *rows) == (
        "What conditioning augmentation did to sr32 is not known, as s = 0 was not measured: on generated input the "
        f"{OWN} is least at s = 6, 5.10 (4.00 on real input); {ONE_SEED}"
    )


def test_each_kind_of_sampling_has_its_own_s_0_behind_a_stage_with_noise():
    rows = [row(0, CUT, 7.0, lower=9), row(0, NON, 6.0, lower=7), row(4, CUT, 6.5, lower=9), row(4, NON, 5.0, lower=7)]
    assert "falls from 7.00 at s = 0 to 6.50 at s = 4 (truncated);" in said(rows[2], *rows)
    assert "falls from 6.00 at s = 0 to 5.00 at s = 4 (non-truncated);" in said(rows[3], *rows)
    assert rows_side_by_side(rows, rows[2]) == [rows[1], rows[3]]
    assert rows_side_by_side(rows[::2], rows[2]) == [rows[0], rows[2]]


def test_the_best_level_above_stands_beside_a_chosen_s_of_0():
    rows = [row(0, BOTH, 5.0), row(4, NON, 6.0), row(9, NON, 5.5), row(9, CUT, 5.4), row(9, REAL, 4.0)]
    assert rows_side_by_side(rows, rows[0]) == [rows[0], rows[2]]


# -- the files of a search


@pytest.fixture(scope="module")
def found(tmp_path_factory, few_real):
    """A search of a cascade 8 -> 16 with every kind of input."""
    root = tmp_path_factory.mktemp("finding")
    write_bundle(root / "bundle", smallest_stages(), {"classes": read_manifest(few_real / "val" / "32").classes})
    options = {"n": 20, "block_size": 20, "detector": "fashion-cnn-64", "levels": [4, 9], "seed": 3}
    return root / "out", search(root / "bundle", root / "out", few_real, **options)


def tiles(path, columns, cell=96, gap=2):
    """The images of a grid of ten rows, with their row and column. Texts lie above them and to their left."""
    sheet = Image.open(path)
    left, top = sheet.width - columns * (cell + gap) + gap, sheet.height - 10 * (cell + gap) + gap
    assert sheet.mode == "RGB" and left > 20 and top > 20 and sheet.getpixel((0, 0)) == (255, 255, 255)
    for y in range(10):
        for x in range(columns):
            corner = (left + x * (cell + gap), top + y * (cell + gap))
            yield y, x, sheet.crop((*corner, corner[0] + cell, corner[1] + cell))


def is_enlarged(tile, image):
    """Whether a tile is a grey image (1, R, R), enlarged."""
    small = Image.fromarray(image[0].numpy()).convert("RGB")
    return tile.tobytes() == small.resize(tile.size, Image.Resampling.NEAREST).tobytes()


def test_the_picture_shows_the_stored_samples(found, few_real, tmp_path):
    out, results = found
    rows = [Row(**{**r, "figures": [Figure(**f) for f in r["figures"]]}) for r in results["rows"]]
    chosen = Row(**{**results["chosen"], "figures": [Figure(**f) for f in results["chosen"]["figures"]]})
    s = rows_side_by_side(rows, chosen)[1].s
    real = real_images_for_labels(torch.arange(10), few_real, "val", 16)
    stored = {
        kind: next(out.glob(f"points/sr16-{kind}-*/train/16"))
        for kind in ("generated-s0", f"non-truncated-s{s}", f"truncated-s{s}")
    }
    read = {kind: read_pictures(folder, range(10)) for kind, folder in stored.items()}
    columns = [read_pictures(out / "low_res" / "base8-seed3" / "train" / "8", range(10)), read["generated-s0"]]
    shown = [*columns, read[f"non-truncated-s{s}"], list(real)]
    for y, x, tile in tiles(out / "levels.png", 4):
        assert is_enlarged(tile, shown[x][y]), (y, x)
    only = [r for r in rows if r.kind != NON]  # no finished low-resolution images
    draw_side_by_side(tmp_path / "few.png", rows_side_by_side(only, chosen), chosen, [], few_real, "val")
    shown = [read["generated-s0"], read[f"truncated-s{s}"], list(real)]
    for y, x, tile in tiles(tmp_path / "few.png", 3):
        assert is_enlarged(tile, shown[x][y]), (y, x)


def test_the_page_leads_with_the_finding(found):
    out, results = found
    page, sentence = (out / "report.html").read_text(), results["conclusion"]
    header = page[page.index("<header>") : page.index("</header>")]
    assert sentence.replace(">", "&gt;") in header
    order = ["<header>", "data:image/png", "<dt>cascade gap</dt>", 'type="range"', "<table>"]
    places = [page.index(part, page.index("<header>")) for part in order]
    assert places == sorted(places)
    assert "{" not in page[page.index("How it was made</h2>") :]  # settings are a table
    chart = Image.open(out / "curve.png")
    assert chart.size == (748, 504) and chart.convert("RGBA").getextrema()[3] == (255, 255)
    assert results["floor"] > 0 and f"20 real images, {results['floor']:,.2f}" in page
    assert not list(Path(out).glob("*.partial"))
