"""`cdm prepare parquet`: columns, labels and their names, rows that lack something, and what is refused."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from folders import hashes
from raw_sources import encoded, picture, stored, write_tree
from refusals import sentence_of_error

from cdm_lightning.data.preparation.folders import prepare_folder
from cdm_lightning.data.preparation.parquet import prepare_parquet
from cdm_lightning.data.shards import read_manifest

QUICK = {"resolutions": [8], "workers": 1, "images_per_shard": 5}
NAMES = ["zebra", "ant", "cat"]  # the hub's names are in label order, which need not be sorted


def png() -> bytes:
    return encoded(picture(12, 12))


def hub_table(images: list[bytes | None], labels: list, names: list[str] | None = NAMES) -> pa.Table:
    """A table as the hub has it: structs of bytes and path, and names of the classes in its metadata."""
    structs = [None if data is None else {"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)]
    table = pa.table({"image": structs, "label": labels, "extra": [0.5] * len(labels)})
    if names is None:
        return table
    features = {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def content(folder: Path) -> set[tuple[bytes, str]]:
    classes = read_manifest(folder).classes
    return {(image.tobytes(), classes[label]) for _, image, label in stored(folder)}


def labels_of(folder: Path) -> list[int]:
    return sorted(label for *_, label in stored(folder))


def test_a_data_set_of_the_hub_gives_the_images_and_labels_of_class_folders(tmp_path, capsys):
    images, labels = [png() for _ in range(50)], [i % 2 * 2 for i in range(50)]
    (tmp_path / "data").mkdir()
    for part, rows in enumerate((slice(0, 30), slice(30, 50))):
        path = tmp_path / f"data/train-{part:05d}-of-00002.parquet"
        pq.write_table(hub_table(images[rows], labels[rows]), path, row_group_size=10)
    tree = {name: {f"{i}.png": images[i] for i in range(50) if NAMES[labels[i]] == name} for name in NAMES}
    prepare_folder(write_tree(tmp_path / "raw", tree), tmp_path / "a", **QUICK)
    prepare_parquet(f"{tmp_path}/data/train-*.parquet", tmp_path / "b", **QUICK)
    manifest = read_manifest(tmp_path / "b/train/8")
    assert manifest.classes == NAMES and manifest.counts == [25, 0, 25]
    assert content(tmp_path / "b/train/8") == content(tmp_path / "a/train/8")
    assert [f.name for f in (tmp_path / "b/train").iterdir()] == ["8"], "what was staged is removed"
    before = hashes(tmp_path / "b")
    prepare_parquet(f"{tmp_path}/data/train-*.parquet", tmp_path / "b", **QUICK)
    assert "is finished" in capsys.readouterr().out and hashes(tmp_path / "b") == before
    import fsspec

    fsspec.filesystem("memory").put(f"{tmp_path}/data/", "/hub/data/", recursive=True)
    prepare_parquet("memory://hub/data/train-*.parquet", tmp_path / "c", **QUICK)
    assert hashes(tmp_path / "c", "*.tar") == hashes(tmp_path / "b", "*.tar")


def test_plain_bytes_and_other_labels(tmp_path):
    images = [png() for _ in range(4)]
    for name, labels, classes, expected in (
        ("numbers", pa.array([10, 0, 2, 2], pa.uint8()), [str(i) for i in range(11)], [0, 2, 2, 10]),
        ("names", ["b", "a", "b", "c"], ["a", "b", "c"], [0, 1, 1, 2]),
        ("encoded", pa.array(["b", "a", "b", "c"]).dictionary_encode(), ["a", "b", "c"], [0, 1, 1, 2]),
        ("digits", ["10", "9", "9", "003"], ["003", "9", "10"], [0, 1, 1, 2]),  # as a table of labels
    ):
        table = pa.table({"img": pa.array(images, pa.large_binary()), "fine": labels})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        prepare_parquet(f"{tmp_path}/{name}.parquet", tmp_path / name, image="img", label="fine", **QUICK)
        assert read_manifest(tmp_path / name / "train/8").classes == classes
        assert labels_of(tmp_path / name / "train/8") == expected
    (tmp_path / "order").write_text('["c", "b", "a"]')
    options = {"image": "img", "label": "fine", "classes": tmp_path / "order"}
    prepare_parquet(f"{tmp_path}/names.parquet", tmp_path / "ordered", **options, **QUICK)
    assert read_manifest(tmp_path / "ordered/train/8").classes == ["c", "b", "a"]
    assert labels_of(tmp_path / "ordered/train/8") == [0, 1, 1, 2]


def test_rows_without_image_or_label_are_left_out(tmp_path, capsys):
    pq.write_table(hub_table([png(), None, png(), None, png()], [0, 1, None, None, 2]), tmp_path / "t.parquet")
    prepare_parquet(str(tmp_path), tmp_path / "out", **QUICK)
    assert labels_of(tmp_path / "out/train/8") == [0, 2]
    said = capsys.readouterr().out
    assert "without image: 2 (t.parquet/00000001, t.parquet/00000003)" in said
    assert "without a label in label: 1 (t.parquet/00000002)" in said


def test_bad_tables_are_one_sentence_and_leave_nothing(tmp_path):
    one, no_bytes = [png()], pa.array([None], pa.binary())
    for name, table in {
        "good": hub_table(one, [0]), "high": hub_table(one, [3]), "minus": hub_table(one, [-1], None),
        "floats": hub_table(one, [0.5]), "texts": pa.table({"image": ["x"], "label": [0]}),
        "lists": pa.table({"image": [[1, 2]], "label": [0]}), "nulls": pa.table({"image": no_bytes, "label": [0]}),
        "other": hub_table(one, [0], ["x", "y", "z"]), "control": hub_table(one, ["a\nb"], None),
    }.items():  # fmt: skip
        pq.write_table(table, tmp_path / f"{name}.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "good.parquet").read_bytes()[:-9])
    damaged = bytearray((tmp_path / "good.parquet").read_bytes())
    damaged[4:200] = bytes(196)
    (tmp_path / "damaged.parquet").write_bytes(damaged)
    for name, options, words in (
        ("nowhere", {}, "nowhere.parquet does not exist"),
        ("good", {"image": "img"}, "has no column 'img': --image names one of image, label, extra"),
        ("good", {"label": "fine"}, "has no column 'fine': --label names one of"),
        ("high", {}, "label 3, which lies outside 0 ... 2"),
        ("minus", {}, "'-1'"),
        ("floats", {}, "has double in the column 'label'"),
        ("texts", {}, "has string in the column 'image'"),
        ("lists", {}, "has list<"),
        ("nulls", {}, "holds no image with a label"),
        ("control", {}, "the name of a class must be printable"),
        ("cut", {}, "cut.parquet cannot be read as parquet"),
        ("damaged", {}, "damaged.parquet cannot be read as parquet"),
        ("{damaged,good}", {}, "damaged.parquet cannot be read as parquet"),
    ):
        source = f"{tmp_path}/{name}.parquet"
        sentence_of_error(lambda s=source, o=options: prepare_parquet(s, tmp_path / "out", **QUICK, **o), words)
        assert not (tmp_path / "out").exists(), name
    source = f"{tmp_path}/{{good,other}}.parquet"
    sentence_of_error(
        lambda: prepare_parquet(source, tmp_path / "out", **QUICK), "other.parquet has other classes than"
    )


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    sentence_of_error(lambda: prepare_parquet("x.parquet", tmp_path / "out"), 'pip install "cdm_lightning[parquet]"')


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    """A row group of 64 MB is read page by page."""
    from cdm_lightning.data.preparation import parquet

    noise = [random.randbytes(1 << 20) for _ in range(64)]
    pq.write_table(pa.table({"image": noise, "label": [0] * 64}), tmp_path / "t.parquet", write_batch_size=1)
    del noise
    before, peak = pa.total_allocated_bytes(), 0
    for _ in parquet.members_of(tmp_path / "t.parquet", "image", "label"):
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < 48 << 20
