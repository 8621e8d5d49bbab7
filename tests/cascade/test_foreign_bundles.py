"""Bundles from strangers: used, or refused in one sentence."""

import hashlib
import json

import pytest
from small_models import smallest_stages
from strangers import examples, mutated_bytes, mutated_json, tried

from cdm_lightning.cascade import CascadeModule
from cdm_lightning.cascade.bundle import read_bundle, write_bundle
from cdm_lightning.cascade.metadata import digest, origin

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "b"
    stages = smallest_stages()
    write_bundle(folder, stages, {"levels": [3], "truncated": False, "classes": None})
    return folder


@examples(60, 2500)
def test_bundles(bundle, n):
    """Changed by one who knows to compute the hashes anew."""
    whole = json.loads((bundle / "bundle.json").read_text())

    def bounded(value):  # a network of 10^12 channels is not refused, see docs/security.md
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return value if abs(value) < 300 else 7
        if isinstance(value, dict):
            return {name: bounded(each) for name, each in value.items()}
        return [bounded(each) for each in value] if isinstance(value, list) else value

    def use(table):
        table = bounded(table)
        if isinstance(table.get("stages"), list) and "stages_sha256" in table:
            table["stages_sha256"] = digest(table["stages"])
        (bundle / "bundle.json").write_text(json.dumps(table))
        cascade = CascadeModule(bundle)
        origin(json.loads((bundle / "bundle.json").read_text()))
        assert cascade.resolution == 16

    try:
        tried(n, whole, mutated_json(whole), use)
    finally:
        (bundle / "bundle.json").write_text(json.dumps(whole))


@examples(40, 1500)
def test_weights(bundle, n):
    whole = json.loads((bundle / "bundle.json").read_text())
    path = bundle / whole["stages"][0]["weights"]
    data = path.read_bytes()

    def use(mutated):
        path.write_bytes(mutated)
        entry = {**whole["stages"][0], "sha256": hashlib.sha256(mutated).hexdigest()}
        table = {**whole, "stages": [entry, whole["stages"][1]]}
        (bundle / "bundle.json").write_text(json.dumps({**table, "stages_sha256": digest(table["stages"])}))
        read_bundle(bundle)

    try:
        tried(n, data, mutated_bytes(data), use)
    finally:
        path.write_bytes(data)
        (bundle / "bundle.json").write_text(json.dumps(whole))
