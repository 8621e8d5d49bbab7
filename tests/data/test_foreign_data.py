"""Shards, archives and pictures from strangers: used, or refused in one sentence, and none takes all memory."""

import gzip
import hashlib
import io
import json
import struct
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folders import make_folder
from hypothesis import strategies as st
from refusals import sentence_of_error
from strangers import examples, mutated_bytes, mutated_json, taking_less_than, tried

from cdm_lightning.data.preparation.imagenet import list_train_archive, list_val_archive
from cdm_lightning.data.preparation.raw_images import decode as decode_raw
from cdm_lightning.data.shards import Manifest, Shard, read_manifest, read_shard
from cdm_lightning.data.shards.reading import decode_sample
from cdm_lightning.data.shards.tar import MAX_FILE_BYTES
from cdm_lightning.data.stream import ShardStream

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]


@examples(150, 4000)
def test_manifests(tmp_path, n):
    make_folder(tmp_path / "train/8", [3, 2])
    folder, whole = tmp_path / "train/8", json.loads((tmp_path / "train/8/manifest.json").read_text())

    def use(table):
        (folder / "manifest.json").write_text(json.dumps(table))
        manifest = read_manifest(folder)
        for batch in ShardStream(folder, manifest, manifest.resolution, 2, end=manifest.count):
            assert batch[0].dtype == torch.uint8

    tried(n, whole, mutated_json(whole), use)


@examples(60, 1000)
def test_manifests_of_random_bytes(tmp_path, n):
    manifest = make_folder(tmp_path, [3])
    path = tmp_path / "manifest.json"
    data = path.read_bytes()
    assert manifest.count == 3
    tried(n, data, mutated_bytes(data), lambda mutated: (path.write_bytes(mutated), read_manifest(tmp_path)))


@examples(150, 4000)
def test_shards(tmp_path, n):
    """The manifest vouches for the bytes, so that what is read is what the stranger wrote."""
    manifests = {}
    for suffix in (".tar", ".tar.gz"):
        manifests[suffix] = make_folder(tmp_path / suffix, [4], suffix=suffix)

    def use(given_input):
        suffix, data = given_input
        folder, manifest = tmp_path / suffix, manifests[suffix]
        path = folder / manifest.shards[0].name
        path.write_bytes(data)
        shard = Shard(path.name, 4, len(data), hashlib.sha256(data).hexdigest())
        for batch in ShardStream(folder, replace(manifest, shards=[shard]), 8, 4, end=4):
            assert batch[0].shape == (4, 1, 8, 8) and int(batch[1].min()) >= 0 and int(batch[1].max()) < 10

    def mutated(suffix):
        return mutated_bytes((tmp_path / suffix / f"000{suffix}").read_bytes()).map(lambda data: (suffix, data))

    whole = (".tar.gz", (tmp_path / ".tar.gz/000.tar.gz").read_bytes())
    tried(n, whole, st.one_of(mutated(".tar"), mutated(".tar.gz")), use)


@examples(100, 2500)
def test_pngs(tmp_path, n):
    manifest = make_folder(tmp_path, [1], channels=3)
    [sample] = read_shard(tmp_path / "000.tar")

    def use(data):
        image, label = decode_sample({**sample, "png": data}, manifest)
        assert image.shape == (8, 8, 3) and label == 0

    tried(n, sample["png"], mutated_bytes(sample["png"]), use)


