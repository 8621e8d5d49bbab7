"""Atomic writes, JSON tables, and output folders that can be continued only with the settings they were begun with."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, is_dataclass
from glob import escape
from pathlib import Path
from typing import Any

from cdm_lightning.foundation.errors import InputError


def read_table(path: Path, *names: str) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError if the file is damaged, or if one of `names` is missing."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no plain file")
        table = json.loads(path.read_text())
        if not isinstance(table, dict):
            raise ValueError("it holds no table")
        if missing := [name for name in names if name not in table]:
            raise ValueError(f"it holds no {missing[0]}")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged or foreign, {' '.join(str(error).split())}: remove it, and it is made again"
        ) from error
    return table


def cache_folder() -> Path:
    """The folder of what may be fetched again: $CDM_CACHE, or ~/.cache/cdm_lightning."""
    folder = os.environ.get("CDM_CACHE")
    try:
        return Path(folder) if folder else Path.home() / ".cache" / "cdm_lightning"
    except RuntimeError as error:  # no HOME, and a user without a name
        raise InputError("there is no home folder for the cache: set CDM_CACHE to a folder") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary file and rename it: even after a power cut, `path` holds all of `data` or its old content.

    Several processes may write the same path: each has its own temporary file, and the last rename wins. Temporary
    files of the same path that killed processes left behind are removed.
    """
    check_plain_file(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        check_output_folder(path.parent)
        raise InputError(f"{path.parent} could not be made: {error.strerror or error}") from error
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


def check_plain_file(path: Path) -> None:
    """Refuse a device or a pipe, such as /dev/null, as output: the file that is renamed to it would take its place."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path} is no plain file, and would be replaced by one: give another name")


def check_output_folder(out: Path) -> None:
    """Refuse an output folder that is a file, lies below one, or lies where nothing can be written. Makes nothing."""
    place = Path(out)
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        where = f"{out} is a file" if place == Path(out) else f"{out} lies below the file {place}"
        raise InputError(f"{where}: the results need a folder, so give another name")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{out} cannot be written: {place} is not writable")


def begin_folder(out: Path, settings: Any, begun: bool, name: str = "manifest.json") -> None:
    """Write `settings`, a dataclass or a table, into a folder. Refuses a folder that was begun with other settings.

    begun: whether the folder holds results already; while it does not, other settings replace earlier ones.
    """
    path, table = Path(out) / name, asdict(settings) if is_dataclass(settings) else settings  # type: ignore[arg-type]  # no class
    if not begun or not path.is_file():  # several processes may do this at once; they write the same bytes
        write_atomically(path, (json.dumps(table, indent=1) + "\n").encode())
    check_settings(path, table)


def check_settings(path: Path, table: dict[str, Any]) -> None:
    """Refuse settings other than those in the file `path` of a folder of results."""
    try:
        before = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    for name, value in table.items():
        if before.get(name) != value:
            raise InputError(
                f"{path.parent} was begun with {name} {before.get(name)}, not {value}: choose another folder"
            )
