"""cdm inspect: every kind whole, damaged and unfinished, and what it says of things that it does not know."""

import hashlib
import json
import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from commands import ROOT
from folders import make_folder, repacked
from PIL import Image
from refusals import sentence_of_refusal
from servers import serving
from small_models import smallest_stages
from small_training import smallest_stage, train

from cdm_lightning.__main__ import main
from cdm_lightning.cascade.bundle import write_bundle
from cdm_lightning.data.preparation.folders import prepare_folder
from cdm_lightning.data.shards import Manifest, read_manifest, write_manifest, write_packed
from cdm_lightning.sampling.sample import sample

CARD = ROOT / "data/references/fashion-val-32.safetensors"


def said(capsys, path, *options):
    capsys.readouterr()
    main(["inspect", str(path), *options])
    return capsys.readouterr().out


def damaged(capsys, path, *options):
    return sentence_of_refusal(capsys, ["inspect", str(path), *(options or ("--check", "true"))])


def flip(path, place=-1000):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.fixture
def shards(tmp_path):
    for split, sizes in (("train", [20, 10]), ("val", [10])):
        make_folder(tmp_path / "shards" / split / "8", sizes)
    return tmp_path / "shards"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for split in ("train", "val"):
        make_folder(folder / "data" / split / "8", [16])
    train(smallest_stage(), folder / "data", folder / "run", 4)
    return folder / "run"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    write_bundle(folder / "bundle", smallest_stages(), {"levels": [5], "classes": [f"class {c}" for c in range(10)]})
    sample(folder / "bundle", folder / "samples", count=20, block_size=10, accelerator="cpu")
    return folder


def test_shards_are_told_from_their_root_split_and_resolution(shards, capsys):
    out = said(capsys, shards)
    assert "shards of images" in out and "│ train │ 8x8, grey  │ 30     │ 3" in out and "│ val " in out
    assert "10: class 0, class 1" in out and "--check true" in out
    for path in (shards / "train", shards / "train/8", shards / "train/8/manifest.json"):
        out = said(capsys, path, "--check", "true")
        assert "│ 30 " in out and "│ val" not in out and "yes, everything was read" in out


def test_what_differs_between_splits_is_told_of_each(shards, capsys):
    manifest = read_manifest(shards / "val/8")
    other = {"classes": [f"kind {n}" for n in range(10)], "source": "elsewhere"}
    write_manifest(shards / "val/8", Manifest(**{**vars(manifest), **other}))
    out = said(capsys, shards)
    assert "classes of train  10: class 0" in out and "classes of val    10: kind 0" in out
    assert "source of val     elsewhere" in out and out.count("elsewhere") == 1


def test_shards_at_an_address(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CDM_CACHE", str(tmp_path / "cache"))
    with serving(shards) as server:
        for place in ("", "/train", "/train/8"):
            out = said(capsys, server.address + place)
            assert "│ train │ 8x8, grey  │ 30     │ 3" in out and ("│ val" in out) == (not place)
        assert not any(path.endswith(".tar") for path in server.asked)
        picture = str(tmp_path / "first.png")
        assert "yes, everything was read" in said(capsys, server.address, "--check", "true", "--picture", picture)
        assert Image.open(picture).size == (10 * 66 - 2, 3 * 66 - 2)
        assert "holds no shards" in damaged(capsys, f"{server.address}/other")
        flip(shards / "val/8/000.tar")
        assert "val/8/000.tar was changed on the server" in damaged(capsys, server.address)


def test_a_picture_of_the_first_images(shards, tmp_path, capsys):
    assert "the first 30 images" in said(capsys, shards, "--picture", str(tmp_path / "p/first.png"))
    assert Image.open(tmp_path / "p/first.png").size == (10 * 66 - 2, 3 * 66 - 2)
    assert "no .png" in damaged(capsys, shards, "--picture", "x.jpg")
    assert "finished images only" in damaged(capsys, CARD, "--picture", "x.png")


def test_damaged_shards_are_named_and_counted(shards, capsys):
    folder = shards / "train/8"
    flip(folder / "000.tar")
    assert "not read" in said(capsys, shards)
    sentence = damaged(capsys, shards)
    assert "000.tar is not the file its manifest lists" in sentence and "first of" not in sentence
    (folder / "001.tar").unlink()
    assert "000.tar" in (sentence := damaged(capsys, shards)) and "first of 2 that are damaged" in sentence
    assert "001.tar is missing" in damaged(capsys, shards, "--check", "false")
    (shards / "val/8/000.tar").write_bytes((shards / "val/8/000.tar").read_bytes()[:-512])
    assert "first of 3" in damaged(capsys, shards)


def test_images_that_cannot_be_decoded_and_wrong_counts_are_damage(shards, capsys):
    folder = shards / "train/8"
    manifest = read_manifest(folder)
    counts = [4, 2, *manifest.counts[2:]]
    write_manifest(folder, Manifest(**{**vars(manifest), "counts": counts}))
    assert "counts 4 images of class 0, and the shards hold 3" in damaged(capsys, folder)
    (folder / "000.tar").write_bytes(
        repacked(folder / "000.tar", lambda name, data: b"no image" if name == "00000003.png" else data)
    )
    table = json.loads((folder / "manifest.json").read_text())
    data = (folder / "000.tar").read_bytes()
    table["shards"][0] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(table))
    assert "image 00000003" in damaged(capsys, folder)


