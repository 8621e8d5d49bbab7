"""Shards and manifests: the same bytes each time, and one sentence for whatever is wrong with a folder."""

import gzip
import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from folders import FASHION, make_folder, read_raw, repacked, with_member
from PIL import Image
from refusals import sentence_of_error
from torch.utils.data import DataLoader

from cdm_lightning.data.shards import find_folder, read_manifest, read_shard, write_manifest, write_shard
from cdm_lightning.data.stream import ShardStream
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import encode_png
from cdm_lightning.foundation.process_group import exit_with_sentence


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_folder_comes_back_as_it_was_written_and_as_the_same_bytes(tmp_path, suffix):
    manifest = make_folder(tmp_path / "a/train/8", [3, 5], suffix=suffix)
    assert make_folder(tmp_path / "b/train/8", [3, 5], suffix=suffix) == manifest and manifest.count == 8
    raw = read_raw(tmp_path / "a/train/8")
    samples = [s for shard in manifest.shards for s in read_shard(tmp_path / "a/train/8" / shard.name, shard.count)]
    assert [s["__key__"] for s in samples] == list(raw) and len(raw) == 8
    for sample, (image, label) in zip(samples, raw.values(), strict=True):
        assert np.array_equal(np.array(Image.open(io.BytesIO(sample["png"]))), image) and int(sample["cls"]) == label


def test_the_shards_that_ship_are_what_their_manifests_say():
    for split, count in [("train", 15_000), ("val", 3_000)]:
        manifest = read_manifest(FASHION / split / "32")
        assert manifest.count == count == sum(manifest.counts) and len(manifest.classes) == 10


def test_a_larger_folder_serves_where_halving_reaches_the_resolution(tmp_path):
    for resolution in ("24", "32", "64", "²", "x"):
        (tmp_path / "train" / resolution).mkdir(parents=True)
    for wanted, found in [(32, "32"), (16, "32"), (8, "32"), (64, "64"), (6, "24"), (12, "24"), (1, "32")]:
        assert find_folder(tmp_path, "train", wanted).name == found
    for wanted in (128, 7, 48):
        sentence_of_error(
            lambda w=wanted: find_folder(tmp_path, "train", w), f"resolution {wanted}: stored are [24, 32, 64]"
        )
    sentence_of_error(lambda: find_folder(tmp_path, "val", 8), f"{tmp_path / 'val'} does not exist")


BAD_MANIFESTS = {
    "not JSON": lambda m: "{",
    "not a table": lambda m: "[1, 2]",
    "no shards": lambda m: json.dumps({k: v for k, v in m.items() if k != "shards"}),
    "a key unknown": lambda m: json.dumps({**m, "colour": "blue"}),
    "a key missing": lambda m: json.dumps({k: v for k, v in m.items() if k != "channels"}),
    "a shard's key unknown": lambda m: json.dumps({**m, "shards": [{**m["shards"][0], "md5": ""}]}),
    "a count as text": lambda m: json.dumps({**m, "shards": [{**m["shards"][0], "count": "3"}]}),
    "a count below 0": lambda m: json.dumps({**m, "shards": [{**m["shards"][0], "count": -3}, m["shards"][1]]}),
    "a resolution as text": lambda m: json.dumps({**m, "resolution": "8"}),
    "a name as number": lambda m: json.dumps({**m, "shards": [{**m["shards"][0], "name": 7}]}),
    "not text": lambda m: b"\xff\xfe\x00",
}


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_a_bad_manifest_is_refused(tmp_path, case):
    make_folder(tmp_path / "train/8", [3, 2])
    path = tmp_path / "train/8/manifest.json"
    text = BAD_MANIFESTS[case](json.loads(path.read_text()))
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    sentence_of_error(lambda: read_manifest(path.parent), f"{path} is not a manifest of shards: ")


@pytest.mark.parametrize("name", ["../8/000.tar", "/etc/passwd", "x/000.tar", "..", "", "pipe:touch hacked"])
def test_a_manifest_cannot_name_a_file_outside_its_folder(tmp_path, name):
    manifest = make_folder(tmp_path / "train/8", [3])
    write_manifest(tmp_path / "train/8", replace(manifest, shards=[replace(manifest.shards[0], name=name)]))
    sentence_of_error(lambda: read_manifest(tmp_path / "train/8"), str(tmp_path / "train/8"))


