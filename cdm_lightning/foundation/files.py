"""What a command has written down about its own work, read back: torn or foreign JSON is one sentence."""

from __future__ import annotations

import json
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
