"""bundle.json: the table of a bundle, which says of what stages it is, how they were trained and how to sample."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from cdm_lightning.foundation.errors import InputError

FORMAT = 1


def digest(entries: list[Any]) -> str:
    """SHA-256 of the stage entries of bundle.json; levels and search results beside them may change."""
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def bundle_file(bundle: Path) -> Path:
    """The bundle.json of a bundle, which is given by its folder or by this file."""
    return Path(bundle) if Path(bundle).name == "bundle.json" else Path(bundle) / "bundle.json"


def read_bundle_metadata(folder: Path) -> dict[str, Any]:
    """bundle.json as a dictionary. Raises InputError for what is not a bundle."""
    path = bundle_file(folder)
    if not path.is_file():
        raise InputError(f"{folder} is not a bundle: it holds no bundle.json, which `cdm bundle` writes")
    try:
        metadata = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if (
        not isinstance(metadata, dict)
        or metadata.get("format") != FORMAT
        or not isinstance(metadata.get("stages"), list)
    ):
        raise InputError(f"{path} is not a bundle of format {FORMAT}")
    check_bundle_metadata(path, metadata)
    return metadata


def origin(metadata: dict[str, Any]) -> dict[str, Any]:
    """Where the training images came from, by bundle.json or a table like it: `classes`, `crop` and `filter`.

    The first stage that knows a value gives it; None means unknown. classes: their names in label order, or None for a
    cascade without class conditioning.
    """
    trained = [stage.get("trained", {}) for stage in metadata["stages"]]
    sources = [{"classes": metadata.get("classes")}, *trained]
    known = {name: next((s[name] for s in sources if s.get(name)), None) for name in ("classes", "crop", "filter")}
    if all(stage["arguments"].get("num_classes") is None for stage in metadata["stages"]):
        known["classes"] = None  # samples of an unconditional cascade belong to no class
    return known


def check_bundle_metadata(path: Path, metadata: dict[str, Any]) -> None:
    """Refuse a bundle.json with a field of the wrong type."""
    for entry in metadata["stages"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("trained", {}), dict):
            raise InputError(f"{path} lists a stage that is not a table")
    lists = [("levels", int, metadata.get("levels")), ("classes", str, metadata.get("classes"))]
    lists += [("classes", str, entry.get("trained", {}).get("classes")) for entry in metadata["stages"]]
    for name, kind, value in lists:
        if value is not None and not (isinstance(value, list) and all(type(each) is kind for each in value)):
            raise InputError(f"{path} has {name} {value!r}: a list of {kind.__name__} is expected")
    if type(metadata.get("truncated", False)) is not bool:
        raise InputError(f"{path} has truncated {metadata['truncated']!r}: true or false is expected")