def test_a_missing_unfinished_or_cut_folder_is_refused(tmp_path):
    folder = tmp_path / "train/8"
    sentence_of_error(lambda: read_manifest(folder), f"{folder} holds no manifest.json")
    folder.mkdir(parents=True)
    sentence_of_error(lambda: read_manifest(folder), f"{folder} holds no manifest.json")
    manifest = make_folder(folder, [3, 2])
    tar = folder / "001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    sentence_of_error(lambda: read_manifest(folder), f"{tar} has {manifest.shards[1].bytes - 512} bytes")
    tar.unlink()
    sentence_of_error(lambda: read_manifest(folder), f"{tar} is missing: the manifest lists it with 2 images")
    write_manifest(folder, replace(manifest, shards=[]))
    sentence_of_error(lambda: read_manifest(folder), "holds no images")


def image_of(shape):
    return encode_png(np.zeros(shape, np.uint8))


BAD_CONTENT = {
    "zeros": (lambda p: bytes(p.stat().st_size), "holds 0 images where its manifest says 5"),
    "garbage": (lambda p: b"x" * p.stat().st_size, "cannot be read: ReadError: invalid header"),
    "cut": (lambda p: p.read_bytes()[:3000], "cannot be read: ReadError: unexpected end of data"),
    "torn gzip": (lambda p: gzip.compress(p.read_bytes())[:-40], "cannot be read: EOFError: Compressed file ended"),
    "an image too few": (lambda p: repacked(p, lambda n, d: None if "03." in n else d), "holds 4 images where"),
    "no picture": (with_member("00000004.png", None), "image 00000004 of", "cannot be decoded: KeyError: 'png'"),
    "no label": (with_member("00000004.cls", None), "image 00000004 of", "cannot be decoded: KeyError: 'cls'"),
    "a torn picture": (lambda p: repacked(p, lambda n, d: d[:80] if "04.p" in n else d), "00000004 of", "OSError"),
    "no picture at all": (with_member("00000003.png", b"<html>"), "image 00000003 of", "cannot be decoded"),
    "a label out of range": (with_member("00000004.cls", b"10"), "has label 10, outside 0 ... 9"),
    "a label below 0": (with_member("00000004.cls", b"-1"), "has label -1, outside 0 ... 9"),
    "a label of words": (with_member("00000004.cls", b"cat"), "image 00000004 of", "cannot be decoded: ValueError"),
    "another resolution": (with_member("00000004.png", image_of((4, 4, 1))), "it is 4x4 where 8x8 is expected"),
    "colour": (
        with_member("00000004.png", image_of((8, 8, 3))),
        "has shape (8, 8, 3) where its manifest says (8, 8, 1)",
    ),
}


@pytest.mark.parametrize("case", BAD_CONTENT)
def test_bad_content_that_the_manifest_vouches_for_is_refused_while_reading(tmp_path, case, capsys):
    change, *parts = BAD_CONTENT[case]
    manifest = make_folder(tmp_path, [5])
    path = tmp_path / "000.tar"
    path.write_bytes(change(path))
    other = ShardStream(tmp_path, manifest, 8, 2)
    sentence_of_error(lambda: next(iter(other)), f"{path} is not the file its manifest lists: its SHA-256 is another")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    stream = ShardStream(tmp_path, replace(manifest, shards=[replace(manifest.shards[0], sha256=digest)]), 8, 2)
    sentence = sentence_of_error(lambda: [None for _ in zip(range(3), stream, strict=False)], str(path), *parts)
    if case in ("garbage", "a label out of range", "a torn picture"):  # forking workers for all would take long
        batches = iter(DataLoader(stream, batch_size=None, num_workers=2))
        with pytest.raises(InputError) as caught:
            list(batches)
        batches._shutdown_workers()  # as Lightning does; left to the garbage collector it takes seconds
        assert exit_with_sentence(caught.value) == 2
        assert capsys.readouterr().err == f"cdm: error: {sentence}\n"


@pytest.mark.parametrize("name", ["{a,b} [c] 1.tar", "a::b.tar", "pipe:echo.tar", "x?y#z%20.tar", "data:x.tar"])
def test_a_path_is_a_path_and_never_a_pattern_an_address_or_a_command(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_shard(Path(name), [("0", b"png", 1)])
    assert [s["cls"] for s in read_shard(Path(name), 1)] == [b"1"]


def test_a_shard_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    write_shard(tmp_path / "000.tar", [("0", b"old", 1)])

    def full(self, data):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    sentence_of_error(
        lambda: write_shard(tmp_path / "000.tar", [("0", b"new", 1)]), "could not be written: No space left"
    )
    assert [s["png"] for s in read_shard(tmp_path / "000.tar")] == [b"old"]
    assert [f.name for f in tmp_path.iterdir()] == ["000.tar"]
