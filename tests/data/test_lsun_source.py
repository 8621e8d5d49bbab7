"""LSUN's databases: what is taken, what is refused, and a cascade without classes from one to its figures."""

import os
import struct
import zipfile
from pathlib import Path

import lmdb
import pytest
from commands import QUICK, ROOT, configs
from folders import hashes
from raw_sources import encoded, jpeg, picture, stored
from refusals import sentence_of_error

from cdm_lightning.__main__ import main
from cdm_lightning.data.preparation.lsun import prepare_lsun
from cdm_lightning.data.shards import read_manifest


def images(count: int, start: int = 0) -> dict[bytes, bytes]:
    """Keys as LSUN has them, without suffix, and images in both of its formats."""
    return {
        b"%040x" % (7919 * i): encoded(picture(20, 16), "WEBP") if i % 2 else jpeg(16, 20)
        for i in range(start, start + count)
    }


def database(folder: Path, values: dict[bytes, bytes]) -> Path:
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=1 << 24) as made, made.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    return folder


def prepared(source: Path, out: Path, **options: object):
    prepare_lsun(source, out, **{"resolutions": [8], "workers": 1, **options})
    return read_manifest(out / options.get("split", "train") / "8")


def refused(source: Path, *parts: str, **options: object) -> None:
    out = source.parent / "refused"
    sentence_of_error(lambda: prepared(source, out, **options), *parts)
    assert not out.exists()


def test_one_category_is_one_class_and_several_are_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "scenes"
    database(root / "church_outdoor_train_lmdb", images(4))
    database(root / "bedroom_train_lmdb", images(3, 9))
    database(root / "bedroom_val_lmdb", images(2, 20))
    one = prepared(root / "bedroom_train_lmdb", tmp_path / "one")
    assert (one.classes, one.counts, one.source) == (["bedroom"], [3], "bedroom_train_lmdb")
    several = prepared(root, tmp_path / "several")
    assert (several.classes, several.counts) == (["bedroom", "church_outdoor"], [3, 4])
    assert "left out: other splits: 1 (bedroom_val_lmdb)" in capsys.readouterr().out
    val = prepared(root, tmp_path / "several", split="val")
    assert (val.classes, val.counts) == (["bedroom", "church_outdoor"], [2, 0])
    other = prepared(root / "bedroom_train_lmdb", tmp_path / "other name")
    assert other == one  # the second time in one process


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    source = database(tmp_path / "bedroom_train_lmdb", images(7))
    for workers in (1, 2):
        prepared(source, tmp_path / f"{workers}", workers=workers, images_per_shard=3)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")
    assert len({pixels.tobytes() for _, pixels, _ in stored(tmp_path / "1/train/8")}) == 7


def test_what_is_no_image_is_left_out_and_a_damaged_one_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = encoded(picture(16, 16), "WEBP")[:60]
    others = {b"info": b"a note", b"odd\xff\x1b/key": encoded(picture(9, 9)), b"broken": broken}
    source = database(tmp_path / "cat", {**images(3), **others})
    manifest = prepared(source, tmp_path / "out", max_corrupt=0.5)
    assert (manifest.classes, manifest.counts, manifest.skipped) == (["cat"], [4], 1)
    assert manifest.extra["skipped"][0]["name"] == "cat/broken"
    assert "left out: no known image format: 1 (cat/info)" in capsys.readouterr().out
    refused(database(tmp_path / "notes", {b"a": b"text"}), "notes holds no images; left out are no known image format")


