"""The report of a sweep: its trials, the ranked table, results.json, and a chart of metric over parameter."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import write_atomically
from cdm_lightning.foundation.terminal import folding_table, table_console


@dataclass(frozen=True)
class Trial:
    """One combination of parameters, the id of its run, and the last value of the metric; None if there is none."""

    parameters: dict[str, Any]
    run: str
    value: float | None = None
    note: str = ""  # why there is no value
    failed: bool = False

    @property
    def name(self) -> str:
        return ", ".join(f"{name} = {value}" for name, value in self.parameters.items())

    def ended(
        self, metrics: Mapping[str, Any] | None = None, metric: str = "", note: str = "", failed: bool = False
    ) -> Trial:
        """This trial with its metric from the logged metrics, or with a note that says why there is none.

        Raises InputError if the run logged other metrics only.
        """
        if metrics is None:
            return replace(self, note=note, failed=failed)
        if metric not in metrics:
            logged = ", ".join(sorted(name for name in metrics if "/" in name)) or "nothing"
            raise InputError(f"run {self.run} ({self.name}) never logged the metric {metric!r}: it logged {logged}")
        value = float(metrics[metric])
        return replace(self, value=value) if math.isfinite(value) else replace(self, note=f"{metric} is {value}")


def report(folder: Path, about: Mapping[str, Any], metric: str, goal: str, trials: Sequence[Trial]) -> dict[str, Any]:
    """Print the trials, best first, and write results.json and sweep.png into `folder`. goal: minimize or maximize."""
    sign = 1 if goal == "minimize" else -1
    ranked = sorted(trials, key=lambda trial: (trial.value is None, sign * (trial.value or 0)))
    results = {**about, "metric": metric, "goal": goal, "rows": [asdict(trial) for trial in ranked]}
    write_atomically(folder / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    if trials:
        plot(folder / "sweep.png", metric, trials)
    console = table_console()
    table = folding_table(*(trials[0].parameters if trials else ()), f"{metric} ({goal})", "run")
    for trial in ranked:
        found = trial.note if trial.value is None else f"{trial.value:.6g}"
        table.add_row(*(str(value) for value in trial.parameters.values()), found, trial.run)
    console.print(table)
    console.print(f"{folder} holds the runs, results.json and sweep.png", highlight=False, soft_wrap=True)
    return results


def plot(path: Path, metric: str, trials: Sequence[Trial]) -> None:
    """Save a chart as PNG: the metric over the first parameter that varies, one line per combination of the others.

    The axis of a number is logarithmic if its values span a factor of 30 or more. Other values are evenly spaced.
    """
    from matplotlib.figure import Figure  # slow to import, and most commands draw nothing

    values = {name: [trial.parameters[name] for trial in trials] for name in trials[0].parameters}
    across, *others = [name for name in values if len(set(map(str, values[name]))) > 1] or list(values)[:1]
    places = values[across]
    ticks = list(dict.fromkeys(map(str, places)))
    numeric = all(isinstance(place, int | float) and not isinstance(place, bool) for place in places)
    lines: dict[str, list[tuple[float, float]]] = {}
    for trial, place in zip(trials, places, strict=True):
        if trial.value is not None:
            label = ", ".join(f"{name} = {trial.parameters[name]}" for name in others)
            lines.setdefault(label, []).append((place if numeric else ticks.index(str(place)), trial.value))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for (label, line), style in zip(lines.items(), itertools.cycle(("o-", "s--", "^:", "d-.")), strict=False):
        axes.plot(*zip(*sorted(line), strict=True), style, label=label)
    axes.set(xlabel=across, ylabel=metric)
    if not numeric:
        axes.set_xticks(range(len(ticks)), ticks)
    elif min(places) > 0 and max(places) / min(places) >= 30:
        axes.set_xscale("log")
    if others and lines:
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())
