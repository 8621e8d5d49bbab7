"""Files that are written whole or not at all, and JSON tables read back: a torn or foreign one is one sentence."""

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
    """The JSON table in a file that holds at least `names`; refuses anything else."""
    try:
        table = json.loads(Path(path).read_text())
        if not isinstance(table, dict):
            raise ValueError("it holds no table")
        if missing := [name for name in names if name not in table]:
            raise ValueError(f"it holds no {missing[0]}")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is torn or another's, {' '.join(str(error).split())}: remove it, and it is made again"
        ) from error
    return table


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside, then rename: `path` holds all of `data` or what it held before, a power cut included.

    Any number of processes may write the same path: each has a partial file of its own, and the last rename wins. What
    killed ones left of the same path goes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for turn in range(100):
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
        try:
            partial.write_bytes(data)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())  # a rename may reach the disk before the data it names
            partial.replace(path)
            for left in path.parent.glob(f"{escape(path.name)}.*.partial"):
                left.unlink(missing_ok=True)
            return
        except OSError as error:
            gone = isinstance(error, FileNotFoundError) and path.parent.is_dir()
            partial.unlink(missing_ok=True)
            if turn == 99 or not gone:  # gone: another process, which has finished, took it for one that was left
                raise InputError(f"{path} could not be written: {error.strerror or error}") from error


def begin_folder(out: Path, manifest: Any) -> None:
    """Write the manifest, a dataclass, into a new folder; in one begun before, refuse to go on with another."""
    path = Path(out) / "manifest.json"
    if not path.is_file():  # every process that finds none: under torchrun they start together, and write the same
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
