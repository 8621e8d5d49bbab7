"""Printed tables: every name is whole, in a file, a pipe and a narrow terminal alike."""

import io

import pytest
from evaluations import figure
from rich.console import Console

from cdm_lightning.evaluation.cas.report import print_table
from cdm_lightning.evaluation.report.results import print_figures
from cdm_lightning.foundation.terminal import folding_table
from cdm_lightning.planning.sweep_report import Trial, report

NAME = "Fréchet distance (a-detector-of-a-name-that-takes-half-of-a-terminal)"
OVER = "100 subsets of 1000"


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):  # which make a terminal of anything
        monkeypatch.delenv(name, raising=False)


def test_figures_are_one_line_each_where_there_is_no_terminal(capsys):
    print_figures([figure(name=NAME, spread_of=OVER, against="a-card-of-a-long-name", note="few " * 30 + "images")])
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if NAME in line]
    assert OVER in line and "a-card-of-a-long-name" in line and len(line) > 120
    assert any("few " * 30 + "images" in line for line in lines)


def test_a_sweep_and_a_score_are_whole(tmp_path, capsys):
    parameters = {f"model.init_args.parameter_number_{number}": "x" * 20 for number in range(4)}
    report(tmp_path, {}, f"test/fd_{NAME}", "minimize", [Trial(parameters, "abcdefgh", 1.5)])
    said = capsys.readouterr().out
    assert all(name in said for name in parameters) and f"test/fd_{NAME} (minimize)" in said and "…" not in said
    one = {"mean": 0.5, "sd": 0.1}
    kinds = {kind: {"top1": one, "top5": one} for kind in ("generated", "real")}
    about = {"recipe": {"architecture": "resnet8", "steps": 1}, "n": 5, "resolution": 8, "n_validation": 5}
    print_table({**kinds, **about, "ratio": {"top1": one, "top5": None}, "seeds": list(range(40))})
    assert f"seeds {list(range(40))}" in capsys.readouterr().out


def test_a_narrow_terminal_folds_a_name():
    table, out = folding_table("figure", "value"), io.StringIO()
    table.add_row(NAME.replace(" ", "_"), "1.5")
    Console(file=out, width=30, force_terminal=True, color_system=None).print(table)
    cells = [line.split("│")[1].strip() for line in out.getvalue().splitlines() if "│" in line]
    assert "".join(cells) == NAME.replace(" ", "_")
