"""`cdm prepare webdataset`: labels, names and order, tars from afar, and what is refused or left out."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, fit_command
from folders import hashes
from raw_sources import WNIDS, encoded, jpeg, picture, stored, tar_bytes, train_files, write_tree
from refusals import sentence_of_error, sentence_of_refusal

from cdm_lightning.__main__ import main
from cdm_lightning.data.preparation.class_labels import ClassLabels
from cdm_lightning.data.preparation.folders import prepare_folder
from cdm_lightning.data.preparation.webdataset import prepare_webdataset
from cdm_lightning.data.shards import read_manifest
from cdm_lightning.foundation import addresses

QUICK = {"resolutions": [8], "workers": 1, "images_per_shard": 5}


class Server(ThreadingHTTPServer):
    """Serves a folder over HTTP, but 503 for names in `failing`, and keeps what is asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        self.failing: set[str] = set()
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.removeprefix("/").partition("?")[0]
                server.asked.append(name)
                if name in server.failing:
                    self.send_error(503)
                else:
                    super().do_GET()

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.address = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(addresses, "PAUSES", (0.01, 0.01))
    (tmp_path / "tars").mkdir()
    served = Server(tmp_path / "tars")
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield served
    served.shutdown()
    served.server_close()


def png() -> bytes:
    return encoded(picture(12, 12))


def samples(labels, start=0, image=png) -> dict[str, bytes]:
    """The files of a tar: an image and its label for each of the labels."""
    return {
        f"{start + i:05d}.{ending}": data
        for i, label in enumerate(labels)
        for ending, data in (("png", image()), ("cls", str(label).encode()))
    }


def hub_shards(folder: Path, per_class: int = 3) -> dict[str, dict[str, bytes]]:
    """Two tars in the layout of the hub's ImageNet, and the same images by WNID."""
    files, tars = train_files(per_class), [{}, {}]
    flat = [(sorted(WNIDS).index(wnid), name, data) for wnid, inner in files.items() for name, data in inner.items()]
    for number, (label, name, data) in enumerate(sorted(flat, key=lambda one: one[2])):
        key = f"{Path(name).stem}_{WNIDS[0]}"
        about = json.dumps({"label": label, "filename": name, "inner": {"wnid": sorted(WNIDS)[label]}}).encode()
        tars[number % 2] |= {f"{key}.cls": str(label).encode(), f"{key}.jpg": data, f"{key}.json": about}
    folder.mkdir(exist_ok=True)
    for number, tar in enumerate(tars):
        (folder / f"imagenet1k-train-{number:04d}.tar").write_bytes(tar_bytes(tar))
    return files


def content(folder: Path) -> set[tuple[bytes, str]]:
    """Pixels and class name of every image."""
    classes = read_manifest(folder).classes
    return {(image.tobytes(), classes[label]) for _, image, label in stored(folder)}


def labels_of(folder: Path) -> list[int]:
    return sorted(label for *_, label in stored(folder))


@pytest.mark.parametrize("label", ["cls", "json:label", "json:inner.wnid"])
def test_the_hubs_imagenet_gives_the_images_and_labels_of_class_folders(tmp_path, label):
    files = hub_shards(tmp_path / "hub")
    (tmp_path / "wnids.txt").write_text("\n".join(sorted(WNIDS)) + "\n\n")
    (tmp_path / "wnids.json").write_text(json.dumps(sorted(WNIDS)))
    prepare_folder(write_tree(tmp_path / "raw", files), tmp_path / "a", **QUICK)
    source = f"{tmp_path}/hub/imagenet1k-train-{{0000..0001}}.tar"
    names = tmp_path / ("wnids.json" if label == "cls" else "wnids.txt")
    prepare_webdataset(source, tmp_path / "b", label=label, classes=names, **QUICK)
    ours = read_manifest(tmp_path / "b/train/8")
    assert ours.classes == sorted(WNIDS) and ours.counts == [3, 3, 3, 3] and ours.count == 12
    assert ours.source == "imagenet1k-train-{0000..0001}.tar"
    assert content(tmp_path / "b/train/8") == content(tmp_path / "a/train/8")
    assert not (tmp_path / "b/train/.progress").exists()


