"""Atomic writes, JSON tables, and output folders that can be continued only with the settings they were begun with."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict
from glob import escape
from pathlib import Path
from typing import Any

from cdm_lightning.foundation.errors import InputError


def read_table(path: Path, *names: str) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError if the file is damaged, or if one of `names` is missing."""
    try:
        table = json.loads(Path(path).read_text())
        if not isinstance(table, dict):
            raise ValueError("it holds no table")
        if missing := [name for name in names if name not in table]:
            raise ValueError(f"it holds no {missing[0]}")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged or foreign, {' '.join(str(error).split())}: remove it, and it is made again"
        ) from error
    return table


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary file and rename it: even after a power cut, `path` holds all of `data` or its old content.

    Several processes may write the same path: each has its own temporary file, and the last rename wins. Temporary
    files of the same path that killed processes left behind are removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(100):
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
        try:
            partial.write_bytes(data)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())  # else the rename could reach the disk before the data
            partial.replace(path)
            for left in path.parent.glob(f"{escape(path.name)}.*.partial"):
                left.unlink(missing_ok=True)
            return
        except OSError as error:
            removed = isinstance(error, FileNotFoundError) and path.parent.is_dir()
            partial.unlink(missing_ok=True)
            if attempt == 99 or not removed:  # removed: another process took the file for one left behind
                raise InputError(f"{path} could not be written: {error.strerror or error}") from error


def begin_folder(out: Path, manifest: Any) -> None:
    """Write `manifest`, a dataclass, into a new folder. Refuses a folder that was begun with another manifest."""
    path = Path(out) / "manifest.json"
    if not path.is_file():  # several processes may do this at once under torchrun; they write the same bytes
        write_atomically(path, (json.dumps(asdict(manifest), indent=1) + "\n").encode())
    try:
        before = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    differing = [name for name, value in asdict(manifest).items() if before.get(name) != value]
    if differing:
        name = differing[0]
        raise InputError(
            f"{out} was begun with {name} {before.get(name)}, not {getattr(manifest, name)}: choose another folder"
        )
