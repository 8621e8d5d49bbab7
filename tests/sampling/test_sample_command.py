"""What `cdm sample` draws and says for its arguments: counts, classes, folders, the picture, and what it refuses."""

import json
from dataclasses import replace

import pytest
import torch
from folders import hashes
from small_models import smallest_stages

from cdm_lightning.cascade import CascadeModule
from cdm_lightning.cascade.bundle import write_bundle
from cdm_lightning.data.shards import read_manifest, read_shard
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import decode_png
from cdm_lightning.sampling.blocks import BlockWriter
from cdm_lightning.sampling.draw_blocks import draw
from cdm_lightning.sampling.manifest import make_sample_manifest
from cdm_lightning.sampling.sample import sample

CPU = {"accelerator": "cpu"}
NAMES = [f"class {c}" for c in range(10)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "b"
    stages = smallest_stages()
    stages[0].trained = {"classes": NAMES, "crop": "adm", "filter": "box"}
    write_bundle(folder, stages, {"levels": [5], "truncated": True})
    return folder


def drawn(monkeypatch, name="cdm_lightning.sampling.sample.save_grid"):
    """What pictures are made of, instead of drawing them."""
    pictures = []
    monkeypatch.setattr(name, lambda rows, path, cell: pictures.append((rows, path, cell)) or path.touch())
    return pictures


def test_so_many_of_each_class_side_by_side(bundle, tmp_path, monkeypatch, capsys):
    pictures = drawn(monkeypatch)
    sample(bundle, tmp_path / "s", per_class=5, classes=[7, 2], truncated=False, block_size=4, **CPU)
    manifests = [read_manifest(tmp_path / "s/train" / name) for name in ("8", "16")]
    for manifest in manifests:
        assert (manifest.count, manifest.counts) == (10, [0, 0, 5, 0, 0, 0, 0, 5, 0, 0])
        assert [shard.count for shard in manifest.shards] == [4, 4, 2]
        assert (manifest.classes, manifest.crop, manifest.filter) == (NAMES, "adm", "box")
    (rows, path, cell), folder = pictures[0], tmp_path / "s/train"
    assert path == tmp_path / "s/samples.png" and cell == 64 and [len(row) for row in rows] == [8, 8]
    images = [
        [torch.from_numpy(decode_png(s["png"])).permute(2, 0, 1) for file in sorted((folder / name).glob("*.tar"))
         for s in read_shard(file)] for name in ("8", "16")
    ]  # fmt: skip
    for row, cells in enumerate(rows):  # a class, its first four samples, each at 8x8 and at 16x16
        expected = [images[stage][row + 2 * column] for column in range(4) for stage in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(cells, expected, strict=True))
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in said] == [str(folder / "8"), str(folder / "16"), str(path)]
    assert "10 images" in said[0] and said[-1].endswith("resolutions [8, 16] side by side")


@pytest.mark.parametrize(("count", "lengths"), [(3, [1, 1, 1]), (11, [2] * 10)])
def test_a_picture_of_fewer_images(bundle, tmp_path, monkeypatch, count, lengths):
    """Of 11 images, class 0 has two: a place for the second of the others stays empty."""
    pictures = drawn(monkeypatch)
    sample(bundle, tmp_path / "s", count=count, **CPU)
    assert [len(row) for row in pictures[0][0]] == [min(n, 1 + (i < count - 10)) for i, n in enumerate(lengths)]


def test_truncated_sampling_at_s_0_keeps_every_resolution(bundle, tmp_path):
    for levels, kept in (([5], ["16"]), ([0], ["16", "8"])):
        out = tmp_path / str(levels[0])
        sample(bundle, out, count=2, levels=levels, **CPU)
        assert sorted(path.name for path in (out / "train").iterdir()) == kept


def test_a_folder_is_finished_without_what_others_left_there(bundle, tmp_path):
    """A shard that is there is not drawn again; partial files of killed processes go; other files stay."""
    sample(bundle, tmp_path / "s", count=5, block_size=2, truncated=False, **CPU)
    whole = hashes(tmp_path / "s")
    (tmp_path / "s/train/16/000001.tar").unlink()
    for folder in ("s", "s/train/8", "s/train/16"):
        (tmp_path / folder / "000009.tar.1.partial").touch()
    (tmp_path / "s/train/16/notes.txt").touch()
    sample(bundle, tmp_path / "s", count=5, block_size=2, truncated=False, **CPU)
    after = hashes(tmp_path / "s")
    assert after.pop("train/16/notes.txt") and after == whole


