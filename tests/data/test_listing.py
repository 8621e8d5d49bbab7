"""What `cdm prepare` takes as images and classes, what it leaves out and says so, and which layouts it knows."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from folders import hashes
from PIL import Image
from raw_sources import (
    WNIDS,
    encoded,
    jpeg,
    picture,
    stored,
    tar_bytes,
    tiny_tree,
    train_files,
    val_archive,
    write_devkit,
    write_train_archive,
    write_tree,
)
from refusals import sentence_of_error

from cdm_lightning.data.preparation.folders import prepare_folder
from cdm_lightning.data.preparation.imagenet import prepare_imagenet
from cdm_lightning.data.preparation.lsun import prepare_lsun
from cdm_lightning.data.preparation.raw_images import RawImage, cut_square
from cdm_lightning.data.shards import Manifest, read_manifest
from cdm_lightning.data.stream import ShardStream

SCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
NO_IMAGES = {
    "notes.txt": b"P2P and P6 are no greymaps", "cars.md": b"BMW makes cars", "formats.csv": b"GIF89a,JFIF\n",
    "x.eps": SCRIPT, "phone.heic": b"\0\0\0\x18ftypheic" + bytes(100), "drawing.svg": b"<svg/>",
    "page.pdf": b"%PDF-1.4", "nothing": b"",
}  # fmt: skip


def prepared(source: Path, split: str = "train", out: str = "out", **options: object) -> Manifest:
    """The manifest of a folder prepared at 8x8."""
    target = source.parent / out
    prepare_folder(source, target, split=split, resolutions=[8], workers=1, max_corrupt=1, **options)  # type: ignore[arg-type]
    return read_manifest(target / split / "8")


def refused(source: Path, *parts: str, imagenet: bool = False, **options: object) -> None:
    """The command refuses the source in one sentence and writes nothing."""
    out, command = source.parent / "refused", prepare_imagenet if imagenet else prepare_folder
    sentence_of_error(lambda: command(source, out, resolutions=[8], workers=1, **options), *parts)  # type: ignore[arg-type]
    assert not out.exists()


# ----------------------------------------------------------------------------------------------------------- by content


def test_every_picture_is_taken_by_what_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = picture()
    more = {"save_all": True, "append_images": [picture(), picture()]}
    deep = Image.fromarray(np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32))
    files = {
        "a.jpg": jpeg(), "b.jfif": jpeg(), "c.jpe": jpeg(), "D.JPEG": jpeg(), "e.ppm": encoded(picture(), "PPM"),
        "without": encoded(picture()), "png.txt": encoded(picture()), "png.jpg": encoded(picture()),
        "f.avif": encoded(picture(), "AVIF"), "g.pgm": encoded(picture(mode="L"), "PPM"), "phone.mpo": jpeg(),
        "pages.tif": encoded(first, "TIFF", **more), "moving.webp": encoded(first, "WEBP", lossless=True, **more),
        "pages": encoded(first, "TIFF", **more), "moving.apng": encoded(first, "PNG", **more),
        "deep.pgm": b"P5 32 32 65535\n" + np.asarray(deep).astype(">u2").tobytes(),
    }  # fmt: skip
    source = write_tree(tmp_path / "raw", {"class": files | NO_IMAGES, "moving": {"x": encoded(first, "GIF", **more)}})
    manifest = prepared(source)
    assert (manifest.counts, manifest.skipped) == ([len(files), 1], 0)
    said = capsys.readouterr().out
    assert f"left out: no known image format: {len(NO_IMAGES)} (" in said
    kinds = said.split("(")[1].split(", ")
    assert len({Path(name).suffix for name in kinds[:3]}) == 3  # one of each suffix comes first
    pixels = [image.tobytes() for _, image, _ in stored(tmp_path / "out/train/8")]
    assert pixels.count(cut_square(first, 8, "adm").tobytes()) == 4  # the first of several; a GIF has 256 colours
    grey = cut_square(Image.fromarray((np.asarray(deep) >> 8).astype(np.uint8)).convert("RGB"), 8, "adm")
    assert grey.tobytes() in pixels


def test_an_archive_is_sorted_out_as_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = train_files(2)
    files[WNIDS[0]] |= {"x.jfif": jpeg(), "y": encoded(picture(), "PPM"), "._z.JPEG": b"x", **NO_IMAGES}
    archive, tree = write_train_archive(tmp_path / "same", files), write_tree(tmp_path / "tree/same", files)
    said = []
    for source, out in ((archive, tmp_path / "a"), (tree, tmp_path / "b")):
        prepare_imagenet(source, out, resolutions=[8], workers=1)
        said.append(sorted(capsys.readouterr().out.splitlines()[0].removeprefix("left out: ").split("; ")))
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert read_manifest(tmp_path / "a/train/8").count == 10
    assert said[0] == said[1] and said[0][0] == f"hidden: 1 ({WNIDS[0]}/._z.JPEG)"


@pytest.mark.timeout(120)  # a pipe that is opened waits for ever
def test_links_pipes_and_sockets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, here = tiny_tree(tmp_path / "raw", classes=2, per_class=2), Path.cwd()
    folder = source / "class0"
    (tmp_path / "elsewhere.png").write_bytes(encoded(picture()))
    for name, target in {
        "linked.png": tmp_path / "elsewhere.png", "linked": tmp_path / "elsewhere.png", "broken": "/nowhere",
        "broken.jpg": "/nowhere", "circle.jpg": "circle.jpg", "loop": "..", "loop.png": ".", "../itself": ".",
        "../linked class": "class1", "../broken class": "/nowhere",
    }.items():  # fmt: skip
        os.symlink(target, folder / name)
    for name in ("pipe", "pipe.png"):
        os.mkfifo(folder / name)
    os.chdir(folder)  # the path of a socket may not be long
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as other:
        one.bind("socket")
        other.bind("socket.gif")
    os.chdir(here)
    (folder / "folder.jpg").mkdir()
    (folder / "folder.jpg/inside.png").write_bytes(encoded(picture()))
    (folder / ".checkpoints").mkdir()
    manifest = prepared(source)
    assert (manifest.classes, manifest.counts) == (["class0", "class1", "linked class"], [5, 2, 2])
    reasons = {entry["name"]: entry["reason"] for entry in manifest.extra["skipped"]}
    assert reasons == {
        "class0/broken.jpg": "broken link", "class0/circle.jpg": "broken link", "class0/loop.png": "link to a folder",
        "class0/pipe.png": "no plain file", "class0/socket.gif": "no plain file",
    }  # fmt: skip
    said = capsys.readouterr()
    for kind in (
        "beside the class folders: 1 (broken class)", "link to a folder that holds it: 1 (itself)", "hidden: 1 (",
        "link to a folder: 1 (class0/loop)", "no plain file: 2 (class0/pipe, class0/socket)", "broken link: 1 (",
        "5 unreadable images left out", "the first unreadable one is class0/",
    ):  # fmt: skip
        assert kind in said.out
    assert "skipped class0/pipe.png: no plain file" in said.err


def test_files_without_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_tree(tmp_path / "raw", classes=1, per_class=3)
    (source / "class0/closed").mkdir()
    scandir = os.scandir

    def closed(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    def read(raw: RawImage) -> bytes:
        if raw.name.endswith("1.bmp"):
            raise PermissionError(13, "Permission denied", raw.file)
        return Path(raw.file).read_bytes()

    monkeypatch.setattr(os, "scandir", closed)  # root may read what others may not
    monkeypatch.setattr(RawImage, "read", read)
    assert prepared(source).extra["skipped"] == [{"name": "class0/0001.bmp", "reason": "permission denied"}]
    assert "left out: folder, permission denied: 1 (class0/closed)" in capsys.readouterr().out


def test_a_shard_or_a_set_without_a_readable_image(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "raw", {"a": {f"{i}.png": b"no image" for i in range(3)}})
    sentence_of_error(lambda: prepared(source), "raw holds no image that can be read: no known image format")
    assert not list(tmp_path.rglob("manifest.json"))
    (source / "a/whole.png").write_bytes(encoded(picture(8, 8)))
    manifest = prepared(source, images_per_shard=1, out="more")
    assert sorted(shard.count for shard in manifest.shards) == [0, 0, 0, 1]
    stream = iter(ShardStream(tmp_path / "more/train/8", manifest, 8, batch_size=5, window=1))
    assert [len(next(stream)[0]) for _ in range(3)] == [5, 5, 5]  # one image fills any batch


# ----------------------------------------------------------------------------------------------------- names of classes

UNFIT = {
    b"caf\xe9": "'caf\\udce9'",
    b"two\nlines": "'two\\nlines'",
    b"tab\there": "'tab\\there'",
    b"\x1b[31m": "'\\x1b[31m'",
}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names themselves")
@pytest.mark.parametrize("name", UNFIT)
def test_names_that_no_manifest_can_hold_are_refused_first(tmp_path: Path, name: bytes) -> None:
    source = tiny_tree(tmp_path / "raw", classes=1, per_class=1)
    os.mkdir(os.fsencode(source) + b"/" + name)
    (source / "class0/x").write_bytes(b"")
    refused(source, f"raw holds a folder {UNFIT[name]}: the name of a class must be printable")


def test_two_spellings_of_one_name_are_refused(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "raw", {"caf\xe9": {"x.png": jpeg()}, "cafe\u0301": {"x.png": jpeg()}})
    refused(source, r"holds 'cafe\u0301' and 'caf\xe9': two classes cannot have one name")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names themselves")
def test_odd_names_are_carried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = sorted(["Cat", "cat", " cat", "cat ", "..cat", "a" * 255, "'\"\\%s{}", "猫", "-r"])
    source = write_tree(tmp_path / os.fsdecode(b"raw\n\xe9"), {name: {"x.png": jpeg()} for name in names})
    (source / "cat" / os.fsdecode(b"\xe9\x1b.png")).write_bytes(b"")
    (source / "cat" / os.fsdecode(b"\xe9\x1b.txt")).write_bytes(b"")
    manifest = prepared(source, out=os.fsdecode(b"out\xe9"))
    hidden = names.index("..cat")
    assert manifest.classes == names[:hidden] + names[hidden + 1 :] and set(manifest.counts) == {1}
    assert manifest.source == r"raw\n\udce9"
    said = capsys.readouterr()
    assert r"no known image format: 1 (cat/\udce9\x1b.txt)" in said.out and r"out\udce9" in said.out
    assert r"skipped cat/\udce9\x1b.png: an empty file" in said.err


# ------------------------------------------------------------------------------------------------------ layouts, splits


def test_pictures_below_a_class_folder_are_found(tmp_path: Path) -> None:
    files = train_files(2)
    source = tmp_path / "raw/train"
    for wnid, inner in files.items():  # as tiny-imagenet-200 has them
        write_tree(source / wnid, {"images": inner})
        (source / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t10\t63\t58\n")
    for command, out in ((prepare_folder, tmp_path / "a"), (prepare_imagenet, tmp_path / "b")):
        command(source, out, resolutions=[8], workers=1)
    assert read_manifest(tmp_path / "a/train/8").counts == [2] * 4
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_tables_of_labels_and_wrong_levels_are_refused(tmp_path: Path) -> None:
    val = write_tree(tmp_path / "set/val", {"images": {f"val_{i}.JPEG": jpeg() for i in range(3)}})
    prepared(val, split="val", out="one class")
    (val / "val_annotations.txt").write_text("".join(f"val_{i}.JPEG\tn03444034\t0\t32\n" for i in range(3)))
    refused(val, "val holds one folder, images, and val_annotations.txt, a table", "give it by --labels")
    flat = val / "images"
    refused(flat, "images has no subfolders: one folder per class is expected")
    (flat / "labels.csv").write_text("val_0.JPEG,cat\n")
    refused(flat, "or a table of their classes by --labels, such as labels.csv")
    for split in ("Train", "val"):
        shutil.copytree(flat, tmp_path / "whole" / split / "cat")
    refused(tmp_path / "whole", "whole holds Train, val: give one split as the source")
    (tmp_path / "whole/Train").rename(tmp_path / "whole/training_set")
    refused(tmp_path / "whole", "whole holds training_set, val: give one split as the source")
    (tmp_path / "around").mkdir()
    (tmp_path / "whole").rename(tmp_path / "around/archive")
    refused(tmp_path / "around", "around/archive holds training_set, val: give one split as the source")


def test_a_single_class_of_several_folders_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It may be what is wanted, as of a set of faces in numbered folders, or a folder too high."""
    write_tree(tmp_path / "pets/PetImages", {name: {"0.jpg": jpeg()} for name in ("Cat", "Dog")})
    assert prepared(tmp_path / "pets").counts == [2]
    assert (
        "one class, PetImages, is made of the images in 2 folders, Cat, Dog: if those are classes, give --source "
        f"{tmp_path}/pets/PetImages\n" in capsys.readouterr().out
    )
    write_tree(tmp_path / "more/lions", {"a": {"0.jpg": jpeg()}, "b": {"0.jpg": jpeg()}})
    write_tree(tmp_path / "more", {"tigers": {"0.jpg": jpeg()}, "bullet_train": {"0.jpg": jpeg()}})
    assert prepared(tmp_path / "more", out="more out").counts == [1, 2, 1]
    assert "one class" not in capsys.readouterr().out


