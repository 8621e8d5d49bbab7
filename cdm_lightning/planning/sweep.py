"""`cdm sweep`: run a W&B sweep file, on W&B's server or offline on this machine, and print one table of results."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cdm_lightning.foundation.errors import InputError, split_arguments
from cdm_lightning.foundation.files import check_output_folder, write_atomically
from cdm_lightning.planning.sweep_report import Trial, report

# wandb is imported where it is used: on import it may fix its mode, which `cdm fit` has to choose first.


def sweep(
    file: Path, offline: bool = False, out: Path | None = None, count: int | None = None, arguments: str = ""
) -> dict[str, Any]:
    """Run every combination of a W&B sweep file, and print them as one table, best first.

    Writes results.json and sweep.png, and a folder for each run. Offline, finished combinations are not run again, and
    a stopped one continues. Online, each call makes a new W&B sweep.

    Args:
        file: A W&B sweep file, such as experiments/sweeps/level.yaml.
        offline: Run the grid on this machine, one offline W&B run after another, instead of by W&B's agent.
        out: Folder for the results and the runs; null for runs/sweeps/<name of the file>.
        count: Maximum number of runs in this call; null for all.
        arguments: Further arguments for every run, as in --arguments="--trainer.max_steps 100" (with the equals sign).
    """
    if count is not None and count < 1:
        raise InputError(f"count {count} is less than 1: there is nothing to run")
    config = read_sweep(file)
    config["command"] = [*config["command"], *split_arguments(arguments)]
    folder = (Path("runs/sweeps") / Path(file).stem if out is None else Path(out)).absolute()
    check_output_folder(folder)
    trials = run_offline(file, config, folder, count) if offline else run_on_server(config, folder, count)
    metric, goal = config["metric"]["name"], config["metric"]["goal"]
    results = report(folder, {"sweep": str(file), "command": config["command"]}, metric, goal, trials)
    if failed := [trial for trial in trials if trial.failed]:
        names = "; ".join(f"{trial.name} ({trial.note})" for trial in failed)
        raise InputError(f"{len(failed)} of {len(trials)} runs failed: {names}")
    return results


def read_sweep(file: Path) -> dict[str, Any]:
    """A sweep file as W&B reads it, with the default of `goal`. Refuses one without metric, parameters or command."""
    from wandb.sdk.launch.sweeps.utils import load_sweep_config

    if not Path(file).is_file():
        known = ", ".join(sorted(p.stem for p in Path(file).parent.glob("[!.]*.yaml") if p.stem != "defaults"))
        raise InputError(f"{file} does not exist{f': beside it are {known}' if known else ''}")
    config = load_sweep_config(str(file))
    if not isinstance(config, dict):
        raise InputError(f"{file} is not a sweep file: it holds no YAML mapping")
    metric, parameters, command = (config.get(key) for key in ("metric", "parameters", "command"))
    if not isinstance(metric, dict) or not isinstance(metric.get("name"), str):
        raise InputError(f"{file} names no metric: `metric: {{name: val/loss, goal: minimize}}` is missing")
    metric.setdefault("goal", "minimize")
    if metric["goal"] not in ("minimize", "maximize"):
        raise InputError(f"the goal of {file} is {metric['goal']!r}: it must be minimize or maximize")
    if not isinstance(parameters, dict) or not all(isinstance(p, dict) for p in parameters.values()) or not parameters:
        raise InputError(f"{file} has no parameters to sweep: `parameters: {{model.lr: {{values: [...]}}}}` is missing")
    if not isinstance(command, list) or "${args}" not in command:
        raise InputError(f"{file} has no command with ${{args}} in it, which the parameters replace")
    return config


def grid(file: Path, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the parameters' values; the last parameter varies fastest."""
    if (method := config.get("method")) != "grid":
        raise InputError(f"{file} asks for method {method!r}, which W&B's server carries out: offline takes grid alone")
    for name, parameter in config["parameters"].items():
        values = parameter.get("values", [parameter["value"]] if "value" in parameter else None)
        if not isinstance(values, list) or not values:
            raise InputError(f"parameter {name} of {file} has neither value nor values, and a grid takes nothing else")
    options = [p.get("values", [p.get("value")]) for p in config["parameters"].values()]
    return [dict(zip(config["parameters"], values, strict=True)) for values in itertools.product(*options)]


