"""Packed shards: the sequence of the PNG form to the bit, damage told row by row, nothing hostile believed."""

import hashlib
import io
import json
import pickle
import tarfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from dealt_images import SIZES, contents, deal, flat, places, record_run
from folders import FASHION, make_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from refusals import sentence_of_error

from cdm_lightning.data.preparation.folders import prepare_folder
from cdm_lightning.data.shards import open_images, packed, read_manifest, write_manifest, write_packed
from cdm_lightning.data.shards.packed import NPY_HEADER_BYTES, PackedShard, npy_header
from cdm_lightning.data.stream import ShardStream
from cdm_lightning.evaluation.real_images import read_images, write_subset
from cdm_lightning.evaluation.report.stored_samples import first_of_each_class, read_pictures
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import decode_png, encode_photo
from cdm_lightning.sampling.blocks import BlockDataset
from cdm_lightning.sampling.manifest import SampleManifest

pytestmark = pytest.mark.filterwarnings("ignore")


def pack(source, folder):
    """The same folder in the packed form."""
    manifest, shards = read_manifest(source), []
    for shard in manifest.shards:
        opened = open_images(source, manifest, [shard], range(shard.count))
        image, label, _ = opened.read(range(shard.count))
        keys = [opened.key(item) for item in range(shard.count)]
        shards.append(write_packed(folder / f"{Path(shard.name).name.partition('.')[0]}.tar", image, label, keys))
    write_manifest(folder, replace(manifest, shards=shards))
    return read_manifest(folder)


def both(tmp_path, sizes=SIZES, **options):
    make_folder(tmp_path / "png/train/8", sizes, **options)
    pack(tmp_path / "png/train/8", tmp_path / "packed/train/8")
    return tmp_path / "png/train/8", tmp_path / "packed/train/8"


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    return both(tmp_path_factory.mktemp("forms"), channels=3)


# ---------------------------------------------------------------------------------------------------------- the same


def test_a_packed_shard_comes_back_and_is_the_same_bytes_each_time(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    labels, keys = [3, 1, 4, 1, 5], ["a", "bb", "c", "d", "00000004"]
    shard = write_packed(tmp_path / "a/0.tar", images, labels, keys)
    assert shard == write_packed(tmp_path / "b/0.tar", images.copy(order="F"), np.array(labels), keys)
    data = (tmp_path / "a/0.tar").read_bytes()
    assert data == (tmp_path / "b/0.tar").read_bytes() and len(data) == shard.bytes
    assert shard.sha256 == hashlib.sha256(data).hexdigest()
    assert data[shard.head : shard.head + images.nbytes] == images.tobytes()  # by offset, and from one head
    assert shard.head_sha256 == hashlib.sha256(data[: shard.head]).hexdigest()
    with tarfile.open(tmp_path / "a/0.tar") as tar:
        assert tar.getnames() == ["0.labels.npy", "0.crc.npy", "0.keys.npy", "0.images.npy"]
    sentence_of_error(lambda: write_packed(tmp_path / "c/0.tar", images[:1], [0], ["é"]), "cannot hold the key 'é'")
    sentence_of_error(lambda: write_packed(tmp_path / "c/0.tar", images[:1], [0], ["x" * 65]), "64 characters at most")
    assert not (tmp_path / "c").exists()


def test_any_reader_of_webdataset_decodes_it(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1), dtype=np.uint8)
    write_packed(tmp_path / "000007.tar", images, range(5), [f"{i:08d}" for i in range(5)])
    [sample] = wds.WebDataset(str(tmp_path / "000007.tar"), shardshuffle=False).decode()
    assert sample["__key__"] == "000007" and np.array_equal(sample["images.npy"], images)
    assert sample["labels.npy"].tolist() == [0, 1, 2, 3, 4] and sample["keys.npy"][3] == b"00000003"
    assert sample["labels.npy"].dtype == np.int64 and sample["crc.npy"].dtype == np.uint32


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_the_sequence_is_that_of_the_png_form(forms, world_size, workers):
    for options in [{"flip": True, "end": 130}, {"shuffle": False, "end": 53, "start": 5}][: 1 if workers else 2]:
        png, pack = (deal(folder, world_size, workers, **options) for folder in forms)
        for expected, found in zip(png, pack, strict=True):
            assert len(found) == len(expected) > 3
            for batch, other in zip(expected, found, strict=True):
                assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(batch, other, strict=True))
    half = [ShardStream(folder, read_manifest(folder), 4, 16, flip=True, end=53) for folder in forms]
    for batch, other in zip(*half, strict=True):
        assert batch[0].shape[1:] == (3, 4, 4) and all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))


