"""Making a stage of what a checkpoint or a bundle holds: its class, its arguments and its weights."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from jsonargparse import ArgumentParser
from torch import nn

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.stages.base_and_super_resolution import BaseStage, DiffusionStage, SuperResolutionStage
from cdm_lightning.stages.checkpoints import load_safely


def stage_class(kind: Any, source: object) -> type[DiffusionStage]:
    """The class that a checkpoint or a bundle names: one of ours, or an imported subclass of one, by its whole path.

    Nothing is imported here, since the file may come from a stranger. source: for the InputError.
    """
    ours: list[type[DiffusionStage]] = [BaseStage, SuperResolutionStage]
    found, unseen = {one.__name__: one for one in ours}, list(ours)
    while unseen:  # the classes that exist by now, each after its base
        derived = unseen.pop().__subclasses__()
        found |= {f"{one.__module__}.{one.__qualname__}": one for one in derived}
        unseen += derived
    if isinstance(kind, str) and kind in found:
        return found[kind]
    module, _, name = str(kind).rpartition(".")
    if re.fullmatch(r"[A-Za-z_][\w.]*", module) and module not in sys.modules:
        raise InputError(
            f"{source} is of the class {kind}, which is not imported: if you trust it, `import {module}`, or "
            f"`cdm --import {module} ...` in the folder of {module.split('.')[0]}"
        )
    known = ", ".join(found)
    raise InputError(f"{source} is not a checkpoint of a stage: its class is {kind!r}, and known are {known}")


def load_stage(path: str | Path) -> DiffusionStage:
    """The stage in a training checkpoint, with its EMA weights, frozen and in eval mode. Nothing is unpickled."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist: a checkpoint of a stage is expected")
    checkpoint = load_safely(path)
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    kind = stage_class(checkpoint.get("stage"), path)
    if missing := {"hyper_parameters", "state_dict", "global_step"} - checkpoint.keys():
        raise InputError(f"{path} is not a checkpoint of a stage: it holds no {min(missing)}")
    stage = build_stage(kind, checkpoint["hyper_parameters"], checkpoint["state_dict"], str(path))
    data = checkpoint.get("ShardDataModule", {})
    if isinstance(imported := checkpoint.get("imported"), dict):
        stage.trained = imported
        return stage
    stage.trained = {
        "averaged": "averaging_state" in checkpoint,
        "steps": checkpoint["global_step"],
        "images": data.get("images_seen"),
        **{name: data.get(name) for name in ("classes", "crop", "filter")},
    }
    if begun_from := checkpoint["hyper_parameters"].get("init_from"):
        stage.trained["init_from"] = begun_from
    return stage


def validated_arguments(kind: type[DiffusionStage], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a stage, checked against the types in its constructor; the file may not be trusted."""
    hints: dict[str, Any] = {}
    for one in reversed(kind.__mro__):  # a class hands on the arguments of its bases
        hints |= get_type_hints(one.__init__) if issubclass(one, DiffusionStage) else {}
    for name, value in arguments.items():
        if value is None and type(None) not in get_args(hints.get(name)):
            raise TypeError(f"{name} is null")  # jsonargparse accepts null for any type
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, fail_untyped=False)
    return parser.parse_object(arguments).as_dict()


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).splitlines()), "")


def build_stage(
    kind: type[DiffusionStage], arguments: dict[str, Any], state: dict[str, torch.Tensor], source: str
) -> DiffusionStage:
    """A frozen stage in eval mode, from its class, constructor arguments and weights. source: for errors."""
    begun = ("init_from", "init_skip")  # how the training began; these weights are its result
    arguments = {n: value for n, value in arguments.items() if not n.startswith("_") and n not in begun}
    try:
        stage = kind(**validated_arguments(kind, arguments))
        stage.load_state_dict(state)
    except InputError:
        raise
    except Exception as error:  # wrong types or sizes make torch and Python raise many kinds of error
        raise InputError(
            f"{source} does not fit {kind.__name__}: {type(error).__name__}: {first_line(error)}"
        ) from error
    nn.Module.requires_grad_(stage, False)
    return stage.eval()
