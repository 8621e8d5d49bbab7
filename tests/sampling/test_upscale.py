"""`cdm upscale`: pictures are reduced as `cdm prepare` does it, and enlarged by the stages above, in their classes."""

import io
import json

import numpy as np
import pytest
import torch
from folders import hashes, read_raw
from PIL import Image
from refusals import sentence_of_error, sentence_of_refusal
from small_models import SMALL, randomise_weights, smallest_stages

from cdm_lightning.cascade import CascadeModule
from cdm_lightning.cascade.bundle import write_bundle
from cdm_lightning.data.preparation.folders import prepare_folder
from cdm_lightning.data.shards import read_manifest, read_shard
from cdm_lightning.evaluation.samples import sample_folders
from cdm_lightning.foundation.images import decode_png, to_float, to_uint8
from cdm_lightning.sampling.upscale import upscale
from cdm_lightning.stages import SuperResolutionStage

NAMES = ["ankle boot", "bag", "coat", "dress", *"efghij"]
CPU = {"accelerator": "cpu"}


@pytest.fixture
def bundle(tmp_path):
    """8 -> 16 -> 32 in ten classes."""
    write_bundle(tmp_path / "b", smallest_stages(("gaussian", "gaussian")), {"levels": [3, 5], "classes": NAMES})
    return tmp_path / "b"


def picture(path, width, height, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "PNG")
    return path


def pixels(folder):
    samples = [s for shard in read_manifest(folder).shards for s in read_shard(folder / shard.name)]
    return torch.stack([torch.from_numpy(decode_png(s["png"])).permute(2, 0, 1) for s in samples])


def test_pictures_are_reduced_as_they_are_prepared_and_enlarged_by_the_stages_above(bundle, tmp_path, capsys):
    photos = tmp_path / "photos"
    for number, name in enumerate(["dress", "bag", "dress"]):
        picture(photos / name / f"{number}.png", 90, 70, number)
    (photos / "bag" / "notes.txt").write_text("no picture")
    (photos / ".hidden").write_text("no picture")
    (photos / "bag" / "gone.png").symlink_to("nowhere")
    upscale(bundle, [photos], tmp_path / "out", levels=[4], seed=2, **CPU)
    said = capsys.readouterr()
    assert "gone.png" in said.out + said.err and "notes.txt" in said.out + said.err
    prepare_folder(photos, tmp_path / "prepared", resolutions=[32, 16], grey=True, workers=1, packed=0, max_corrupt=0.5)
    prepared = {image.tobytes() for image, _ in read_raw(tmp_path / "prepared" / "train" / "16").values()}
    given = pixels(tmp_path / "out" / "input" / "train" / "16")
    assert {image.numpy().tobytes() for image in given} == prepared and len(prepared) == 3
    # in the order of the folders, drawn as the cascade draws them
    cascade = CascadeModule(bundle, levels=[3, 4], seed=2)
    [expected] = cascade.sample(torch.tensor([1, 3, 3]), torch.arange(3), to_float(given))
    folder = tmp_path / "out" / "train" / "32"
    assert torch.equal(pixels(folder), to_uint8(expected))
    manifest = read_manifest(folder)
    assert manifest.classes == NAMES and manifest.counts == [0, 1, 0, 2, *[0] * 6]
    assert sample_folders([tmp_path / "out"], 32)[0] == [folder]  # `cdm evaluate` takes them
    named = sorted(path.name for path in (tmp_path / "out" / "pictures").iterdir())
    assert named == ["00000000-1.png", "00000001-0.png", "00000002-2.png"]
    first = decode_png((tmp_path / "out" / "pictures" / named[0]).read_bytes())
    assert np.array_equal(first[..., 0], to_uint8(expected)[0, 0].numpy())
    before = hashes(tmp_path / "out")
    upscale(bundle, [photos], tmp_path / "out", levels=[4], seed=2, **CPU)  # the same command goes on
    assert hashes(tmp_path / "out") == before
    picture(photos / "dress" / "2.png", 90, 70, 9)
    call = lambda: upscale(bundle, [photos], tmp_path / "out", levels=[4], seed=2, **CPU)  # noqa: E731
    sentence_of_error(call, "was begun with other pictures or classes: choose another folder")
    assert hashes(tmp_path / "out") == before