@settings(max_examples=30, deadline=None, database=None)
@given(st.integers(0, 120), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
def test_any_place_starts_the_tail_of_the_sequence(forms, start, world_size, window, batch_size):
    manifest = read_manifest(forms[1])

    def walk(end, rank=0, **options):
        return list(ShardStream(forms[1], manifest, 8, batch_size, rank, window=window, end=end, **options))

    whole = contents(walk(159))
    for rank in range(world_size):
        own = walk(159, rank, start=start, world_size=world_size, flip=False)
        assert places(own) == list(range(start + rank, 159, world_size))
        assert contents(own).items() <= whole.items()


def test_a_run_goes_on_in_the_packed_form_where_it_was(tmp_path):
    for split in ("train", "val"):
        make_folder(tmp_path / "png" / split / "8", SIZES)
        pack(tmp_path / "png" / split / "8", tmp_path / "d" / split / "8")
    whole = record_run(tmp_path / "d", tmp_path / "a", max_steps=6, workers=2)
    again = record_run(tmp_path / "d", tmp_path / "b", tmp_path / "a/step=2.ckpt", max_steps=6)
    assert flat(whole.seen) == list(range(72)) and flat(again.seen) == list(range(24, 72))


def test_every_reader_takes_both_forms(tmp_path):
    forms = both(tmp_path, [20, 23, 10], channels=3)
    png, pack = (folder.parents[1] for folder in forms)
    for (image, label), (other, its) in zip(*(read_images(root, "train", 4, 10) for root in (png, pack)), strict=True):
        assert torch.equal(image, other) and torch.equal(label, its)
    assert len(image) == 3  # the last of 53
    manifests = [read_manifest(folder) for folder in forms]
    assert first_of_each_class(forms[0], manifests[0]) == first_of_each_class(forms[1], manifests[1])
    wanted = [52, 0, 7, 30, 7]
    for one, other in zip(*(read_pictures(folder, wanted, 4) for folder in forms), strict=True):
        assert one.shape == (3, 4, 4) and torch.equal(one, other)
    for resolution in (8, 4):
        subsets = []
        for name, root in (("png", png), ("packed", pack)):
            write_subset(root, "train", resolution, [1] * 10, tmp_path / f"subset/{name}{resolution}", 0)
            subsets.append(list(read_images(tmp_path / f"subset/{name}{resolution}", "train", resolution, 99)))
        [[(image, label)], [(other, its)]] = subsets
        assert torch.equal(image, other) and torch.equal(label, its) and label.bincount().tolist() == [1] * 10
    plan = SampleManifest("", 20, [3 * i % 10 for i in range(10)], 0, 8, [], False, [], [])
    blocks = [BlockDataset(plan, [0, 2], folder, range(10))[1] for folder in forms]
    assert torch.equal(blocks[0]["image"], blocks[1]["image"]) and blocks[0]["image"].shape == (4, 3, 8, 8)


def test_what_ships_is_the_same_packed(tmp_path):
    pack(FASHION / "val/32", tmp_path)
    raw, found = (
        next(iter(ShardStream(folder, read_manifest(folder), 16, 700, flip=True)))
        for folder in (FASHION / "val/32", tmp_path)
    )
    assert all(torch.equal(a, b) for a, b in zip(raw, found, strict=True)) and raw[0].float().std() > 10


def test_a_manifest_of_pngs_is_as_ever(tmp_path):
    make_folder(tmp_path, [3])
    fields = json.loads((tmp_path / "manifest.json").read_text())
    assert list(fields["shards"][0]) == ["name", "count", "bytes", "sha256"]
    assert not read_manifest(tmp_path).packed and not read_manifest(FASHION / "val/32").packed


# ------------------------------------------------------------------------------------------------------------ damage


def write_at(path, offset, data):
    with path.open("rb+") as file:
        file.seek(offset)
        file.write(data)


def row(manifest, number, item):
    """Where the bytes of an image lie."""
    return manifest.shards[number].head + item * 192


DAMAGE = {  # what happens to 002.tar, images 18 ... 22, and which are lost
    "a flipped bit": (lambda p, m: write_at(p, row(m, 2, 2) + 5, bytes([p.read_bytes()[row(m, 2, 2) + 5] ^ 1])), {20}),
    "two rows exchanged": (
        lambda p, m: write_at(
            p, row(m, 2, 0), p.read_bytes()[row(m, 2, 1) :][:192] + p.read_bytes()[row(m, 2, 0) :][:192]
        ),
        {18, 19},
    ),
    "a label": (lambda p, m: write_at(p, 512 + NPY_HEADER_BYTES, b"\x07"), set(range(18, 23))),
    "a checksum": (
        lambda p, m: write_at(p, 512 + NPY_HEADER_BYTES + 40 + 344 + 512 + NPY_HEADER_BYTES, b"\xff\xff"),
        set(range(18, 23)),
    ),
    "cut": (lambda p, m: p.write_bytes(p.read_bytes()[:-1500]), set(range(18, 23))),
    "empty": (lambda p, m: p.write_bytes(b""), set(range(18, 23))),
    "missing": (lambda p, m: p.unlink(), set(range(18, 23))),
    "another's": (lambda p, m: p.write_bytes((p.parent / "006.tar").read_bytes()), set(range(18, 23))),
    "a PNG shard": (
        lambda p, m: p.write_bytes((p.parents[3] / "png/train/8/002.tar").read_bytes()),
        set(range(18, 23)),
    ),
    "a folder": (lambda p, m: (p.unlink(), p.mkdir()), set(range(18, 23))),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_an_image_or_a_shard_and_the_rest_is_as_ever(tmp_path, case, capsys):
    change, lost = DAMAGE[case]
    _, folder = both(tmp_path, channels=3)
    manifest = read_manifest(folder)
    stream = ShardStream(folder, manifest, 8, 4, window=3, end=106)
    places_of = {}
    for place, name in stream.names():
        places_of.setdefault(int(name), set()).add(place)
    whole = contents(stream)
    change(folder / "002.tar", manifest)
    lost_places = set().union(*(places_of[key] for key in lost))
    for rank in range(2):
        found = []
        for image, label, index in ShardStream(folder, manifest, 8, 4, rank, 2, window=3, end=106, on_damage="skip"):
            assert len(image) == len(label) == (index >= 0).sum()
            found.append((image, label, index[index >= 0]))
            assert all(~p in lost_places for p in index.tolist() if p < 0)
        assert contents(found) == {p: c for p, c in whole.items() if p % 2 == rank and p not in lost_places}
    said = capsys.readouterr().err.splitlines()
    about = {f"left out: image {key:08d} of {folder}/002.tar is damaged: its CRC-32 is another" for key in lost}
    if len(lost) < 5:
        assert set(said) == about
    else:
        assert len(said) == 2 and all(line.startswith(f"left out: {folder}/002.tar ") for line in said)
    sentence = sentence_of_error(
        lambda: list(ShardStream(folder, manifest, 8, 4, window=3, end=106)), f"{folder}/002.tar"
    )
    assert any(sentence in line for line in said)


def test_a_file_that_is_cut_while_it_is_open_is_a_sentence(tmp_path):
    _, folder = both(tmp_path, [40], channels=3)
    manifest = read_manifest(folder)
    stream = iter(ShardStream(folder, manifest, 8, 4, shuffle=False))
    next(stream)
    (folder / "000.tar").write_bytes((folder / "000.tar").read_bytes()[: row(manifest, 0, 20) + 7])
    sentence_of_error(lambda: list(stream), f"image 00000020 of {folder}/000.tar is cut: 7 of its 192 bytes are there")


def test_a_batch_of_damage_alone_holds_an_intact_image(tmp_path):
    _, folder = both(tmp_path, [4, 4, 4], channels=3)
    manifest = read_manifest(folder)
    options = {"shuffle": False, "end": 12, "window": 1}
    first = next(iter(ShardStream(folder, manifest, 8, 4, **options)))
    write_at(folder / "000.tar", row(manifest, 0, 0), bytes(192))
    (folder / "001.tar").unlink()
    batches = list(ShardStream(folder, manifest, 8, 4, on_damage="skip", **options))
    assert [len(image) for image, *_ in batches] == [3, 1, 4] and batches[1][2].tolist() == [~4, ~5, ~6, ~7]
    assert torch.equal(batches[1][0][0], first[0][1])  # the first of the folder is damaged too
    (folder / "000.tar").unlink()
    (folder / "002.tar").unlink()
    sentence_of_error(
        lambda: list(ShardStream(folder, manifest, 8, 4, on_damage="skip", **options)), "holds no intact image"
    )


# ----------------------------------------------------------------------------------------------------------- hostile


def vouched(folder, change):
    """A shard changed by change(head) -> head, under a manifest that agrees with it."""
    manifest, path = read_manifest(folder), folder / "000.tar"
    [shard] = manifest.shards
    data = path.read_bytes()
    head = change(data[: shard.head])
    path.write_bytes(head + data[shard.head :])
    about = {"bytes": path.stat().st_size, "head": len(head), "head_sha256": hashlib.sha256(head).hexdigest()}
    return path, replace(manifest, shards=[replace(shard, **about)])


def swapped(head):
    """The first two members exchanged: 512 bytes of header and 512 of contents, padded."""
    return head[1024:2048] + head[:1024] + head[2048:]


def member_of(name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)  # in the current folder


OBJECTS = npy_header("|O", (5,)) + pickle.dumps(np.array([Bomb()] * 5, object), 2)
SHAPE = b"'shape': (5,), }" + b" " * 6
HOSTILE = {
    "a huge shape": (
        lambda h: h.replace(SHAPE, b"'shape': (500000,), }"[:22].ljust(22), 1),
        "labels.npy is not of type <i8",
    ),
    "pickled objects": (lambda h: member_of("0.labels.npy", OBJECTS) + h[1024:], "labels.npy is not of type <i8"),
    "another type": (lambda h: h.replace(b"'<i8'", b"'>i8'"), "labels.npy is not of type <i8 and shape (5,)"),
    "in Fortran's order": (
        lambda h: h[:-NPY_HEADER_BYTES] + h[-NPY_HEADER_BYTES:].replace(b"False", b"True "),
        "its images.npy is not",
    ),
    "another order": (swapped, "it holds '000.crc.npy', not its labels.npy"),
    "no pixels": (lambda h: h[: -512 - NPY_HEADER_BYTES], "it holds '', not its images.npy"),
    "more before the pixels": (lambda h: h + bytes(512), "its pixels begin at byte"),
    "a member of 8 GB": (lambda h: h[:124] + b"77777777777\0" + h[136:], "cannot be read: ReadError"),
    "zeros": (lambda h: bytes(len(h)), "is no packed shard: it holds '', not its labels.npy"),
    "noise": (lambda h: b"\xff" * len(h), "cannot be read: ReadError"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_head_that_a_manifest_vouches_for_is_not_believed(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    change, sentence = HOSTILE[case]
    _, folder = both(tmp_path, [5], channels=3)
    path, manifest = vouched(folder, change)
    write_manifest(folder, manifest)
    read_manifest(folder)
    sentence_of_error(lambda: PackedShard(path, manifest.shards[0], manifest), str(path), sentence)
    sentence_of_error(lambda: list(ShardStream(folder, manifest, 8, 4, end=5)), str(path), sentence)
    assert not (tmp_path / "unpickled").exists()


def test_a_label_that_is_no_class_is_one_damaged_image(tmp_path, capsys):
    _, folder = both(tmp_path, [5], channels=3)
    path, manifest = vouched(
        folder,
        lambda h: h[: 512 + NPY_HEADER_BYTES + 16] + (10).to_bytes(8, "little") + h[512 + NPY_HEADER_BYTES + 24 :],
    )
    batches = list(ShardStream(folder, manifest, 8, 5, shuffle=False, end=5, on_damage="skip"))
    assert batches[0][2].tolist() == [0, 1, ~2, 3, 4] and len(batches[0][0]) == 4
    assert f"image 00000002 of {path} has label 10, outside 0 ... 9" in capsys.readouterr().err


BAD_MANIFESTS = {
    "a head beyond the file": {"head": 10**12},
    "a head into the pixels": {"head": 5500},
    "a head of text": {"head": "3"},
    "a head below 0": {"head": -1},
    "a hash of a number": {"head_sha256": 7},
    "more images than bytes": {"count": 400},
}


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_a_manifest_that_cannot_be_is_refused_before_memory_is_taken(tmp_path, case):
    _, folder = both(tmp_path, [5], channels=3)
    fields = asdict(read_manifest(folder))
    fields["shards"][0] |= BAD_MANIFESTS[case]
    (folder / "manifest.json").write_text(json.dumps(fields))
    sentence_of_error(lambda: read_manifest(folder), f"{folder / 'manifest.json'} is not a manifest of shards: ")
    fields = asdict(pack(tmp_path / "png/train/8", folder)) | {"resolution": 10**7}
    (folder / "manifest.json").write_text(json.dumps(fields))
    sentence_of_error(lambda: read_manifest(folder), "cannot hold 5 images after its head")


@settings(max_examples=150, deadline=None, database=None)
@given(st.data())
def test_heads_of_a_stranger_are_used_or_refused(forms, data):
    manifest = read_manifest(forms[1])
    shard = manifest.shards[0]
    whole = (forms[1] / shard.name).read_bytes()
    head = bytearray(whole[: shard.head])
    for _ in range(data.draw(st.integers(1, 4))):
        start, piece = data.draw(st.integers(0, len(head) - 1)), data.draw(st.binary(max_size=20))
        head[start : start + data.draw(st.sampled_from([0, len(piece)]))] = piece
    path = forms[1].parent / "stranger.tar"
    path.write_bytes(bytes(head) + whole[shard.head :])
    about = {"name": path.name, "bytes": path.stat().st_size, "head": len(head)}
    changed = replace(shard, **about, head_sha256=hashlib.sha256(head).hexdigest())
    try:
        for image, label, _ in ShardStream(forms[1].parent, replace(manifest, shards=[changed]), 8, 4, end=7):
            assert image.shape[1:] == (3, 8, 8) and 0 <= int(label.min()) <= int(label.max()) < 10
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 500 and path.name in str(error)


# ---------------------------------------------------------------------------------------------- prepare, and the bench


def test_prepare_stores_small_images_packed_and_the_same_pixels(tmp_path):
    (tmp_path / "raw/a").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(9):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (150, 140, 3), dtype=np.uint8)).save(buffer, "JPEG")
        (tmp_path / f"raw/a/{number}.jpg").write_bytes(buffer.getvalue() if number != 4 else b"torn")
    options = {"resolutions": [128, 64, 32], "images_per_shard": 4, "workers": 1, "max_corrupt": 0.2}
    prepare_folder(tmp_path / "raw", tmp_path / "out", **options)
    prepare_folder(tmp_path / "raw", tmp_path / "png", packed=0, **options)
    for name, is_packed in (("128", False), ("64", True), ("32", True)):
        manifests = [read_manifest(tmp_path / form / "train" / name) for form in ("out", "png")]
        assert [m.packed for m in manifests] == [is_packed, False] and [m.count for m in manifests] == [8, 8]
        image, other = (next(iter(read_images(tmp_path / form, "train", int(name), 8)))[0] for form in ("out", "png"))
        assert torch.equal(image, other)
    with pytest.raises(InputError, match=r"was prepared with packed \[64, 32\] \(now \[\]\): give another"):
        prepare_folder(tmp_path / "raw", tmp_path / "out", packed=0, **options)
    with pytest.raises(InputError, match="packed is -1: it is the largest width"):
        prepare_folder(tmp_path / "raw", tmp_path / "x", packed=-1, **options)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 3), (7, 1, 3), (64, 48, 1), (33, 64, 3)])
def test_photographs_become_pngs_that_pillow_reads_back(shape):
    rng = np.random.default_rng(0)
    for image in (rng.integers(0, 256, shape, np.uint8), np.full(shape, 255, np.uint8), np.indices(shape).sum(0) * 5):
        data = encode_photo(image := np.asarray(image, np.uint8))
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.mode == ("L" if shape[2] == 1 else "RGB") and picture.size == (shape[1], shape[0])
            picture.verify()
        assert np.array_equal(decode_png(data), image)


def test_a_header_takes_what_numpys_does():
    assert packed.NPY_HEADER_BYTES == 128