def test_packed_shards(tmp_path, capsys):
    folder = tmp_path / "train/4"
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    shard = write_packed(folder / "000.tar", images, [0, 1] * 3, [f"{n}" for n in range(6)])
    write_manifest(folder, Manifest(4, 3, "train", ["a", "b"], [3, 3], [shard]))
    out = said(capsys, tmp_path, "--check", "true")
    assert "packed" in out and "4x4, colour" in out and "yes" in out
    flip(folder / "000.tar", -1100)  # behind the pixels or in them: the head alone does not show it
    assert "its SHA-256 is another" in damaged(capsys, tmp_path)


def test_unfinished_preparation_says_how_far_it_is(tmp_path, capsys):
    source = tmp_path / "raw/cat"
    source.mkdir(parents=True)
    for n in range(6):
        Image.new("RGB", (16, 16), (n, 0, 0)).save(source / f"{n}.png")
    assert "`cdm prepare folder`" in damaged(capsys, tmp_path / "raw")
    assert "without class folders" in (sentence := damaged(capsys, source)) and "--labels FILE" in sentence
    prepare_folder(tmp_path / "raw", tmp_path / "out", resolutions=[8], images_per_shard=2, workers=1)
    assert "cdm prepare: resolutions [8]" in said(capsys, tmp_path / "out", "--check", "true")
    split = tmp_path / "out/train"
    arguments = read_manifest(split / "8").extra["arguments"]
    (split / "8/manifest.json").unlink()
    assert "written last" in said(capsys, tmp_path / "out")
    (split / ".progress").mkdir()
    (split / ".progress/arguments.json").write_text(json.dumps(arguments))
    (split / ".progress/000000.json").write_text("{}")
    for path in (tmp_path / "out", split):
        out = said(capsys, path)
        assert "1 of 3 shards are made" in out and "whole             no, unfinished" in out
    assert "out is unfinished, though nothing of it is damaged" in damaged(capsys, tmp_path / "out")


def test_samples_whole_and_unfinished(made, tmp_path, capsys):
    out = said(capsys, made / "samples", "--check", "true")
    assert "samples of a cascade" in out and "levels [5]" in out and "16x16" in out and "8x8" in out
    part = tmp_path / "part"
    shutil.copytree(made / "samples", part)
    for folder in (part / "train/8", part / "train/16"):
        (folder / "manifest.json").unlink()
    (part / "train/16/000001.tar").unlink()
    assert "1 of 2 shards of 20 images are drawn" in said(capsys, part)
    shutil.rmtree(part / "train")
    assert "0 of 2 shards of 20 images are drawn" in said(capsys, part)