def test_shards_are_the_same_bytes_wherever_the_tars_lie(tmp_path, server, capsys):
    hub_shards(tmp_path / "tars")
    for tar in (tmp_path / "tars").glob("*.tar"):
        (tmp_path / "tars" / f"{tar.name}.gz").write_bytes(gzip.compress(tar.read_bytes()))
    names, here = "imagenet1k-train-{0000..0001}.tar", tmp_path / "tars"
    sources = {
        "local": f"{here}/{names}",
        "starred": f"{here}/*1.tar::{here}/*0.tar",
        "remote": f"{server.address}/{names}?token=secret",
        "packed": f"{server.address}/{names}.gz",
        "unpacked": f"file://{here}/{names}.gz",
        "piped": f"pipe:cat {here}/{names}",
    }
    for out, source in sources.items():
        prepare_webdataset(source, tmp_path / out, allow_commands=out == "piped", **QUICK)
    expected = hashes(tmp_path / "local", "*.tar")
    assert len(expected) == 3
    for out in sources:
        assert hashes(tmp_path / out, "*.tar") == expected, out
        assert [f.name for f in (tmp_path / out / "train").iterdir()] == ["8"], "what was staged is removed"
    assert "secret" not in (tmp_path / "remote/train/8/manifest.json").read_text()


def test_a_finished_folder_is_not_fetched_again(tmp_path, server, capsys):
    hub_shards(tmp_path / "tars")
    source = f"{server.address}/imagenet1k-train-{{0000..0001}}.tar"
    prepare_webdataset(source, tmp_path / "out", **QUICK)
    before, asked = hashes(tmp_path / "out"), len(server.asked)
    prepare_webdataset(source, tmp_path / "out", **QUICK)
    assert "is finished" in capsys.readouterr().out
    assert hashes(tmp_path / "out") == before
    sentence_of_error(lambda: prepare_webdataset(source, tmp_path / "out", **(QUICK | {"seed": 1})), "seed 0 (now 1)")
    other = f"{server.address}/imagenet1k-train-0000.tar"
    sentence_of_error(lambda: prepare_webdataset(other, tmp_path / "out", **QUICK), "was prepared with source")
    assert len(server.asked) == asked and hashes(tmp_path / "out") == before


def test_staging_goes_on_with_what_is_missing(tmp_path, server):
    hub_shards(tmp_path / "tars")
    source = f"{server.address}/imagenet1k-train-{{0000..0001}}.tar"
    server.failing = {"imagenet1k-train-0001.tar"}
    sentence_of_error(
        lambda: prepare_webdataset(source, tmp_path / "out", **QUICK),
        "imagenet1k-train-0001.tar could not be read in 3 tries, the server answers 503",
    )
    staged = tmp_path / "out/train/.progress/staged"
    assert [file.suffix for file in staged.iterdir()] == [".tar"]
    server.failing, server.asked = set(), []
    prepare_webdataset(source, tmp_path / "out", **QUICK)
    assert {name for name in server.asked} == {"imagenet1k-train-0001.tar"}
    prepare_webdataset(f"{tmp_path}/tars/imagenet1k-train-{{0000..0001}}.tar", tmp_path / "local", **QUICK)
    assert hashes(tmp_path / "out", "*.tar") == hashes(tmp_path / "local", "*.tar")