def test_only_blocks_of_the_run_count_as_done(bundle, tmp_path):
    manifest = make_sample_manifest(CascadeModule(bundle), "b", 7, block_size=3)
    writer = BlockWriter(tmp_path, [tmp_path / "8", tmp_path / "16"], manifest)
    (tmp_path / "8").mkdir()
    (tmp_path / "16").mkdir()
    for name in ("8/000000.tar", "16/000002.tar", "16/000003.tar", "16/notes.tar"):
        (tmp_path / name).touch()
    assert writer.done() == 1  # the last block has one image, and there are three
    (tmp_path / "16/000000.tar").touch()
    assert writer.done() == 4
    writer.close()  # before there is a bar


def test_the_manifest_says_what_the_cascade_will_do(bundle):
    cascade = CascadeModule(bundle, levels=[3], truncated=False, sampler="ddim", sampling_steps=[4, 5], seed=9)
    cascade.set_batch_sizes([2, 1])
    manifest = make_sample_manifest(cascade, "hash", 12)
    assert manifest == replace(
        manifest, bundle="hash", count=12, classes=list(range(10)), seed=9, block_size=12, levels=[3], truncated=False,
        samplers=["ddim", "ddim"], sampling_steps=[4, 5], precision="32-true", start=None, compile=None,
        batch_sizes=[2, 1],
    )  # fmt: skip
    cascade.stages[0].diffusion.sampling_steps = None
    assert make_sample_manifest(cascade, "hash", 12).sampling_steps == [20, 5]
    few = make_sample_manifest(cascade, "hash", 7, classes=[4, 1, 1], block_size=1)
    assert few.blocks == 7 and few.labels().tolist() == [4, 1, 1, 4, 1, 1, 4] and few.size(6) == 1
    odd = replace(few, block_size=3)
    assert odd.blocks == 3 and [odd.size(n) for n in range(3)] == [3, 3, 1]
    assert odd.block(2)["index"].tolist() == [6] and odd.block(1)["label"].tolist() == [4, 1, 1]


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({}, "give one of count and per_class"),
        ({"count": 1, "per_class": 1}, "give one of count and per_class"),
        ({"count": 0}, "count 0 is less than 1"),
        ({"per_class": 0}, "count 0 is less than 1"),
        ({"count": 1, "block_size": 0}, "block_size 0 is less than 1"),
        ({"count": 1, "classes": []}, "names no class"),
        ({"count": 1, "classes": [0, 10]}, "class 10 lies outside 0 ... 9"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_a_folder_is_made(bundle, tmp_path, options, sentence):
    with pytest.raises(InputError, match=sentence):
        sample(bundle, tmp_path / "s", **options, **CPU)
    assert not (tmp_path / "s").exists()


def test_a_cascade_without_classes_draws_its_one_class(tmp_path):
    write_bundle(tmp_path / "b", smallest_stages(num_classes=None), {})
    sample(tmp_path / "b", tmp_path / "s", per_class=3, **CPU)
    manifest = read_manifest(tmp_path / "s/train/16")
    assert (manifest.classes, manifest.counts, manifest.crop, manifest.filter) == (["0"], [3], "none", "none")
    assert json.loads((tmp_path / "s/manifest.json").read_text())["classes"] == [0]
    sample(tmp_path / "b", tmp_path / "t", count=3, classes=[0], **CPU)
    assert hashes(tmp_path / "s", "*.tar") == hashes(tmp_path / "t", "*.tar")
    with pytest.raises(InputError, match="given to a cascade without classes"):
        sample(tmp_path / "b", tmp_path / "u", count=3, classes=[0, 1], **CPU)


def test_samples_of_unknown_classes_are_numbered(bundle, tmp_path):
    cascade = CascadeModule(bundle, levels=[0])
    cascade.origin = dict.fromkeys(("classes", "crop", "filter"))
    folders = draw(cascade, make_sample_manifest(cascade, "b", 3, classes=[1]), tmp_path / "s", **CPU)
    assert folders == [tmp_path / "s/train/8", tmp_path / "s/train/16"]
    manifest = read_manifest(folders[0])
    assert manifest.classes == [str(c) for c in range(10)] and manifest.counts == [0, 3] + [0] * 8
    assert (manifest.crop, manifest.filter, manifest.split, manifest.seed) == ("none", "none", "train", 0)