def test_sources_that_are_refused(tmp_path: Path) -> None:
    good = database(tmp_path / "bedroom_train_lmdb", images(5))
    refused(good, "bedroom_train_lmdb is the train split by its name: give --split train", split="val")
    refused(database(tmp_path / "a/empty_train_lmdb", {}), "empty_train_lmdb is an empty database")
    with zipfile.ZipFile(tmp_path / "bedroom_val_lmdb.zip", "w") as file:
        file.write(good / "data.mdb", "data.mdb")
    refused(tmp_path / "bedroom_val_lmdb.zip", "is a zip: unzip it")
    refused(tmp_path, "nor a folder NAME_val_lmdb: unzip bedroom_val_lmdb.zip", split="val")
    refused(good / "data.mdb", "is not a folder: give the one that holds data.mdb")
    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", "none holds neither data.mdb nor a folder NAME_train_lmdb: it is empty")
    (tmp_path / "b/kitchen_train_lmdb").mkdir(parents=True)
    refused(tmp_path / "b", "kitchen_train_lmdb/data.mdb cannot be read: no such file")
    os.mkfifo(tmp_path / "b/kitchen_train_lmdb/data.mdb")
    refused(tmp_path / "b", "kitchen_train_lmdb/data.mdb is no plain file")


def test_a_cut_or_damaged_database_is_refused(tmp_path: Path) -> None:
    whole = database(tmp_path / "whole", images(40)) / "data.mdb"
    data = whole.read_bytes()
    for number, end in enumerate([0, 100, 4096, 4200, 8192, len(data) // 2]):
        folder = tmp_path / f"cut{number}"
        folder.mkdir()
        (folder / "data.mdb").write_bytes(data[:end])
        refused(folder, f"cut{number}/data.mdb is ", "cut or damaged" if end >= 8192 else "no LMDB database")
    for number, (place, value) in enumerate([(16, b"junk"), (20, b"\x02\0\0\0"), (40, struct.pack("<I", 3))]):
        folder = tmp_path / f"damaged{number}"
        folder.mkdir()
        (folder / "data.mdb").write_bytes(data[:place] + value + data[place + len(value) :])
        refused(folder, "is no LMDB database, or its beginning is damaged")
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages/data.mdb").write_bytes(data[:8192] + bytes(len(data) - 8192))  # all but the meta pages
    refused(tmp_path / "pages", "pages/data.mdb is damaged: page ")


@pytest.mark.filterwarnings("ignore")
def test_a_cascade_without_classes_from_a_database_to_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepare, fit by the recipes of LSUN, bundle, sample, evaluate. Grey, as the detector that ships is."""
    monkeypatch.chdir(ROOT)
    shards, run = tmp_path / "shards", tmp_path / "runs"
    for split, count in (("train", 40), ("val", 8)):
        source = database(tmp_path / f"bedroom_{split}_lmdb", images(count, 1000 * len(split)))
        words = ["--source", str(source), "--out", str(shards), "--split", split, "--resolutions", "[16,8]"]
        main(["prepare", "lsun", *words, "--grey", "true", "--workers", "1"])
    small = [*QUICK, f"--data.root={shards}", "--model.image_channels=1", "--model.channel_mult=[1]"]
    for stage, sizes in (("base64", {"resolution": 8}), ("sr128", {"resolution": 16, "low_resolution": 8})):
        sized = [f"--model.{name}={size}" for name, size in {**sizes, "attention_resolutions": "[]"}.items()]
        path = ROOT / "experiments/lsun" / f"{stage}.yaml"
        main(["fit", *configs(path), *small, *sized, f"--trainer.default_root_dir={run / stage}"])
    checkpoints = f"[{run / 'base64'},{run / 'sr128'}]"
    samples, card = tmp_path / "samples", tmp_path / "card.safetensors"
    sample = ["--bundle", str(run / "bundle"), "--count", "8", "--sampling_steps", "[2,2]"]
    main(["bundle", "--checkpoints", checkpoints, "--out", str(run / "bundle")])
    main(["sample", *sample, "--out", str(samples)])
    judge = ["--shards", str(shards), "--resolution", "16", "--detector", "fashion-cnn-64", "--accelerator", "cpu"]
    main(["reference", *judge, "--out", str(card), "--keep", "30"])
    main(["evaluate", "--samples", f"[{samples}]", "--references", f"[{card}]", "--out", str(tmp_path / "figures")])
    assert os.path.getsize(tmp_path / "figures/report.html") > 1000
