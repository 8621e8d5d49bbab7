"""What `cdm sample` can go on from: stored images of a lower resolution, and blocks that are there."""

import json
import time
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from folders import make_folder
from small_models import smallest_stages

from cdm_lightning.cascade import CascadeModule
from cdm_lightning.cascade.bundle import write_bundle
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import begin_folder
from cdm_lightning.sampling import draw_blocks
from cdm_lightning.sampling.blocks import BlockWriter
from cdm_lightning.sampling.manifest import make_sample_manifest
from cdm_lightning.sampling.sample import sample


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "b"
    write_bundle(folder, smallest_stages(), {})
    return folder


@pytest.mark.parametrize(
    ("resolution", "channels", "count", "sentence"),
    [
        (16, 1, 2, r"holds images of 16: the cascade goes on from \[8\]"),
        (8, 3, 2, "has 3 channels, and the cascade makes 1"),
        (8, 1, 4, "holds 3 images, and 4 are to be drawn from them"),
    ],
)
def test_stored_images_of_another_kind_or_too_few(bundle, tmp_path, resolution, channels, count, sentence):
    start = tmp_path / f"start/train/{resolution}"
    make_folder(start, [2, 1], resolution, channels)
    with pytest.raises(InputError, match=sentence):
        sample(bundle, tmp_path / "s", count=count, start=start, classes=[0, 3, 6], accelerator="cpu")
    assert not (tmp_path / "s").exists()


def test_as_many_stored_images_as_are_drawn(bundle, tmp_path):
    start = tmp_path / "start/train/8"
    make_folder(start, [2, 1])  # of classes 0, 3 and 6
    sample(bundle, tmp_path / "s", count=3, start=start, classes=[0, 3, 6], batch_sizes=[2, 1], accelerator="cpu")
    assert [path.name for path in (tmp_path / "s/train").iterdir()] == ["16"]
    assert json.loads((tmp_path / "s/manifest.json").read_text())["batch_sizes"] == [2, 1]
    with pytest.raises(InputError, match="must have 2 entries, one a stage"):
        sample(bundle, tmp_path / "t", count=3, batch_sizes=[2], accelerator="cpu")


def test_no_block_is_drawn_twice_and_nothing_is_said_of_none(bundle, tmp_path, monkeypatch, capfd):
    real, drawn = CascadeModule.sample, []
    monkeypatch.setattr(CascadeModule, "sample", lambda self, label, index, image=None: drawn.append(index.tolist())
                        or real(self, label, index, image))  # fmt: skip
    for missing, expected in ((None, [[0, 1], [2, 3], [4]]), (None, []), ("16/000001.tar", [[2, 3]])):
        if missing:
            (tmp_path / "s/train" / missing).unlink()
        sample(bundle, tmp_path / "s", count=5, block_size=2, accelerator="cpu")
        assert drawn == expected
        drawn.clear()
        lines = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if "sampling: " in line]
        assert not any("sampling: 0%" in line for line in lines)
        assert any("60%, 3 of 5" in line for line in lines) == bool(missing)  # how much was done before


def test_only_the_first_process_finishes_a_folder_and_none_keeps_the_images(bundle, tmp_path, monkeypatch):
    cascade, kept, real = CascadeModule(bundle), [], L.Trainer.predict
    manifest = make_sample_manifest(cascade, "b", 3)
    monkeypatch.setattr(L.Trainer, "predict", lambda *a, **k: kept.append(real(*a, **k)))
    monkeypatch.setattr(draw_blocks, "first_process", lambda: False)
    folders = draw_blocks.draw(cascade, manifest, tmp_path / "s", accelerator="cpu")
    assert [sorted(p.name for p in folder.iterdir()) for folder in folders] == [["000000.tar"]] * 2 and kept == [None]
    monkeypatch.setattr(draw_blocks, "first_process", lambda: True)
    assert draw_blocks.draw(cascade, manifest, tmp_path / "s", accelerator="cpu") == folders
    assert all((folder / "manifest.json").is_file() for folder in folders)


def test_progress_is_told_once_in_its_interval(bundle, tmp_path):
    manifest = make_sample_manifest(CascadeModule(bundle), "b", 6, block_size=2)
    begin_folder(tmp_path, manifest, False)
    writer = BlockWriter(tmp_path, [tmp_path / "8", tmp_path / "16"], manifest)
    images = [torch.zeros(2, 1, size, size, dtype=torch.uint8) for size in (8, 16)]
    told = []
    for number, age in enumerate((None, 0, 100)):
        if age is not None:
            writer.bar = SimpleNamespace(last_print_t=time.time() - age, mininterval=30, n=1, update=told.append)
        writer.write_on_batch_end(None, None, images, None, manifest.block(number), 0, 0)
    assert told == [5]  # at the third block: all six but the one that the bar knew of


def test_a_folder_is_not_continued_from_other_images(bundle, tmp_path):
    for name, sizes in (("a", [2, 1]), ("b", [1, 2])):  # the same images in other shards
        make_folder(tmp_path / name / "train/8", sizes)
    about = {"count": 3, "classes": [0, 3, 6], "accelerator": "cpu"}
    sample(bundle, tmp_path / "s", start=tmp_path / "a/train/8", **about)
    with pytest.raises(InputError, match="was begun with start"):
        sample(bundle, tmp_path / "s", start=tmp_path / "b/train/8", **about)
    with pytest.raises(InputError, match="was begun with start"):
        sample(bundle, tmp_path / "s", **about)
