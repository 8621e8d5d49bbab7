"""Sweeps: every combination is a command that the real CLI takes, and a sweep ends in one table, online or offline."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb
import yaml
from commands import QUICK, ROOT
from PIL import Image
from refusals import sentence_of_refusal
from wandb import wandb_agent

from cdm_lightning.__main__ import main
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.stopping import Stopped, ending_with_a_sentence
from cdm_lightning.planning.sweep import grid, read_sweep, run_to_end, sweep, trial_command, trial_id

SWEEPS = {"level": 10, "augmentation": 5, "blur": 9, "lr": 5}  # and how many combinations each has
FOLDER = ROOT / "experiments" / "sweeps"

RUN = """
import os, pathlib, sys
values = dict(word[2:].split("=") for word in sys.argv[1:])
run = pathlib.Path(os.environ["CDM_SWEEP_FOLDER"], os.environ["WANDB_RUN_ID"])
if values["y"] == "stop":
    print("usage: cdm", "cdm: error: y says stop", sep=chr(10), file=sys.stderr)
    sys.exit(2)
starts = len(list(run.glob("logs/*")))
log = run / f"logs/version_{starts}/metrics.csv"
log.parent.mkdir(parents=True)
log.write_text(f"step,val/loss,train/loss\\n0,99,\\n1,,7\\n2,{values['x']},\\n")
"""


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CDM_SWEEP_FOLDER", "unset")  # which a sweep sets: this puts it back afterwards


@pytest.fixture
def small(tmp_path):
    """A function that writes a sweep whose runs log x as val/loss at once, and stop where y says so."""
    (tmp_path / "run.py").write_text(RUN)

    def write(**changes) -> Path:
        config = {
            "program": str(tmp_path / "run.py"),
            "method": "grid",
            "metric": {"name": "val/loss", "goal": "minimize"},
            "parameters": {"x": {"values": [0.5, 0.25, 1.0]}, "y": {"value": "on"}},
            "command": ["${env}", "${interpreter}", "${program}", "${args}"],
        }
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in {**config, **changes}.items() if v is not None}))
        return path

    return write


def rows(out: Path) -> list[dict]:
    return json.loads((out / "results.json").read_text())["rows"]


def test_all_sweeps_are_known():
    assert sorted(SWEEPS) == sorted(p.stem for p in FOLDER.glob("*.yaml") if p.stem != "defaults")


def covering(combinations: list[dict]) -> list[dict]:
    """So few of them that every value of every parameter is among them."""
    chosen, seen = [], set()
    for combination in combinations:
        values = {(key, str(value)) for key, value in combination.items()}
        if not values <= seen:
            chosen.append(combination)
            seen |= values
    return chosen


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", SWEEPS)
def test_every_value_reaches_the_configuration(name, every, capsys, monkeypatch):
    """The command line takes it, the swept values arrive, and every run has a folder of its own.

    every: each combination of them.
    """
    monkeypatch.setenv("CDM_SWEEP_FOLDER", f"runs/sweeps/{name}")
    file, folders = FOLDER / f"{name}.yaml", set()
    config = read_sweep(file)
    combinations = grid(file, config)
    assert len({trial_id(config, parameters) for parameters in combinations}) == SWEEPS[name]
    chosen = combinations if every else covering(combinations)
    for parameters in chosen:
        run = trial_id(config, parameters)
        monkeypatch.setenv("WANDB_RUN_ID", run)
        words = trial_command(config, parameters)
        assert words[:4] == ["/usr/bin/env", sys.executable, "-m", "cdm_lightning"]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([*words[4:], "--print_config"])
        printed = yaml.safe_load(capsys.readouterr().out)
        assert stop.value.code == 0
        for key, value in parameters.items():
            where, option = key.split(".")
            assert where == "model" and printed["model"]["init_args"][option] == yaml.safe_load(str(value))
            kind = {"max_level": "gaussian", "blur_sigma": "blur", "blur_probability": "blur"}.get(option)
            assert kind is None or printed["model"]["init_args"]["augmentation"] == kind  # else the value does nothing
        folder = f"runs/sweeps/{name}/{run}"
        loggers = {logger["class_path"].split(".")[-1]: logger["init_args"] for logger in printed["trainer"]["logger"]}
        assert printed["trainer"]["default_root_dir"] == folder and len(loggers) == 2
        assert {init_args["save_dir"] for init_args in loggers.values()} == {folder}
        assert loggers["CSVLogger"]["name"] == "logs" and loggers["WandbLogger"]["name"] is None
        assert loggers["WandbLogger"]["project"] == config["project"]
        savers = [c["init_args"] for c in printed["trainer"]["callbacks"] if c["class_path"].endswith("Checkpoint")]
        assert all(saver["dirpath"] is None for saver in savers) and len(savers) == (name != "level")  # in its folder
        folders.add(folder)
    assert len(folders) == len(chosen)


def test_the_grid_is_the_product_of_the_values():
    config = {"method": "grid", "parameters": {"a": {"values": [1, 2]}, "b": {"value": 3}, "c": {"values": ["u", "v"]}}}
    expected = [(1, 3, "u"), (1, 3, "v"), (2, 3, "u"), (2, 3, "v")]
    assert grid(Path("f"), config) == [dict(zip("abc", values, strict=True)) for values in expected]


def test_the_command_is_that_of_wandbs_agent(monkeypatch, tmp_path):
    """The agent itself, given what its server would send: the same words but for Python's name, and the id."""
    started = {}
    monkeypatch.setattr(wandb_agent, "AgentProcess", lambda **kwargs: started.update(kwargs) or SimpleNamespace())
    for key in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_SWEEP_ID"):
        monkeypatch.setenv(key, "before")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for name in SWEEPS:
        file = FOLDER / f"{name}.yaml"
        config = read_sweep(file)
        parameters = grid(file, config)[-1]
        agent = wandb_agent.Agent(None, None, sweep_id="s")
        agent._sweep_command = list(config["command"])
        args = {key: {"value": value} for key, value in parameters.items()}
        agent._command_run({"run_id": "abc", "program": config["program"], "args": args})
        ours = trial_command(config, parameters)
        assert started["command"] == ["python" if word == sys.executable else word for word in ours]
        assert started["env"]["WANDB_RUN_ID"] == "abc"