def bomb(width, height):
    """A PNG that claims a size, with a kilobyte of pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    about = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", about)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )


def test_a_png_that_claims_to_be_huge_is_refused_before_memory_is_taken(tmp_path):
    manifest = Manifest(8, 3, "train", ["a"], [1], [])
    for size in ((100_000, 100_000), (12_000, 12_000), (8, 12_000)):
        sample = {"__key__": "0", "__url__": "x.tar", "png": bomb(*size), "cls": b"0"}
        rule = "where 8x8 is expected" if size[0] < 10**5 else ""
        with taking_less_than(50e6):
            sentence_of_error(lambda s=sample: decode_sample(s, manifest), "x.tar", rule)
    with pytest.raises(ValueError, match="decompression bomb"):  # which `cdm prepare` counts as unreadable
        decode_raw(bomb(100_000, 100_000))


def test_a_picture_that_another_program_would_draw_is_no_image(tmp_path, monkeypatch):
    """Pillow gives PostScript to Ghostscript, whatever the file's name ends in."""
    started = []
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: started.append(a))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(ValueError, match="no known image format"):
        decode_raw(script)
    assert not started


def tar_of(*members):
    """A tar of (name, data or TarInfo's changes) entries."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, dict):
                for key, value in data.items():
                    setattr(info, key, value)
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


MEMBERS = {
    "absolute": ("/tmp/pwned.png", b"x"),
    "parent": ("../pwned.png", b"x"),
    "parent inside": ("a/../../pwned.png", b"x"),
    "symbolic link": ("0.png", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
    "hard link": ("0.png", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"}),
    "device": ("0.png", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}),
    "fifo": ("0.png", {"type": tarfile.FIFOTYPE}),
    "control signs": ("a\x1b[31m\n.png", b"x"),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_members_that_could_reach_outside_are_refused_by_name(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    member, rule = MEMBERS[case], "is refused" if isinstance(MEMBERS[case][1], bytes) else "plain files alone are read"
    for data in (tar_of(("0.cls", b"1"), member), gzip.compress(tar_of(member))):
        Path("x.tar").write_bytes(data)
        sentence_of_error(lambda: list(read_shard(Path("x.tar"))), "x.tar holds", repr(member[0]), rule)
    Path("raw.tar").write_bytes(tar_of(member))
    for read in (
        lambda: list_train_archive(Path("raw.tar")),
        lambda: list_val_archive(Path("raw.tar"), Path("d"), None),
    ):
        sentence_of_error(read, "raw.tar holds", repr(member[0]), rule)
    Path("devkit.tar.gz").write_bytes(gzip.compress(tar_of(member)))
    Path("val.tar").write_bytes(tar_of(("ILSVRC2012_val_00000001.JPEG", b"x")))
    sentence_of_error(
        lambda: list_val_archive(Path("val.tar"), Path("devkit.tar.gz"), None), "devkit.tar.gz holds", repr(member[0])
    )
    assert {p.name for p in tmp_path.iterdir()} == {"x.tar", "raw.tar", "devkit.tar.gz", "val.tar"}


def test_archives_that_claim_or_unpack_to_more_than_they_should(tmp_path):
    path = tmp_path / "x.tar.gz"
    info = tarfile.TarInfo("0.png")
    info.size = 10**12
    path.write_bytes(gzip.compress(info.tobuf() + bytes(10240)))
    sentence_of_error(
        lambda: list(read_shard(path)), f"'0.png' of {10**12} bytes: more than {MAX_FILE_BYTES} is no image"
    )
    info.size = MAX_FILE_BYTES
    many = info.tobuf() + bytes(MAX_FILE_BYTES)
    with gzip.open(path, "wb", compresslevel=1) as file:  # 256 MB of zeros
        for _ in range(4):
            file.write(many)
    with taking_less_than(4 * MAX_FILE_BYTES):
        sentence_of_error(lambda: [len(s) for s in read_shard(path)], "it unpacks to far more than its size")
    longname = tarfile.TarInfo("././@LongLink")
    longname.type, longname.size = tarfile.GNUTYPE_LONGNAME, 4 * MAX_FILE_BYTES
    with gzip.open(path, "wb", compresslevel=1) as file:  # a name of 256 MB
        file.write(longname.tobuf())
        for _ in range(4):
            file.write(bytes(MAX_FILE_BYTES))
    with taking_less_than(3 * MAX_FILE_BYTES):
        sentence_of_error(lambda: list(read_shard(path)), "it unpacks to far more than its size")
