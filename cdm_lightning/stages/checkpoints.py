"""Checkpoint files: read without unpickling, written whole or not at all, and the newest one of a folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from lightning.pytorch.utilities import rank_zero_warn

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import check_plain_file


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