def test_bundles_and_their_weights(made, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    shutil.copytree(made / "bundle", bundle)
    assert "a cascade of 2 stages" in said(capsys, bundle, "--check", "true")
    assert "the weights of a SuperResolutionStage" in said(capsys, bundle / "sr16.safetensors", "--check", "true")
    flip(bundle / "sr16.safetensors")
    assert "sr16.safetensors was changed" in damaged(capsys, bundle)
    assert "sr16.safetensors was changed" in damaged(capsys, bundle / "sr16.safetensors")
    (bundle / "base8.safetensors").unlink()
    assert "base8.safetensors is missing" in (sentence := damaged(capsys, bundle)) and "first of 2" in sentence
    text = (bundle / "bundle.json").read_text().replace('"seed": null', '"seed": 7', 1).replace("BaseStage", "X")
    (bundle / "bundle.json").write_text(text)
    assert "bundle.json was changed" in damaged(capsys, bundle, "--check", "false")


def test_checkpoints_and_runs(trained, tmp_path, capsys):
    out = said(capsys, trained, "--check", "true")
    assert "a checkpoint of a BaseStage" in out and "4 steps" in out and "yes, everything was read" in out
    assert "images seen" in said(capsys, trained / "checkpoints/last.ckpt")
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    last = run / "checkpoints/last.ckpt"
    with zipfile.ZipFile(last) as archive:
        member = next(m for m in archive.infolist() if m.filename.endswith("data/0"))
    flip(last, member.header_offset + 30 + len(member.filename) + 200)
    assert "last.ckpt is damaged: the CRC-32" in damaged(capsys, last)
    last.write_bytes(last.read_bytes()[:-500])
    assert "last.ckpt is cut short" in damaged(capsys, run)


def test_numbers_of_a_checkpoint_that_are_not_finite(trained, tmp_path, capsys):
    state = torch.load(trained / "checkpoints/last.ckpt", weights_only=True)
    next(iter(state["state_dict"].values()))[0] = torch.nan
    torch.save(state, tmp_path / "broken.ckpt")
    assert "not finite in state_dict.unet" in damaged(capsys, tmp_path / "broken.ckpt")


def test_reference_cards(tmp_path, capsys):
    out = said(capsys, CARD, "--check", "true")
    assert "a reference card" in out and "3,000, 32x32" in out and "cdm_lightning 0.1.0" in out
    (tmp_path / "cut.safetensors").write_bytes(CARD.read_bytes()[:-100])
    assert "cut.safetensors is not a whole safetensors" in damaged(capsys, tmp_path / "cut.safetensors")
    images = np.zeros((500, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=images, arr_1=np.arange(500))
    assert "500, 8x8, 3 channels" in said(capsys, tmp_path / "samples.npz", "--check", "true")
    flip(tmp_path / "samples.npz", 40_000)
    assert "CRC-32 of arr_0.npy" in damaged(capsys, tmp_path / "samples.npz")


def test_unknown_things_are_one_sentence_that_says_what_they_look_like(tmp_path, capsys):
    for name, hint in (
        ("a/x.parquet", "`cdm prepare parquet`"),
        ("b/x.tar.txt", "is not shards, samples, a bundle"),
        ("c/data.mdb", "`cdm prepare lsun`"),
        ("d/results.json", "report.html"),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
        assert hint in damaged(capsys, (tmp_path / name).parent)
    (tmp_path / "e").mkdir()
    assert "it is empty" in damaged(capsys, tmp_path / "e")
    assert "does not exist" in damaged(capsys, tmp_path / "nowhere")
    torch.save({"time_embed.0.weight": torch.zeros(1)}, tmp_path / "adm.pt")
    assert "`cdm import`" in damaged(capsys, tmp_path / "adm.pt")
    torch.save({"model": torch.zeros(1)}, tmp_path / "other.ckpt")
    assert "not of a stage" in damaged(capsys, tmp_path / "other.ckpt")
    (tmp_path / "foreign.safetensors").write_bytes(b"\xff" * 100)
    assert "not a whole safetensors" in damaged(capsys, tmp_path / "foreign.safetensors")


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path, what in (
        (tmp_path / "pipe", "is a pipe"),
        ("/dev/zero", "is a device"),
        (tmp_path / "link", "is a link"),
    ):
        assert f"{path} {what}" in damaged(capsys, path)
    for name in ("manifest.json", "checkpoints/last.ckpt"):
        folder = tmp_path / f"with {name[:4]}"
        (folder / name).parent.mkdir(parents=True)
        os.mkfifo(folder / name)
        assert "is not shards" in damaged(capsys, folder)


def test_a_lone_shard_is_told_from_tars_of_images(shards, tmp_path, capsys):
    assert f"one of the shards in {shards / 'train/8'}, which can" in damaged(capsys, shards / "train/8/000.tar")
    write_packed(tmp_path / "lone/000.tar", np.zeros((1, 4, 4, 3), np.uint8), [0], ["0"])
    for path in (tmp_path / "lone/000.tar", tmp_path / "lone"):
        assert "shards without the manifest.json that lay beside them" in damaged(capsys, path)
    shutil.copy(shards / "train/8/000.tar", tmp_path / "images.tar")
    assert "`cdm prepare webdataset`" in damaged(capsys, tmp_path / "images.tar")


def test_names_that_would_steer_a_terminal_are_escaped(tmp_path, capsys):
    folder = tmp_path / "a\x1b[31m"
    make_folder(folder / "train/8", [4])
    out = said(capsys, folder)
    assert "\x1b" not in out and "\\x1b[31m" in out
    (folder / "train/8/000.tar").unlink()
    assert "\x1b" not in damaged(capsys, folder)
