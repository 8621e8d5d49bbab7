"""Tables of labels: their forms, what they name, and what is refused."""

from pathlib import Path

import pytest
from folders import hashes
from raw_sources import WNIDS, encoded, picture, tar_bytes, val_archive, write_tree
from refusals import sentence_of_error

from cdm_lightning.data.preparation.folders import prepare_folder
from cdm_lightning.data.preparation.imagenet import prepare_imagenet
from cdm_lightning.data.preparation.label_tables import LabelTable
from cdm_lightning.data.shards import read_manifest

PICTURES = {f"p{i}.png": encoded(picture(12, 12)) for i in range(4)}
CLASSES = ["cat", "dog", "cat", "emu"]  # of p0.png, p1.png, ...


def prepared(source: Path, table: str | bytes, out: str = "out", **options: object):
    """The manifest of a preparation with this table, which lies beside the source."""
    path = source.parent / "table"
    path.write_bytes(table.encode() if isinstance(table, str) else table)
    prepare_folder(source, source.parent / out, labels=path, resolutions=[8], workers=1, **options)
    return read_manifest(source.parent / out / options.get("split", "train") / "8")


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    return write_tree(tmp_path, {"flat": PICTURES}) / "flat"


def lines(form: str) -> str:
    return "".join(form.format(i=i, label=label) + "\n" for i, label in enumerate(CLASSES))