def test_classes_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_tree(tmp_path / "train", classes=4, per_class=1)
    (source / "class0/0000.bmp").unlink()
    (source / "class0/.DS_Store").write_bytes(b"")
    assert prepared(source).counts == [0, 1, 1, 1]
    assert "1 of 4 classes have no images: class0" in capsys.readouterr().out
    val = tiny_tree(tmp_path / "val", classes=3, per_class=2)
    (val / "class1").rename(val / "class3")
    manifest = prepared(val, split="val")
    assert (manifest.classes, manifest.counts) == ([f"class{i}" for i in range(4)], [2, 0, 2, 2])
    assert {label for _, _, label in stored(tmp_path / "out/val/8")} == {0, 2, 3}
    assert "1 of 4 classes have no images: class1" in capsys.readouterr().out

    prepared(val, split="val", out="val first")
    sentence_of_error(lambda: prepared(source, out="val first"), "or train be prepared first and val lack some")
    (source / "class0/a.heic").write_bytes(NO_IMAGES["phone.heic"])
    refused(source, "class0 holds no images that can be read; left out are", "no known image format: 1 (class0/a.heic)")


# --------------------------------------------------------------------------------------------------- ImageNet, unpacked


def test_validation_images_in_one_folder_are_labelled_by_the_devkit(tmp_path: Path) -> None:
    archive, files = val_archive(tmp_path, [3, 1, 4, 2, 2, 1])
    prepare_imagenet(archive, tmp_path / "a", "val", [8], workers=1)
    folder = tmp_path / "other/ILSVRC2012_img_val.tar"  # whose name the manifest holds
    write_tree(folder.parent, {folder.name: files})
    (folder / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n")
    refused(
        folder,
        "does not exist: without",
        "or give Kaggle's LOC_val_solution.csv by --labels",
        imagenet=True,
        split="val",
    )
    refused(folder, "holds the validation images, ILSVRC2012_val_...: give --split val", imagenet=True)
    devkit = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(devkit) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    kit = tmp_path / "unpacked/ILSVRC2012_devkit_t12"
    prepare_imagenet(folder, tmp_path / "given", "val", [8], devkit=kit, workers=1)
    shutil.copy(devkit, folder)
    prepare_imagenet(folder, tmp_path / "inside", "val", [8], workers=1)
    (folder / devkit.name).unlink()
    shutil.copytree(kit, folder.parent / kit.name)
    prepare_imagenet(folder, tmp_path / "beside", "val", [8], workers=1)
    assert (
        hashes(tmp_path / "a")
        == hashes(tmp_path / "given")
        == hashes(tmp_path / "inside")
        == hashes(tmp_path / "beside")
    )
    os.remove(folder / "ILSVRC2012_val_00000002.JPEG")
    refused(folder, "labels 6 images and", "holds 5: they must be equal", imagenet=True, split="val")
    write_devkit(devkit, [1])
    (kit / "data/meta.mat").unlink()
    refused(folder, "is not ILSVRC2012_devkit_t12.tar.gz as downloaded", imagenet=True, split="val", devkit=kit)


def test_a_folder_of_class_archives_equals_the_training_archive(tmp_path: Path) -> None:
    files = train_files(3)
    prepare_imagenet(write_train_archive(tmp_path / "same", files), tmp_path / "a", resolutions=[8], workers=1)
    source = tmp_path / "tars/same"
    source.mkdir(parents=True)
    for wnid, inner in files.items():
        (source / f"{wnid}.tar").write_bytes(tar_bytes(inner))
    (source / "unpack.sh").write_text("")
    prepare_imagenet(source, tmp_path / "b", resolutions=[8], workers=1)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    os.mkfifo(source / "n00000000.tar")
    (source / WNIDS[0]).mkdir()
    refused(source, f"holds {WNIDS[0]} beside nXXXXXXXX.tar: is it unpacked in part?", imagenet=True)
    (source / WNIDS[0]).rmdir()
    (source / "n99999999.tar").write_bytes(tar_bytes({"notes.txt": b"x"}))
    refused(source, "n99999999.tar holds no images: every class needs at least one", imagenet=True)


def test_shards_do_not_go_among_the_class_folders(tmp_path: Path) -> None:
    source = tiny_tree(tmp_path / "raw", classes=1, per_class=1)
    (source / "__MACOSX").mkdir()
    sentence_of_error(lambda: prepared(source, out="raw"), "is the source itself")
    assert prepared(source).classes == ["class0"]


def test_a_source_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    out = tmp_path / "out"
    for call in (
        lambda: prepare_folder(pipe, out),
        lambda: prepare_folder(pipe, out, labels=tmp_path / "list.csv"),
        lambda: prepare_lsun(pipe, out),
        lambda: prepare_imagenet(pipe, out, "val"),
    ):
        sentence_of_error(call, "pipe is neither a file nor a folder")