def test_a_killed_staging_goes_on(tmp_path):
    hub_shards(tmp_path / "tars")
    first, second = sorted((tmp_path / "tars").iterdir())
    log, ready = tmp_path / "log", tmp_path / "ready"
    source = (
        f"pipe:echo 0 >> {log}; cat {first}::"
        f"pipe:echo 1 >> {log}; head -c 3000 {second}; test -e {ready} || sleep 30; tail -c +3001 {second}"
    )
    words = ["--source", source, "--out", str(tmp_path / "out"), "--allow_commands", "true", "--resolutions", "8"]
    words += ["--workers", "1", "--images_per_shard", "5"]
    command = [sys.executable, "-m", "cdm_lightning", "prepare", "webdataset", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    staged = tmp_path / "out/train/.progress/staged"
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        while not (log.is_file() and log.read_text() == "0\n1\n" and list(staged.glob("*.raw"))):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert len(list(staged.glob("*.tar"))) == 1
    ready.touch()
    main(["prepare", "webdataset", *words])
    assert log.read_text() == "0\n1\n1\n"
    prepare_webdataset(f"{first}::{second}", tmp_path / "local", **QUICK)
    assert hashes(tmp_path / "out", "*.tar") == hashes(tmp_path / "local", "*.tar")


def test_a_label_without_names_is_the_number_of_its_class(tmp_path, capsys):
    (tmp_path / "t.tar").write_bytes(tar_bytes(samples([10, 2, 2, 0])))
    prepare_webdataset(str(tmp_path / "t.tar"), tmp_path / "out", **QUICK)
    manifest = read_manifest(tmp_path / "out/train/8")
    assert manifest.classes == [str(number) for number in range(11)]
    assert labels_of(tmp_path / "out/train/8") == [0, 2, 2, 10]
    said = capsys.readouterr().out
    assert "8 of 11 classes have no images" in said and "left out: " not in said
    (tmp_path / "v.tar").write_bytes(tar_bytes(samples([2, 9])))
    prepare_webdataset(str(tmp_path / "v.tar"), tmp_path / "out", split="val", **QUICK)
    assert read_manifest(tmp_path / "out/val/8").classes == manifest.classes
    assert labels_of(tmp_path / "out/val/8") == [2, 9]


def test_labels_are_names_of_classes_or_numbers_and_names_are_made_distinct(tmp_path):
    (tmp_path / "names.txt").write_text("crane\n7\ncrane\n")
    files = {"a.txt": b"crane (2)\n", "a.png": png(), "b.txt": b"7", "b.png": png(), "c.TXT": b"0", "c.PNG": png()}
    (tmp_path / "t.tar").write_bytes(tar_bytes(files))
    prepare_webdataset(
        str(tmp_path), tmp_path / "out", label="txt", image="png", classes=tmp_path / "names.txt", **QUICK
    )
    assert read_manifest(tmp_path / "out/train/8").classes == ["crane", "7", "crane (2)"]
    assert labels_of(tmp_path / "out/train/8") == [0, 1, 2]


def test_names_that_are_numbers_are_never_guessed():
    ratings = ClassLabels(["1", "2", "30"])
    assert ratings.class_of(0, "a.json") == "1" and ratings.class_of(1, "a.json") == "2"  # whole numbers are indices
    assert ratings.class_of("30", "a.cls") == "30" and ratings.class_of("0", "a.cls") == "1"
    sentence_of_error(lambda: ratings.class_of("1", "a.cls"), "a.cls", "the label 1", "class 0", "another")
    assert ClassLabels(["1", "2"], numbers=True).class_of("1", "a.cls") == "2"  # a column of integers
    for label in ("9" * 5000, 10**30):
        sentence_of_error(lambda label=label: ClassLabels().class_of(label, "a.cls"), "a.cls", "can be numbered")


def test_the_first_of_two_labels_stands_as_the_first_of_two_pictures_does(tmp_path, capsys):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for label in (b"1", b"0"):
            for name, data in (("a.png", png()), ("a.cls", label)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    prepare_webdataset(str(tmp_path / "t.tar"), tmp_path / "out", **QUICK)
    assert labels_of(tmp_path / "out/train/8") == [1]
    assert "second file of a name: 2 (t.tar/a.cls, t.tar/a.png)" in capsys.readouterr().out


def test_what_cannot_be_taken_is_left_out_by_kind(tmp_path, capsys):
    image = png()
    files = samples([0, 1]) | {
        "no_label.png": image, "no_image.cls": b"0", "two.webp": image, "two.jpg": jpeg(9, 9), "two.cls": b"1",
        "empty.png": image, "empty.cls": b" ", "._00000.png": b"x", "README": b"x", "__notes__": b"x",
        "d.x/00000.png": image, "d.x/00000.cls": b"1", "big.cls": bytes(1 << 21), "big.png": image,
    }  # fmt: skip
    (tmp_path / "t.tar").write_bytes(tar_bytes(files))
    prepare_webdataset(str(tmp_path / "t.tar"), tmp_path / "out", **QUICK)
    assert labels_of(tmp_path / "out/train/8") == [0, 1, 1, 1]
    said = capsys.readouterr().out
    for kind in (
        "without a label in cls: 3 (t.tar/big, t.tar/empty, t.tar/no_label)",
        "without jpg or jpeg or png or webp: 1 (t.tar/no_image)",
        "second image of a sample: 1 (t.tar/two.webp)",
        "hidden: 1 (t.tar/._00000.png)",
        "without an ending: 1 (t.tar/README)",
        "cls too large for a label: 1 (t.tar/big.cls)",
    ):
        assert kind in said
    jpg = next(image for _, image, label in stored(tmp_path / "out/train/8") if label == 1)
    assert isinstance(jpg, np.ndarray)


def test_tars_of_one_name_are_told_apart(tmp_path):
    for number, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.tar").write_bytes(tar_bytes(samples([number])))
    prepare_webdataset(f"{tmp_path}/{{a,b}}/0.tar", tmp_path / "out", **QUICK)
    assert labels_of(tmp_path / "out/train/8") == [0, 1]
    sentence_of_error(
        lambda: prepare_webdataset(f"{tmp_path}/a/0.tar::{tmp_path}/a/*.tar", tmp_path / "x", **QUICK), "0.tar twice"
    )


def test_bad_sources_are_one_sentence_and_leave_nothing(tmp_path, server):
    tars = tmp_path / "tars"
    good = tar_bytes(samples([0, 1]))
    for name, data in {
        "good.tar": good, "cut.tar": good[:3000], "cut.tar.gz": gzip.compress(good)[:-20], "page.tar": b"<html>" * 999,
        "bomb.tar.gz": gzip.compress(bytes(200 << 20)), "zstd.tar": b"\x28\xb5\x2f\xfd" + bytes(99), "empty.tar": b"",
        "words.tar": tar_bytes(samples(["cat"])), "high.tar": tar_bytes(samples([7])),
        "minus.tar": tar_bytes(samples([-1])), "huge.tar": tar_bytes(samples([10**9])),
        "txt.tar": tar_bytes({"a.png": b"x", "a.txt": b"1"}), "up.tar": tar_bytes({"../a.png": b"x"}),
        "bare.tar": tar_bytes({}), "notes.tar": tar_bytes({"README": b"x"}),
        "odd.tar": tar_bytes({"a.json": b"[" * 99, "a.png": b"x"}),
        "three": b"a\nb\nc\n", "none": b"\n", "binary": b"\xff\xfe\xfa", "list": b'["a", 3]',
    }.items():  # fmt: skip
        (tars / name).write_bytes(data)
    web = server.address
    for source, options, words in (
        (f"{tars}/x.tar", {}, f"{tars}/x.tar does not exist"),
        (f"{tars}/x*.tar", {}, "x*.tar matches no file"),
        (f"{tars}/x{{0..1}}.tar", {}, "x0.tar does not exist"),
        (f"{tars}/{{0..1.tar", {}, "cannot be expanded"),
        ("${nowhere}/x.tar", {}, "cannot be expanded: missing environment variable"),
        (f"{tars}/none/x.tar", {}, "does not exist"),
        (str(tmp_path), {}, "is a folder without a file that ends in .tar"),
        ("pipe:touch made", {}, "is a command, and a source may come from a stranger"),
        ("pipe:echo x; exit 3", {"allow_commands": True}, "ended with exit code 3"),
        (f"pipe:head -c 3000 {tars}/good.tar", {"allow_commands": True}, "cannot be read as a tar archive"),
        ("s3://bucket/x.tar", {}, 'pip install "cdm_lightning[s3]"'),
        ("nothing://x.tar", {}, "nothing://x.tar is no address"),
        (f"{web}/x.tar", {}, f"{web}/x.tar cannot be read: there is no such file"),
        (f"{web}/page.tar", {}, f"{web}/page.tar cannot be read as a tar archive"),
        (f"{web}/cut.tar", {}, f"{web}/cut.tar cannot be read as a tar archive"),
        (f"{web}/up.tar", {}, f"{web}/up.tar holds '../a.png'"),
        (f"{tars}/cut.tar.gz", {}, "cut.tar.gz cannot be unpacked"),
        (f"{tars}/bomb.tar.gz", {}, "unpacks to far more than its size"),
        (f"{web}/zstd.tar", {}, "is compressed by zstd"),
        (f"{tars}/empty.tar", {}, "empty.tar cannot be read as a tar archive"),
        (f"{web}/bare.tar", {}, "bare.tar holds no images"),
        (f"{web}/notes.tar", {}, "notes.tar holds no images; left out are without an ending: 1 (notes.tar/README)"),
        (f"{tars}/words.tar", {}, "'cat': it must be the number of a class, or be in --classes FILE"),
        (f"{tars}/words.tar", {"classes": tars / "three"}, "'cat', which is no class"),
        (f"{tars}/high.tar", {"classes": tars / "three"}, "label 7, which lies outside 0 ... 2"),
        (f"{web}/minus.tar", {}, "'-1'"),
        (f"{web}/huge.tar", {}, "1,000,000 classes at most"),
        (f"{web}/txt.tar", {}, "holds no image with a label: its files end in png, txt"),
        (f"{tars}/odd.tar", {"label": "json:a"}, "holds no image with a label"),
        (f"{tars}/good.tar", {"classes": tars / "nowhere"}, "nowhere cannot be read"),
        (f"{tars}/good.tar", {"classes": tars / "none"}, "none is empty"),
        (f"{tars}/good.tar", {"classes": tars / "binary"}, "neither lines of text nor a JSON list"),
        (f"{tars}/good.tar", {"classes": tars / "list"}, "gives class 1 the name 3"),
        (f"{tars}/good.tar", {"label": "png"}, "both are endings of files"),
        (f"{tars}/good.tar", {"image": ";"}, "both are endings of files"),
    ):
        sentence_of_error(lambda s=source, o=options: prepare_webdataset(s, tmp_path / "out", **QUICK, **o), words)
        assert not (tmp_path / "out").exists(), source
    assert not Path("made").exists()


def test_an_image_that_cannot_be_decoded_counts_as_unreadable(tmp_path):
    files = samples([0, 1, 1]) | {"bad.png": b"no image", "bad.cls": b"0"}
    (tmp_path / "t.tar").write_bytes(tar_bytes(files))
    sentence_of_error(lambda: prepare_webdataset(str(tmp_path / "t.tar"), tmp_path / "out", **QUICK), "max_corrupt")
    prepare_webdataset(str(tmp_path / "t.tar"), tmp_path / "out", max_corrupt=0.3, **QUICK)
    assert read_manifest(tmp_path / "out/train/8").skipped == 1


@pytest.mark.parametrize("place", [".", "train"])
def test_fit_says_how_shards_are_made_of_such_tars(tmp_path, capsys, place):
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "0.tar").write_bytes(tar_bytes(samples([0])))
    command = fit_command(f"--data.root={tmp_path}", f"--trainer.default_root_dir={tmp_path}/run")
    assert "`cdm prepare webdataset --source" in sentence_of_refusal(capsys, command)