TABLES = {
    "comma": (lines("p{i}.png,{label}"), {}),
    "header": ("filename,label\n" + lines("p{i}.png,{label}"), {}),
    "index": (",label,file_name,size\n" + lines("{i},{label},p{i}.png,12"), {}),
    "no suffix": ("id,breed\n" + lines("p{i},{label}"), {}),
    "semicolon, BOM, CRLF": ("\ufeff" + lines('"p{i}.png";"{label}"').replace("\n", "\r\n"), {}),
    "white space": (lines("flat/p{i}.png   {label}"), {}),
    "other folders": (lines("C:\\set\\flat\\p{i}.png\t{label}"), {}),
    "boxes": (lines("p{i}.png\t{label}\t0\t32\t44\t62"), {}),
    "by name": ("a,b,c\n" + lines("{i},{label},p{i}.png"), {"image_column": "c", "label_column": "b"}),
    "by number": (lines("{i},{label},p{i}.png"), {"image_column": "3", "label_column": "2"}),
    "one by name": ("image,b,c\n" + lines("p{i}.png,x,{label}"), {"label_column": "c"}),
    "Kaggle": ("ImageId,PredictionString\n" + lines("p{i},{label} 85 1 499 272 {label} 1 2 3 4 "), {}),
    "line breaks in a cell": ("image,note,label\n" + lines('p{i}.png,"two\r\nlines, or\rthree",{label}'), {}),
    "two words": (lines("p{i}.png,{label}").replace("emu", "sea lion"), {}),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_form_of_a_table_is_read(name: str, flat: Path) -> None:
    table, options = TABLES[name]
    path = flat.parent / "table"
    path.write_text(table, newline="")
    pairs = LabelTable(path, **options).read()
    assert [label for _, label in pairs] == [
        c.replace("emu", "sea lion" if name == "two words" else "emu") for c in CLASSES
    ]
    prepare_folder(flat, flat.parent / "out", labels=path, resolutions=[8], workers=1, **options)
    assert read_manifest(flat.parent / "out/train/8").counts == [2, 1, 1]


def test_a_table_gives_the_shards_that_class_folders_give(flat: Path, tmp_path: Path) -> None:
    trees: dict[str, dict[str, bytes]] = {}
    for label, (name, data) in zip(CLASSES, PICTURES.items(), strict=True):
        trees.setdefault(label, {})[name] = data
    prepare_folder(write_tree(tmp_path / "tree/flat", trees), tmp_path / "folders", resolutions=[8], workers=1)
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive/flat").write_bytes(tar_bytes(PICTURES))  # the manifest holds the name
    table = lines("p{i}.png,{label}")
    prepared(flat, table, "a")
    prepared(tmp_path / "archive/flat", table, "b")
    assert hashes(tmp_path / "folders") == hashes(tmp_path / "a") == hashes(tmp_path / "archive/b")


def test_tiny_imagenets_validation_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    val = write_tree(tmp_path / "val", {"images": {f"val_{i}.JPEG": data for i, data in enumerate(PICTURES.values())}})
    table = val / "val_annotations.txt"
    table.write_text("".join(f"val_{i}.JPEG\tn0344403{i % 2}\t0\t32\t44\t62\n" for i in range(4)))
    prepare_folder(val, tmp_path / "out", labels=table, split="val", resolutions=[8], workers=1)
    assert read_manifest(tmp_path / "out/val/8").counts == [2, 2]
    assert "left out:" not in capsys.readouterr().out


def test_the_validation_archive_of_imagenet_with_kaggles_table(tmp_path: Path) -> None:
    """The bytes are those that the devkit gives."""
    archive, files = val_archive(tmp_path, truth := [3, 1, 4, 2, 2, 1])
    prepare_imagenet(archive, tmp_path / "a", "val", [8], workers=1)
    table = tmp_path / "LOC_val_solution.csv"
    rows = [f"{Path(name).stem},{WNIDS[k - 1]} 85 1 499 272 \n" for name, k in zip(files, truth, strict=True)]
    table.write_text("ImageId,PredictionString\n" + "".join(reversed(rows)))
    prepare_imagenet(archive, tmp_path / "b", "val", [8], labels=table, workers=1)
    folder = write_tree(tmp_path / "unpacked", {archive.name: files}) / archive.name
    prepare_imagenet(folder, tmp_path / "c", "val", [8], labels=table, workers=1)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b") == hashes(tmp_path / "c")
    for source, split in ((archive, "train"), (write_tree(tmp_path / "d", {WNIDS[0]: {}}), "val")):
        sentence_of_error(lambda s=source, p=split: prepare_imagenet(s, tmp_path / "e", p, labels=table), "labels")


def test_what_has_no_line_and_lines_without_a_picture_are_counted(
    flat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (flat / "note.txt").write_text("a note")
    (flat / "below").mkdir()
    (flat / "below/p9.png").write_bytes(PICTURES["p0.png"])
    manifest = prepared(flat, "image,label\np0.png,cat\np1,dog\np1.png,dog\nlost.png,emu\n")
    assert (manifest.classes, manifest.counts) == (["cat", "dog"], [1, 1])
    said = capsys.readouterr().out
    assert "pictures that the table does not name: 3 (below/p9.png, p2.png, p3.png)" in said
    assert "lines of the table without a picture: 1 (lost.png)" in said
    assert "no known image format: 1 (flat/note.txt)" in said


def test_classes_that_are_numbers_are_in_their_order_and_val_may_lack_some(flat: Path) -> None:
    assert prepared(flat, "p0,10\np1,9\np2,003\np3,10\n").classes == ["003", "9", "10"]
    manifest = prepared(flat, "p0,10\np1,003\n", split="val")
    assert (manifest.classes, manifest.counts) == (["003", "9", "10"], [1, 0, 1])


REFUSED = {
    "twice": ("p0.png,cat\np0,dog\n", {}, "names p0 twice, as cat and as dog"),
    "no such column": ("a,b\np0,cat\n", {"label_column": "c"}, "has no column c: its first line has a, b"),
    "no such number": ("p0,cat\n", {"label_column": "3"}, "has no column 3: its first line has p0, cat"),
    "one column": ("p0.png\np1.png\n", {}, "has columns p0.png: give label_column"),
    "several": ("file,label,class\np0,cat,1\n", {}, "has columns file, label, class: give label_column"),
    "same column": ("p0,cat\n", {"image_column": "2", "label_column": "2"}, "are both column 2"),
    "header only": ("filename,label\n", {}, "holds a header and no line below it"),
    "empty": ("\n\n", {}, "is empty"),
    "no text": (b"\xff\xd8\xff\xe0 p0,cat", {}, "is no table of text in UTF-8"),
    "zero bytes": ("p0.png,\0cat\n", {}, "is no table of text in UTF-8: it holds zero bytes"),
    "open quote": ('p0.png,"cat\n', {}, "is no table: a quotation mark is open at its end"),
    "short line": ("p0.png,cat\np1.png\n", {}, "has 1 columns in line 2, and 2 are needed"),
    "no class": ("p0.png,cat\np1.png,\n", {}, "has no class in line 2"),
    "odd class": ("p0.png,c\x1bat\n", {}, "names a class 'c\\x1bat' in line 1: it must be printable"),
    "line break": ('p0.png,dog\np1.png,"cat\np2.png"\n', {}, "names a class 'cat\\np2.png' in line 3: it must be"),
    "one number": ("p0.png,9\np1.png,10\np2.png,009\n", {}, "labels 009 and 9 are one number"),
    "others": ("q0.png,cat\n", {}, "names none of the 4 pictures: it begins with q0.png, and the first picture is p"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_tables_that_are_refused(name: str, flat: Path) -> None:
    table, options, sentence = REFUSED[name]
    sentence_of_error(lambda: prepared(flat, table, **options), sentence)
    assert not (flat.parent / "out").exists()


def test_sources_that_a_table_cannot_label(flat: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (flat / name).mkdir()
        (flat / name / "same.png").write_bytes(PICTURES["p0.png"])
    sentence_of_error(
        lambda: prepared(flat, "same.png,cat\n"), "names same.png, which may be", "a/same.png", "one picture"
    )
    assert prepared(flat, "a/same.png,cat\nb/same,dog\n").counts == [1, 1]
    out = tmp_path / "none"
    sentence_of_error(lambda: prepare_folder(flat, out, labels=flat), "is no file: it should be a table")
    sentence_of_error(lambda: prepare_folder(flat, out, label_column="x"), "column x is of a table: give it by labels")
    (tmp_path / "cut.tar").write_bytes(tar_bytes(PICTURES)[:700])
    sentence_of_error(lambda: prepared(tmp_path / "cut.tar", "p0,cat\n"), "cannot be read as a tar archive")
    (tmp_path / "nothing").mkdir()
    sentence_of_error(lambda: prepared(tmp_path / "nothing", "p0,cat\n"), "nothing holds no images; left out are lines")