@pytest.mark.parametrize(
    "sizes, low, stored, enlarged",
    [
        ([(16, 16), (40, 300)], None, 16, ["32"]),  # the largest that the smallest reaches
        ([(16, 16), (12, 13)], None, 8, ["16", "32"]),
        ([(5, 6)], None, 8, ["16", "32"]),  # smaller than any stage takes: enlarged first
        ([(64, 64)], 8, 8, ["16", "32"]),
        ([(64, 64), (1, 1), (9, 15)], 16, 16, ["32"]),
    ],
)
def test_the_size_of_the_pictures_chooses_the_stages(bundle, tmp_path, capsys, sizes, low, stored, enlarged):
    files = [picture(tmp_path / f"{k}.png", *size, seed=k) for k, size in enumerate(sizes)]
    upscale(bundle, files, tmp_path / "out", class_name="bag", low_resolution=low, **CPU)
    given = tmp_path / "out" / "input" / "train"
    assert [path.name for path in given.iterdir()] == [str(stored)]
    assert sorted(path.name for path in (tmp_path / "out" / "train").iterdir()) == sorted(enlarged)
    small = [k for k, size in enumerate(sizes) if min(size) < stored]
    said = [line for line in capsys.readouterr().err.splitlines() if "smaller than" in line]
    assert len(said) == bool(small)
    if small:
        width, height = sizes[small[0]]
        assert said[0].startswith(f"{len(small)} of {len(sizes)} pictures are smaller than {stored}x{stored}, at which")
        assert said[0].endswith(f"the first is {files[small[0]]} of {width}x{height}")
    if sizes[0] == (stored, stored):  # a picture of that very size is taken as it is
        grey = np.asarray(Image.open(files[0]).convert("L"))
        assert np.array_equal(pixels(given / str(stored))[0, 0].numpy(), grey)


def test_a_class_is_given_by_name_or_number_in_folders_too(bundle, tmp_path):
    file = picture(tmp_path / "photos" / "3" / "a.png", 20, 20)
    upscale(bundle, [file], tmp_path / "name", class_name="dress", **CPU)
    upscale(bundle, [file], tmp_path / "number", class_name=3, **CPU)
    upscale(bundle, [file.parent.parent], tmp_path / "folder", **CPU)
    results = [pixels(tmp_path / name / "train" / "32") for name in ("name", "number", "folder")]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    upscale(bundle, [file], tmp_path / "other", class_name="bag", **CPU)
    assert not torch.equal(results[0], pixels(tmp_path / "other" / "train" / "32"))


def test_stages_without_classes_take_pictures_without(tmp_path):
    base, _ = smallest_stages()
    free = SuperResolutionStage(resolution=16, low_resolution=8, augmentation="none", **{**SMALL, "num_classes": None})
    write_bundle(tmp_path / "b", [base, randomise_weights(free)], {"classes": NAMES})
    file = picture(tmp_path / "a.png", 8, 8)
    upscale(tmp_path / "b", [file], tmp_path / "out", **CPU)
    assert read_manifest(tmp_path / "out" / "train" / "16").classes == ["0"]


def test_what_cannot_be_enlarged_is_refused_before_anything_is_written(bundle, tmp_path, capsys):
    flat, classes, out = tmp_path / "flat", tmp_path / "classes", tmp_path / "out"
    file = picture(flat / "a.png", 20, 20)
    picture(classes / "dres" / "a.png", 20, 20)
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "empty").mkdir()
    cases = [
        (flat, {}, "the class of the pictures is needed (ankle boot, bag, coat, ...)"),
        (classes, {}, "class 'dres' is none of this cascade's classes: did you mean 'dress'?"),
        (classes, {"class_name": "bag"}, "give class_name bag or subfolders such as dres, not both"),
        (flat, {"class_name": 10}, "class 10 lies outside 0 ... 9"),
        (flat, {"class_name": "bag", "low_resolution": 32}, "low_resolution 32 is none at which"),
        (flat, {"class_name": "bag", "levels": [1, 2]}, "levels [1, 2] has 2 entries, and the stages", "are sr32"),
        (flat, {"class_name": "bag", "sampling_steps": [1, 2, 3]}, "sampling_steps [1, 2, 3] has 3 entries"),
        (flat, {"class_name": "bag", "accelerator": "tpu"}, "accelerator tpu with devices 1 cannot be used here"),
        (tmp_path / "text.png", {}, "text.png is no picture that can be read: no known image format"),
        (tmp_path / "empty", {}, f"{tmp_path / 'empty'} holds no picture that can be read"),
        (tmp_path / "nowhere", {}, "nowhere does not exist"),
    ]
    for images, options, *parts in cases:
        sentence_of_error(lambda i=images, o=options: upscale(bundle, [i], out, **{**CPU, **o}), *parts)
        assert not out.exists()
    picture(classes / "loose.png", 20, 20)
    (classes / "dres").rename(classes / "dress")
    sentence_of_error(lambda: upscale(bundle, [classes], out, **CPU), "loose.png lies beside folders of classes")
    said = sentence_of_refusal(
        capsys, ["upscale", "--bundle", str(bundle), "--images", f"[{file}]", "--out", str(file)]
    )
    assert said.endswith("a.png is a file: the results need a folder, so give another name")
    write_bundle(tmp_path / "one", smallest_stages(()), {})
    sentence_of_error(lambda: upscale(tmp_path / "one", [flat], out, **CPU), "a cascade of one stage enlarges nothing")


def test_the_manifest_says_which_files_were_taken(bundle, tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 40), "red").save(buffer, "JPEG")
    (tmp_path / "a.jpeg").write_bytes(buffer.getvalue())
    upscale(bundle, [tmp_path / "a.jpeg"], tmp_path / "out", class_name="bag", **CPU)
    about = json.loads((tmp_path / "out" / "input" / "train" / "16" / "manifest.json").read_text())
    assert about["extra"]["files"] == [str(tmp_path / "a.jpeg")]