def trial_command(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> list[str]:
    """The command, as a list of words, that W&B's agent would run for these parameters, with this interpreter."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    words = create_sweep_command(list(config["command"]))  # a copy: the function changes its argument
    macros = create_sweep_command_args({"args": {name: {"value": value} for name, value in parameters.items()}})
    macros |= {"env": ["/usr/bin/env"], "interpreter": [sys.executable], "program": [config.get("program")]}
    expanded = (macros.get(w[2:-1], []) if w.startswith("${") and w.endswith("}") else [w] for w in map(str, words))
    return [str(word) for part in expanded for word in part]


def trial_id(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> str:
    """The run id: a hash of the parameters, the command, and the content of the files that the command names.

    After a change of a configuration, its runs are therefore new ones. Files that those files name are not hashed.
    """
    named = [Path(str(word).rpartition("=")[2]) for word in config["command"]]
    files = [path / "bundle.json" if path.is_dir() else path for path in named]
    content = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()]
    hashed = [config.get("program"), config["command"], content, parameters]
    return hashlib.sha256(json.dumps(hashed).encode()).hexdigest()[:8]


def run_offline(file: Path, config: Mapping[str, Any], folder: Path, count: int | None) -> list[Trial]:
    """The trials of the grid. Runs at most `count` unfinished ones; a failed run does not stop the others."""
    trials: list[Trial] = []
    combinations = grid(file, config)
    for number, parameters in enumerate(combinations, 1):
        trial = Trial(parameters, trial_id(config, parameters))
        finished = folder / trial.run / "finished.json"
        if not finished.is_file() and count == 0:
            trials.append(trial.ended(note="not run yet"))
            continue
        if not finished.is_file():
            count = None if count is None else count - 1
            print(f"run {number} of {len(combinations)}: {trial.name}", flush=True)
            if note := run_one(config, trial, folder):
                trials.append(trial.ended(note=note, failed=True))
                continue
            record = {"parameters": parameters, "command": config["command"]}
            write_atomically(finished, (json.dumps(record, indent=1) + "\n").encode())
        trials.append(trial.ended(last_metrics(folder / trial.run), config["metric"]["name"]))
    return trials


def run_one(config: Mapping[str, Any], trial: Trial, folder: Path) -> str:
    """Run one combination as W&B's agent would, but offline. Returns the reason of a failure, or an empty string.

    stdout stays on the terminal. stderr goes to stderr.txt in the run's folder, where the reason is read.
    """
    from wandb.sdk.lib.config_util import save_config_file_from_dict

    run = folder / trial.run
    run.mkdir(parents=True, exist_ok=True)
    save_config_file_from_dict(str(run / "sweep.yaml"), {k: {"value": v} for k, v in trial.parameters.items()})
    environment = {
        **os.environ,
        "CDM_SWEEP_FOLDER": str(folder),  # read by experiments/sweeps/defaults.yaml
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",  # else W&B's closing lines would hide the error
        "WANDB_RUN_ID": trial.run,
        "WANDB_NAME": trial.name,
        "WANDB_RUN_GROUP": folder.name,
        "WANDB_SWEEP_PARAM_PATH": str(run / "sweep.yaml"),  # adds the parameters to the run's config, as the agent does
    }
    with (run / "stderr.txt").open("w") as stderr:
        code = run_to_end(subprocess.Popen(trial_command(config, trial.parameters), env=environment, stderr=stderr))
    if not code:
        return ""
    lines = [line.strip() for line in (run / "stderr.txt").read_text(errors="replace").splitlines() if line.strip()]
    start = [i for i, line in enumerate(lines) if line.startswith(("cdm: error: ", "error: "))] or [-1]
    reason = " ".join(lines[start[-1] :]).removeprefix("cdm: ").removeprefix("error: ")
    return (f"killed by signal {-code}" if code < 0 else f"exit code {code}") + (f": {reason}" if reason else "")


def run_to_end(process: subprocess.Popen) -> int:
    """The exit code of a process. If this one is told to stop, so is that, which may take a moment to save."""
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def last_metrics(run: Path) -> dict[str, float]:
    """The last value of every metric in the CSV logs of a run, over all times it was started.

    W&B's own offline file is not read: it is binary, in a format for its server.
    """
    metrics: dict[str, float] = {}
    for file in sorted(run.glob("logs/version_*/metrics.csv"), key=lambda f: int(f.parent.name.split("_")[1])):
        with file.open() as lines:
            for row in csv.DictReader(lines):
                metrics |= {name: float(value) for name, value in row.items() if value}
    return metrics


def run_on_server(config: dict[str, Any], folder: Path, count: int | None) -> list[Trial]:
    """Create the sweep on W&B's server, run its agent, and read the metrics of the runs back."""
    import wandb

    if (mode := os.environ.get("WANDB_MODE", "online")) != "online":
        raise InputError(
            f"WANDB_MODE is {mode}, so that no run would reach W&B's server: give `--offline true`, or unset it"
        )
    os.environ["CDM_SWEEP_FOLDER"] = str(folder)  # the agent passes this environment on
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # its `python`
    os.environ.setdefault("WANDB_AGENT_DISABLE_FLAPPING", "true")  # a failed run does not stop the others
    metric, trials = config["metric"]["name"], []
    try:
        sweep_id = wandb.sweep(config)
        # At a KeyboardInterrupt, which is what it knows, the agent lets its runs end.
        handlers = {n: signal.signal(n, signal.default_int_handler) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            wandb.agent(sweep_id, count=count)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        for run in wandb.Api().sweep(sweep_id).runs:
            trial = Trial({name: run.config.get(name) for name in config["parameters"]}, run.id)
            done = run.state == "finished"
            trials.append(
                trial.ended(run.summary_metrics, metric) if done else trial.ended(note=run.state, failed=True)
            )
    except wandb.errors.Error as error:
        raise InputError(
            f"W&B could not carry out the sweep: {error} (`--offline true` runs it without W&B's server)"
        ) from error
    return trials