def written_by(record, expected, seconds=300):
    """The bytes of a W&B file once they hold `expected`: its service writes on for a moment after the run has ended."""
    until = time.monotonic() + seconds
    while expected not in (content := record.read_bytes()) and time.monotonic() < until:
        time.sleep(0.2)
    return content


@pytest.mark.parametrize("rates", [[1.0e-4], pytest.param([1.0e-4, 1.0e-1], marks=pytest.mark.long)])
def test_trainings_offline(tmp_path, monkeypatch, capsys, rates):
    """Each trains from its own start and leaves an offline run of W&B, and a second call runs nothing."""
    config = yaml.safe_load((FOLDER / "lr.yaml").read_text())
    config["parameters"]["model.lr"]["values"] = rates
    file, out = tmp_path / "lr.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(config))
    options = [word for word in QUICK if "logger" not in word]
    arguments = shlex.join(["--config", str(ROOT / "tests" / "reduced.yaml"), *options, "--trainer.max_steps=2"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["sweep", "--file", str(file), "--offline", "true", "--out", str(out), f"--arguments={arguments}"]
    main([*command, "--count", "1"])
    notes = [("", False), ("not run yet", True)]
    assert [(row["note"], row["value"] is None) for row in rows(out)] == notes[: len(rates)]
    if len(rates) > 1:
        main(command)
    found = rows(out)
    assert sorted(row["parameters"]["model.lr"] for row in found) == rates
    assert [row["value"] for row in found] == sorted({row["value"] for row in found})  # best first
    for row in found:
        run = out / row["run"]
        with (run / "logs" / "version_0" / "metrics.csv").open() as lines:
            assert row["value"] == [float(line["val/loss"]) for line in csv.DictReader(lines) if line["val/loss"]][-1]
        assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
        (record,) = run.glob("wandb/offline-run-*/run-*.wandb")
        value = json.dumps(row["parameters"]["model.lr"]).encode()
        content = written_by(record, b"model.lr = " + value)
        assert b"\x08model.lr\x82\x01" + bytes([len(value)]) + value in content  # the run's config, as protobuf has it
        assert b"model.lr = " + value in content  # its name
    written = (out / "results.json").read_bytes()
    with Image.open(out / "sweep.png") as picture:
        assert min(picture.size) > 300
    capsys.readouterr()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a finished combination was run again"))
    main(command)
    said = capsys.readouterr().out
    assert (out / "results.json").read_bytes() == written
    assert all(word in said for word in ("model.lr", "val/loss (minimize)", *(row["run"] for row in found)))


def test_the_table_is_sorted_by_the_goal(small, tmp_path, capsys):
    out = tmp_path / "out"
    begun = sweep(small(), True, out, count=1)["rows"]
    assert [(row["note"], row["value"]) for row in begun] == [("", 0.5), ("not run yet", None), ("not run yet", None)]
    capsys.readouterr()
    assert [row["value"] for row in sweep(small(), True, out)["rows"]] == [0.25, 0.5, 1.0]  # the last value of each log
    said = capsys.readouterr().out
    assert said.index("0.25") < said.index("│ 0.5 ") < said.index("│ 1.0 ")
    upwards = {"name": "val/loss", "goal": "maximize"}
    assert [row["value"] for row in sweep(small(metric=upwards), True, out)["rows"]] == [1.0, 0.5, 0.25]
    assert len(list(out.glob("*/logs/version_*"))) == 3  # another metric or goal asks for no other run
    diverged = sweep(small(parameters={"x": {"values": ["nan", 2.0]}, "y": {"value": "on"}}), True, out)["rows"]
    assert [(row["value"], row["note"]) for row in diverged] == [(2.0, ""), (None, "val/loss is nan")]


def test_a_failing_run_is_named_and_the_others_still_run(small, tmp_path, capsys):
    file = small(parameters={"x": {"values": [0.5, 0.25]}, "y": {"values": ["stop", "on"]}})
    sentence = sentence_of_refusal(
        capsys, ["sweep", "--file", str(file), "--offline", "true", "--out", str(tmp_path / "out")]
    )
    assert sentence.startswith("2 of 4 runs failed: x = 0.5, y = stop (exit code 2: y says stop); x = 0.25, y = stop")
    found = rows(tmp_path / "out")
    assert [(row["value"], row["failed"]) for row in found] == [(0.25, False), (0.5, False), (None, True), (None, True)]
    assert found[2]["note"] == "exit code 2: y says stop" and (tmp_path / "out" / "sweep.png").is_file()
    sentence_of_refusal(capsys, ["sweep", "--file", str(file), "--offline", "true", "--out", str(tmp_path / "out")])
    assert len(list((tmp_path / "out").glob("*/logs/version_*"))) == 2  # only the failed ones were tried again


def test_a_changed_configuration_or_bundle_is_another_run(tmp_path):
    (tmp_path / "a.yaml").write_text("1")
    config = {
        "program": "p",
        "command": ["--config", str(tmp_path / "a.yaml"), f"--model.bundle={tmp_path}", "${args}"],
    }
    names = [trial_id(config, {"x": 1}), trial_id(config, {"x": 2})]
    (tmp_path / "a.yaml").write_text("2")
    names.append(trial_id(config, {"x": 1}))
    (tmp_path / "bundle.json").write_text("{}")
    names += [trial_id(config, {"x": 1}), trial_id({**config, "command": [*config["command"], "--y=1"]}, {"x": 1})]
    assert len(set(names)) == 5
    (tmp_path / "a.yaml").write_text("1")
    (tmp_path / "bundle.json").unlink()
    assert trial_id(config, {"x": 1}) == names[0]


@pytest.mark.parametrize(
    "changes, options, sentence",
    [
        ({"metric": None}, [], "small.yaml names no metric"),
        ({"metric": {"name": "val/loss", "goal": "least"}}, [], "is 'least': it must be minimize or maximize"),
        ({"method": "bayes"}, [], "asks for method 'bayes', which W&B's server carries out: offline takes grid alone"),
        ({"parameters": {"x": {"min": 0, "max": 1}}}, [], "parameter x of"),
        ({"parameters": None}, [], "has no parameters to sweep"),
        ({"command": ["${env}"]}, [], "has no command with ${args} in it"),
        ({"metric": {"name": "val/los"}}, [], "never logged the metric 'val/los': it logged train/loss, val/loss"),
        ({}, ["--count", "0"], "count 0 is less than 1"),
        ({}, ["--offline", "false"], "WANDB_MODE is offline, so that no run would reach W&B's server"),
    ],
)
def test_refusals(capsys, small, tmp_path, monkeypatch, changes, options, sentence):
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "out"
    command = ["sweep", "--file", str(small(**changes)), "--offline", "true", "--out", str(out), *options]
    assert sentence in sentence_of_refusal(capsys, command)
    assert not (out / "results.json").exists()


def test_an_unknown_sweep_is_refused_with_those_there_are(capsys):
    command = ["sweep", "--file", "experiments/sweeps/levels.yaml", "--offline", "true"]
    assert "levels.yaml does not exist: beside it are augmentation, blur, level, lr" in sentence_of_refusal(
        capsys, command
    )


def test_online_ends_in_the_same_table(monkeypatch, tmp_path):
    """With stand-ins for W&B's server and its agent."""
    made = {}
    states = [("a", 0.3, "finished", 2.5), ("b", 0.1, "finished", 1.5), ("c", 0.2, "crashed", None)]
    runs = [
        SimpleNamespace(id=i, state=state, config={"model.lr": lr, "other": 1}, summary_metrics={"val/loss": value})
        for i, lr, state, value in states
    ]

    def agent(sweep_id, count):
        made.update(agent=sweep_id, count=count, path=os.environ["PATH"], folder=os.environ["CDM_SWEEP_FOLDER"])

    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name in ("PATH", "WANDB_AGENT_DISABLE_FLAPPING"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(wandb, "sweep", lambda config: made.update(config) or "s1")
    monkeypatch.setattr(wandb, "agent", agent)
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(sweep=lambda i: SimpleNamespace(runs=runs)))
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"1 of 3 runs failed: model.lr = 0.2 \(crashed\)"):
        sweep(FOLDER / "lr.yaml", out=out, count=3, arguments="--trainer.max_steps 5")
    found = [(row["run"], row["value"], row["note"]) for row in rows(out)]
    assert found == [("b", 1.5, ""), ("a", 2.5, ""), ("c", None, "crashed")]
    assert (made["agent"], made["count"], made["folder"], made["project"]) == ("s1", 3, str(out), "cdm_lightning")
    assert made["command"][-3:] == ["${args}", "--trainer.max_steps", "5"]
    assert made["path"].split(os.pathsep)[0] == str(Path(sys.executable).parent)  # where the agent looks for `python`
    assert (out / "sweep.png").is_file()


def test_online_without_a_login_is_one_sentence(capsys, monkeypatch, tmp_path):
    def nobody(config):
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setenv("WANDB_AGENT_DISABLE_FLAPPING", "true")
    monkeypatch.setattr(wandb, "sweep", nobody)
    sentence = sentence_of_refusal(capsys, ["sweep", "--file", str(FOLDER / "lr.yaml"), "--out", str(tmp_path)])
    assert "Use `wandb login` to log in. (`--offline true` runs it without W&B's server)" in sentence


def test_a_sweep_that_is_told_to_stop_lets_the_run_in_hand_save_itself(capsys):
    saving = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); print(flush=True); time.sleep(60)"
    run = subprocess.Popen([sys.executable, "-c", saving], stdout=subprocess.PIPE)
    run.stdout.readline()
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Stopped), ending_with_a_sentence():
        run_to_end(run)
    assert run.returncode == 143
    assert capsys.readouterr().err == "SIGTERM: what is written stays, and the same command goes on\n"
