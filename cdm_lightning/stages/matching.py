"""Whether a checkpoint fits the stage that is to go on from it."""

from __future__ import annotations

from typing import Any

from cdm_lightning.foundation.errors import InputError

# What may differ between a checkpoint and the configuration that goes on from it: it leaves network and target alone.
FREE = {
    *("sampler", "sampling_steps", "sampling_schedule", "lr", "warmup_steps", "decay_fraction", "seed", "dropout"),
    *("max_level", "blur_sigma", "blur_probability", "checkpointing", "compile"),
}


def check_fits(kind: str, name: str, arguments: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    """Refuse the checkpoint of another kind of stage than `kind`, or of one that was built with other arguments."""
    theirs = {"kind": checkpoint.get("stage"), **checkpoint.get("hyper_parameters", {})}
    for argument, value in {"kind": kind, **arguments}.items():
        if argument not in FREE and theirs.get(argument) != value:
            raise InputError(
                f"the checkpoint does not fit {kind} {name}: "
                f"its {argument} is {theirs.get(argument)!r}, and the configuration says {value!r}"
            )
