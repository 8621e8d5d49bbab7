"""Reading and writing checkpoints of stages, without unpickling and never in part, and finding the newest one."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args, get_type_hints
from zipfile import is_zipfile

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import check_plain_file
from cdm_lightning.stages.base_and_super_resolution import BaseStage, DiffusionStage, SuperResolutionStage


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


def load_safely(path: str | Path, **options: Any) -> Any:
    """torch.load with weights_only: reads numbers and tables, and runs no code. Raises InputError for other files."""
    try:
        return torch.load(path, **{"map_location": "cpu", **options}, weights_only=True)
    except Exception as error:  # torch raises many kinds of error for a foreign or truncated file
        with Path(path).open("rb") as file:
            if file.read(2) == b"PK" and not is_zipfile(path):  # the format of torch.save
                raise InputError(f"{path} is cut short: the end of its archive is missing") from error
        raise InputError(
            f"{path} is not a checkpoint that can be loaded safely (weights_only): {type(error).__name__}"
        ) from error


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """torch.save to <name>.partial in the same folder, flushed to disk and renamed: `path` is whole or as it was.

    Nothing is copied in memory. Raises InputError if it cannot be written; the partial file is then removed.
    """
    check_plain_file(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):  # below a file, for one, there is nothing to remove
            partial.unlink(missing_ok=True)
        raise InputError(f"{path} could not be written: {system_message(error)}") from error


def system_message(error: BaseException) -> str:
    """The operating system's message behind an error; torch wraps it in an error of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]


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


def check_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint without the values of its tensors. Refuses a file that Lightning cannot resume from.

    Such a file is truncated, foreign, or in need of unpickling.
    """
    checkpoint = load_safely(path, map_location="meta", mmap=True)
    if isinstance(checkpoint, dict) and "imported" in checkpoint:
        raise InputError(f"{path} is an import, without an optimizer: begin a training by --model.init_from {path}")
    needed = {"pytorch-lightning_version", "epoch", "global_step", "loops", "state_dict", "hyper_parameters"}
    missing = sorted(needed - set(checkpoint)) if isinstance(checkpoint, dict) else sorted(needed)
    if missing:
        raise InputError(f"{path} is not a checkpoint of a training: it holds no {missing[0]}")
    return checkpoint


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


def newest_checkpoint(folders: Iterable[Path], at_most: int | None = None) -> Path | None:
    """The complete checkpoint with the most steps in `folders`, or None; incomplete files are skipped with a warning.

    at_most: the largest number of steps allowed. Of checkpoints with equal steps, the last written one counts. A file
    is complete when torch can open it and it holds the state of a training. Nothing is unpickled.
    """
    complete = []
    for file in sorted(file for folder in folders for file in Path(folder).glob("*.ckpt")):
        try:
            state = load_safely(file, map_location="meta", mmap=True)
            step, _ = int(state["global_step"]), (state["state_dict"], state["optimizer_states"])
        except Exception as error:  # torch raises many kinds of error for a truncated or foreign file
            rank_zero_warn(f"{file} is not a whole checkpoint and is passed over: {type(error).__name__}")
            continue
        if at_most is None or step <= at_most:
            complete.append((step, file.stat().st_mtime_ns, file))
    return max(complete)[2] if complete else None
