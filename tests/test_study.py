"""The study's runner does what its list says, refuses one that cannot run, and its tables are in the docs."""

import json
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import ROOT

from cdm_lightning import stages
from cdm_lightning.__main__ import main
from cdm_lightning.planning.flops import training_flops


@pytest.fixture(scope="module")
def runner():
    """The names that the runner's program defines."""
    return runpy.run_path(str(ROOT / "experiments" / "study"))


def study(*arguments):
    """A process of the study's runner, finished."""
    command = [sys.executable, "experiments/study", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize("data", ["cifar", "cifar_wide"])  # what fashion has, cifar has
def test_every_command_of_the_study_is_understood(data, runner, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    plan = ["--plan", "experiments/study/wide/study.yaml"] if data == "cifar_wide" else []
    monkeypatch.setattr("sys.argv", ["study", data, "1", "--list", *plan])
    runner["main"]()
    listed = capsys.readouterr().out.replace("{best of base16}", "2001")
    lines = [shlex.split(line) for line in listed.splitlines()]
    ours = [words[1:] for words in lines if words[0] == "cdm"]
    assert {words[0] for words in ours} == {"fit", "bundle", "reference", "search", "sample", "evaluate", "cas"}
    together = {}  # every option of a command in one call, with a value that it has somewhere
    for words in ours:
        options = {word if word.startswith("--config=") else word.partition("=")[0]: word for word in words[1:]}
        together.setdefault(words[0], {}).update(options)
    for command, options in together.items():
        with pytest.raises(SystemExit) as stop:
            main([command, *options.values(), "--print_config"])
        assert stop.value.code == 0, (command, capsys.readouterr().err)


def test_the_single_model_of_the_study_costs_what_the_cascade_costs():
    flops = {}
    for name in ("base16", "sr32", "base32"):
        config = yaml.safe_load((ROOT / "experiments" / "study" / f"{name}.yaml").read_text())
        kind = config["model"]["class_path"].rpartition(".")[2]
        stage = getattr(stages, kind)(**config["model"]["init_args"])
        flops[name] = config["trainer"]["max_steps"] * training_flops(stage.unet)
    assert flops["base32"] == pytest.approx(flops["base16"] + flops["sr32"], rel=0.005)


def test_a_stopped_study_runs_what_is_missing(runner, tmp_path, capsys):
    """A task that fails stops those that need it alone; what is finished, or only served known figures, is not run."""
    broken = tmp_path / "broken"
    note = f"import pathlib, sys; open({str(tmp_path / 'ran')!r}, 'a').write(sys.argv[1])"
    fail = f"sys.exit(3 * (sys.argv[1] == 'b' and pathlib.Path({str(broken)!r}).exists()))"

    def task(letter, *needs, found=None):
        results = {
            "made": {"date": "today", "versions": "1"},
            "figures": [{"key": "fd", "value": 5, "spread": 1, "n": 9}],
        }
        write = f"pathlib.Path({str(found)!r}).write_text({json.dumps(results)!r})" if found else "pass"
        commands = [[sys.executable, "-c", f"{note}; {write}; {fail}", letter]]
        return runner["Task"](commands, list(needs), {"it": found.parent} if found else {})

    def run(jobs=1, **changed):
        (tmp_path / "ran").write_text("")
        found = [tmp_path / f"{name}.results" / "results.json" for name in "xy"]
        for path in found:
            path.parent.mkdir(exist_ok=True)
        tasks = {
            "a": task("a"), "b": task("b", "a"), "c": task("c"), "x": task("x", "b", found=found[0]),
            "y": task("y", "c", found=found[1]), **changed,
        }  # fmt: skip
        study = runner["Study"](tasks, tmp_path / "run", tmp_path / "results.json")
        return study.measure(["x", "y"], jobs), (tmp_path / "ran").read_text()

    broken.touch()
    assert run() == (["b"], "abcy")
    kept = json.loads((tmp_path / "results.json").read_text())["y"]["it"]["figures"]
    assert kept == [{"key": "fd", "value": 5, "spread": 1, "n": 9}]
    broken.unlink()
    assert run() == ([], "bx")
    (tmp_path / "run" / "done" / "a").unlink()  # on another machine: the figures are known, so nothing is wanted
    capsys.readouterr()
    assert run() == ([], "")
    assert f"2 of 2 measurements are in {tmp_path / 'results.json'} already" in capsys.readouterr().out
    assert run(y=task("Y", "c", found=tmp_path / "y.results" / "results.json")) == ([], "Y")  # its command has changed
    failed, ran = run(c=task("C"))  # begun by another command: it would resume what that left
    assert (failed, ran) == (["c"], "") and "c was begun by other commands or recipes" in capsys.readouterr().err


def test_the_tables_of_the_results_are_what_the_stored_figures_print(monkeypatch, tmp_path):
    """Every table that `tables.py` prints is in docs/results.md, word for word; the picture is drawn from the same."""
    command = [sys.executable, "experiments/study/tables.py", "--picture", str(tmp_path / "curves.png")]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert printed.returncode == 0, printed.stderr
    rows = [line for line in printed.stdout.splitlines() if line.startswith("|")]
    page = (ROOT / "docs" / "results.md").read_text()
    assert len(rows) > 5 and [row for row in rows if row not in page] == []
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_a_table_gives_each_seed_its_place():
    tables = runpy.run_path(str(ROOT / "experiments" / "study" / "tables.py"))

    def found(*points):
        rows = [
            {"stage": "sr32", "s": s, "kind": kind, "sampler": "dpm++", "steps": 10, "compared": False,
             "figures": [{"value": value, "spread": 0.1}]}
            for s, kind, value in points
        ]  # fmt: skip
        return {"search base16": {"search": {"rows": rows}, "base": {"figures": [{"value": 7.0, "spread": 0.2}]}}}

    first = found((0, "generated", 4.0), (0, "real low-res", 1.0), (9, "non-truncated", 3.0), (9, "real low-res", 2.0))
    second = found((0, "generated", 5.0))
    line = list(tables["growth"]([first, second]))[2]
    assert line.startswith("| all | 7.00 ± 0.20 / 7.00 ± 0.20 | 4.00 ± 0.10 / 5.00 ± 0.10 | 9 / 0 | ")
    assert line.endswith(" | 3.00 ± 0.10 / 5.00 ± 0.10 | 25 % / 0 % |")
    assert list(tables["growth"]([second]))[2].endswith(" | 0 | 5.00 ± 0.10 | 0 % |")
    assert list(tables["curve"]([first, second]))[2:] == [
        "| 0 | 1.00 ± 0.10 | – | – | – | 4.00 ± 0.10 / 5.00 ± 0.10 |",
        "| 9 | 2.00 ± 0.10 | – | – | – | 3.00 ± 0.10 |",
    ]
    assert list(tables["curve"]([second, first]))[3] == "| 9 | – / 2.00 ± 0.10 | – | – | – | – / 3.00 ± 0.10 |"
    alone = {"search at_9": {"search": {"rows": found((9, "real low-res", 2.0))["search base16"]["search"]["rows"]}}}
    tables["arms"].__globals__["ARMS"]["at_9"] = "one level"
    alone["search mine"] = alone["search at_9"]  # of a plan of one's own: by its own name
    assert "| mine | 2.00 ± 0.10 (s = 9) | – | – | – | – |" in list(tables["arms"]([alone]))
    assert "| one level | 2.00 ± 0.10 (s = 9) | – | – | – | – |" in list(tables["arms"]([alone]))


PLAN = {
    "data": {"shipped": {"root": "data/fashion", "channels": 1, "detector": "fashion-cnn-64"}},
    "trainings": {"base16": {"recipe": "base16", "trainer.max_steps": 2}, "sr32": {"recipe": "sr32"}},
    "searches": {"base16": {"stages": ["base16", "sr32"], "levels": [1001], "base": True, "repeats": 2}},
    "samples": {"drawn": {"stages": ["base16", "sr32"], "seeds": [0], "count": 20}},
}


def refusal(runner, monkeypatch, capsys, *arguments):
    """The last line that the runner prints as it refuses its arguments."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["study", *arguments])
    with pytest.raises(SystemExit) as stop:
        runner["main"]()
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def changed(part, name, **entry):
    return {**PLAN, part: {**PLAN[part], name: {**PLAN[part].get(name, {}), **entry}}}


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ({**PLAN, "searchs": {}}, "the plan: searchs is none of data, levels,"),
        ({**PLAN, "trainings": {}}, "trainings is missing"),
        ({**PLAN, "samples": [1]}, "samples must be a mapping of names to mappings"),
        (changed("data", "shipped", detectr="x"), "data shipped: detectr is none of root,"),
        (changed("data", "more", root="x"), "data more: channels is missing"),
        (changed("data", "shipped", detector="nope"), "nope"),
        (changed("trainings", "sr32", recipe="sr33"), "training sr32: recipe experiments/study/sr33.yaml is missing"),
        (changed("trainings", "sr32", after="sr32"), "without a circle, and gives sr32"),
        (changed("trainings", "sr32", after="sr31"), "after must name another training"),
        (changed("searches", "base16", stages=["base16", "sr64@160"]), "stage sr64@160 is none of the trainings"),
        (changed("searches", "base16", level=[1]), "search base16: level is none of stages, base, shards,"),
        (changed("searches", "more", n=3), "more: stages must be a list of trainings"),
        (changed("searches", "base16", stages=[]), "base16: stages must be a list of trainings"),
        (changed("searches", "base16", stages=["sr32"]), "base: true measures samples of 16x16"),
        (changed("searches", "base16", repeats=None), "repeats must be a whole number, not None"),
        (changed("searches", "base16", levels="[{best of it}]"), "{best of ...} is for the levels of samples"),
        (changed("searches", "drawn", stages=["base16"]), "samples drawn: a search has that name"),
        (changed("samples", "drawn", seeds=0), "seeds must be a list such as [0, 1, 2], not 0"),
        (changed("data", "shipped", detector=5), "detector must be a name or a path, not 5"),
        ({**PLAN, "sampled": {"leves": [1]}}, "sampled: leves is none of shards,"),
        ({**PLAN, "sampled": None}, "sampled must be a mapping"),
        ({**changed("searches", "more", stages=["base16"]), "sampled": {"repeats": None}}, "whole number, not None"),
        (changed("searches", "drawn", stages=[], base=True), "drawn: stages must be a list of trainings"),
        (changed("samples", "drawn", levels=[0]), "levels must be text"),
        (changed("samples", "drawn", levels="[{best of it}]"), "it is none of the searches"),
        ({**PLAN, "recipe": "nope.yaml"}, "recipe nope.yaml is missing"),
        ({**PLAN, "recipe": None}, "recipe None is missing"),
    ],
)
def test_a_list_that_cannot_run_is_refused_at_once(plan, sentence, runner, tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(plan))
    assert sentence in refusal(runner, monkeypatch, capsys, "shipped", "0", "--plan", str(path), "--list")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["fashion", "0", "--plan", "nope.yaml"], "nope.yaml is missing"),
        (["fashion", "0", "--only", "("], "--only (: "),
        (["fashion", "0", "--jobs", "0"], "--jobs"),
        (["nothing", "0"], "nothing is none of the data of experiments/study/study.yaml: fashion, cifar"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments, sentence, runner, monkeypatch, capsys):
    assert sentence in refusal(runner, monkeypatch, capsys, *arguments, "--list")


def test_a_plan_of_ones_own_has_its_own_folders_and_recipes(runner, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = tmp_path / "a recipe.yaml"
    recipe.write_text("model: {init_args: {lr: 1.0e-3}}")
    (tmp_path / "mine.yaml").write_text(json.dumps({**PLAN, "recipe": str(recipe)}))
    lines = study("shipped", "3", "--plan", str(tmp_path / "mine.yaml"), "--list").stdout.splitlines()
    assert all("runs/study/mine/shipped/3" in line for line in lines if line.startswith("cdm"))
    base = next(line for line in lines if line.startswith("cdm evaluate") and "low_res" in line)
    assert "base16-seed1" in base and "base16-seed2" not in base  # as many as the search repeats
    tasks = runner["tasks_of"](runner["read_plan"](tmp_path / "mine.yaml"), "shipped", 3, tmp_path)
    signed = runner["Study"](tasks, tmp_path, tmp_path / "results.json").signature
    before = signed("samples drawn")
    recipe.write_text("model: {init_args: {lr: 0.5}}")
    assert signed("samples drawn") != before


def test_stored_figures_are_of_the_commands_and_recipes_that_are_listed(runner, monkeypatch):
    monkeypatch.chdir(ROOT)
    own, wide = (runner["read_plan"](runner["HERE"] / name) for name in ("study.yaml", "wide/study.yaml"))
    stored = sorted((runner["HERE"] / "results").glob("*.json"))
    for path in stored:
        data, seed = path.stem.split("-")
        tasks = runner["tasks_of"](own if data in own["data"] else wide, data, int(seed), Path("runs/study"))
        study_ = runner["Study"](tasks, ROOT / "none", path)
        unsigned = {name for name, found in study_.found.items() if not found["signature"]}  # from a log: made anew
        assert {name for name in study_.found if not study_.finished(name)} == unsigned
        assert all(set(study_.found[name]["commands"]) <= set(study_.text(name).splitlines()) for name in unsigned)
        assert unsigned <= {f"search base16@{step}" for step in (150, 300, 600)}
    assert len(stored) > 3
