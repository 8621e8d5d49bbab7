"""`cdm prepare`: sources, crops, order, labels, resuming, and the sentence for every bad input."""

from __future__ import annotations

import errno
import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import raw_sources
import torch
from commands import ROOT
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

from cdm_lightning.data.preparation.folders import prepare_folder
from cdm_lightning.data.preparation.imagenet import prepare_imagenet
from cdm_lightning.data.preparation.raw_images import cut_square, decode
from cdm_lightning.data.shards import manifest as shards
from cdm_lightning.data.shards import read_manifest
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import downscale


def times(out: Path) -> dict[Path, int]:
    """When every file under a folder was last written."""
    return {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file()}


# ------------------------------------------------------------------------------------------------------------ pixels


def weights(before: int, after: int, kernel: str) -> np.ndarray:
    """The (after, before) matrix of an antialiased resize in one dimension: each row is the kernel, stretched."""
    ratio = before / after
    x = (np.arange(before)[None] + 0.5 - (np.arange(after)[:, None] + 0.5) * ratio) / max(ratio, 1)
    inner = 1.5 * np.abs(x) ** 3 - 2.5 * x**2 + 1
    outer = -0.5 * np.abs(x) ** 3 + 2.5 * x**2 - 4 * np.abs(x) + 2
    cubic = np.where(np.abs(x) < 1, inner, np.where(np.abs(x) < 2, outer, 0))
    matrix = ((x > -0.5) & (x <= 0.5)).astype(float) if kernel == "box" else cubic
    return matrix / matrix.sum(1, keepdims=True)


def resized(image: np.ndarray, width: int, height: int, kernel: str) -> np.ndarray:
    """Two passes, each rounded to 8 bits. Which one is first is Pillow's choice: wide images agree to the bit."""
    for axis, side in ((1, width), (0, height)):
        if image.shape[axis] != side:
            sums = np.tensordot(weights(image.shape[axis], side, kernel), image, (1, axis))
            # A half is rounded up also where the sum, whose order is the library's, ends an ulp below it.
            image = np.clip(np.floor(np.moveaxis(sums, 0, axis) + 0.5 + 1e-9), 0, 255)
    return image


def adm_reference(image: np.ndarray, size: int) -> np.ndarray:
    """ADM's centre crop in matrices: halve by box while the short side allows, bicubic to the short side, cut."""
    height, width = image.shape[:2]
    while min(height, width) >= 2 * size:
        height, width = height // 2, width // 2
        image = resized(image, width, height, "box")
    height, width = (round(side * size / min(image.shape[:2])) for side in (height, width))
    image = resized(image, width, height, "bicubic")
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


@pytest.mark.parametrize(
    "width,height", [(500, 375), (333, 257), (64, 64), (130, 128), (129, 127), (20, 15), (31, 90), (257, 1001)]
)
def test_adm_crop(width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The same picture whatever ran before: near a half, Pillow's fixed-point sums round some pictures the other way.
    monkeypatch.setattr(raw_sources, "RNG", np.random.default_rng(0))
    image = picture(width, height)
    ours, reference = cut_square(image, 64, "adm"), adm_reference(np.asarray(image).astype(float), 64)
    assert ours.shape == (64, 64, 3) and ours.dtype == np.uint8
    assert np.abs(ours - reference).max() <= (0 if width >= height else 1)


def test_area_crop() -> None:
    image = picture(410, 256)
    square = np.asarray(image)[:, 77:333].astype(float)
    mean = square.reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert np.abs(cut_square(image, 64, "area") - mean).max() <= 1
    grown = np.asarray(image.crop((77, 0, 333, 256)).resize((300, 300), Image.Resampling.BICUBIC))
    assert np.array_equal(cut_square(image, 300, "area"), grown)


@pytest.mark.parametrize("crop", ["adm", "area"])
def test_lower_resolutions_are_exact_means(tmp_path: Path, crop: str) -> None:
    source = write_tree(tmp_path / "raw", train_files(3))
    prepare_imagenet(source, tmp_path / "out", resolutions=[8, 32, 16], crop=crop, workers=1, images_per_shard=5)
    high, mid, low = (list(stored(tmp_path / "out/train" / name)) for name in ("32", "16", "8"))
    assert len(high) == 12
    assert [s[::2] for s in high] == [s[::2] for s in mid] == [s[::2] for s in low]  # keys and labels
    for sample, (_, middle, _), (_, small, _) in zip(high, mid, low, strict=True):
        large = sample[1]
        sums = large.astype(int).reshape(16, 2, 16, 2, 3).sum((1, 3))
        quotient, rest = sums // 4, sums % 4
        half_to_even = quotient + ((rest == 3) | ((rest == 2) & (quotient % 2 == 1)))
        assert np.array_equal(middle, half_to_even)
        tensor = torch.from_numpy(large).permute(2, 0, 1)
        assert torch.equal(downscale(tensor, 8).permute(1, 2, 0), torch.from_numpy(small))
    manifest = read_manifest(tmp_path / "out/train/16")
    assert (manifest.crop, manifest.resolution, manifest.channels) == (crop, 16, 3)
    assert manifest.filter == {"adm": "box halvings, then bicubic", "area": "box"}[crop]


def test_rotated_files_stand_upright() -> None:
    image = picture(40, 24)
    orders = {1: image, 3: image.rotate(180), 6: image.rotate(90, expand=True), 8: image.rotate(270, expand=True)}
    for orientation, turned in orders.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert np.array_equal(decode(encoded(turned, exif=exif)), image), orientation
    broken = encoded(image, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert decode(broken).size == (40, 24)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA"])
@pytest.mark.parametrize("grey", [False, True])
def test_every_mode_becomes_rgb_or_grey(mode: str, grey: bool) -> None:
    image = Image.new("RGB", (12, 10), (200, 100, 50)).convert(mode)
    result = decode(encoded(image, "TIFF" if mode == "CMYK" else "PNG"), grey)
    assert result.mode == ("L" if grey else "RGB")
    expected = image.convert("RGB").convert(result.mode)
    assert result.getpixel((3, 3)) == expected.getpixel((3, 3))


def test_sixteen_bits_become_eight() -> None:
    levels = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8) + 255
    assert np.array_equal(decode(encoded(Image.fromarray(levels)), grey=True), levels // 256)


def test_transparent_is_white() -> None:
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    image.putpixel((0, 0), (10, 20, 30, 255))
    assert [decode(encoded(image)).getpixel(at) for at in [(0, 0), (1, 1)]] == [(10, 20, 30), (255, 255, 255)]


# ------------------------------------------------------------------------------------------------- sources and labels


def test_train_archive_equals_its_folder_and_labels_follow_sorted_wnids(tmp_path: Path) -> None:
    files = train_files()
    archive, tree = write_train_archive(tmp_path / "same", files), write_tree(tmp_path / "tree/same", files)
    before = hashes(tmp_path / "tree")
    prepare_imagenet(archive, tmp_path / "a", resolutions=[32, 16], workers=1, images_per_shard=7)
    prepare_imagenet(tree, tmp_path / "b", resolutions=[32, 16], workers=1, images_per_shard=7)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert hashes(tmp_path / "tree") == before and not list((tmp_path / "a").rglob("*.JPEG"))

    manifest = read_manifest(tmp_path / "a/train/32")
    assert manifest.classes == sorted(WNIDS) and manifest.counts == [6] * 4 and manifest.source == "same"
    assert [s.count for s in manifest.shards] == [7, 7, 7, 3]
    assert sorted(p.name for p in (tmp_path / "a/train").iterdir()) == ["16", "32"]
    expected = {
        cut_square(decode(data), 32, "adm").tobytes(): sorted(WNIDS).index(wnid)
        for wnid, inner in files.items()
        for data in inner.values()
    }
    found = {image.tobytes(): label for _, image, label in stored(tmp_path / "a/train/32")}
    assert found == expected and len(found) == 24


def test_val_archive_takes_labels_from_the_devkit(tmp_path: Path) -> None:
    truth = [3, 1, 4, 2, 2, 1]
    source, files = val_archive(tmp_path, truth)
    prepare_imagenet(source, tmp_path / "out", split="val", resolutions=[16], workers=1)
    expected = {
        cut_square(decode(data), 16, "adm").tobytes(): sorted(WNIDS).index(WNIDS[number - 1])
        for number, data in zip(truth, files.values(), strict=True)
    }
    assert {image.tobytes(): label for _, image, label in stored(tmp_path / "out/val/16")} == expected
    assert read_manifest(tmp_path / "out/val/16").counts == [2, 1, 2, 1]  # of the IDs 2, 4, 1, 3


def test_folder_in_grey(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bitmap = encoded(picture(), "BMP")
    files = {
        "b": {"x.PNG": encoded(picture()), "note.txt": b"-", ".x.png": b"-"},
        "a": {"1.jpg": jpeg(), "2.bmp": bitmap},
    }
    source = write_tree(tmp_path / "raw", files)
    prepare_folder(source, tmp_path / "out", split="val", resolutions=[16], grey=True, workers=1)
    manifest = read_manifest(tmp_path / "out/val/16")
    assert (manifest.classes, manifest.counts, manifest.channels, manifest.split) == (["a", "b"], [2, 1], 1, "val")
    assert all(image.shape == (16, 16, 1) for _, image, _ in stored(tmp_path / "out/val/16"))
    size = manifest.shards[0].bytes
    assert f"{tmp_path}/out/val/16: 3 images of 2 classes in 1 shards, {size:,} bytes" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------- order, resuming, workers


def test_every_shard_mixes_all_classes(tmp_path: Path) -> None:
    source = tiny_tree(tmp_path / "raw", classes=4, per_class=100)
    prepare_folder(source, tmp_path / "out", resolutions=[8], images_per_shard=100, workers=1)
    labels = [label for _, _, label in stored(tmp_path / "out/train/8")]
    for start in range(0, 400, 50):  # chi-square with 3 degrees of freedom stays below 21.1 in 99.99 % of draws
        counts = np.bincount(labels[start : start + 50], minlength=4)
        assert ((counts - 12.5) ** 2 / 12.5).sum() < 21.1, (start, counts)
    assert [key for key, _, _ in stored(tmp_path / "out/train/8")] == [f"{i:08d}" for i in range(400)]

    prepare_folder(source, tmp_path / "other", resolutions=[8], images_per_shard=100, workers=1, seed=1)
    assert labels != [label for _, _, label in stored(tmp_path / "other/train/8")]
    assert read_manifest(tmp_path / "other/train/8").seed == 1
    prepare_folder(source, tmp_path / "few", resolutions=[8], images_per_shard=100, workers=1, limit=60)
    few, all_images = list(stored(tmp_path / "few/train/8")), stored(tmp_path / "out/train/8")
    assert len(few) == 60 and all(np.array_equal(a[1], b[1]) for a, b in zip(few, all_images, strict=False))


SLOWLY = """
import pathlib, time
replace = pathlib.Path.replace
def slowly(path, target):
    time.sleep(0.05)
    return replace(path, target)
pathlib.Path.replace = slowly
"""


def start(source: Path, out: Path, workers: int, command: bool = False) -> subprocess.Popen[str]:
    """A preparation in a process group of its own, as `cdm prepare` if `command`.

    Every file takes its name slowly, in the workers too, so that no machine is done before it is stopped."""
    early = out.parent / "early"
    early.mkdir()
    (early / "sitecustomize.py").write_text(SLOWLY)  # which every process of Python runs before its own program
    words = ["prepare", "folder", "--source", str(source), "--out", str(out), "--resolutions", "[64,32]"]
    words += ["--images_per_shard", "4", "--workers", str(workers), "--max_corrupt", "0.01"]
    code = f"from cdm_lightning.__main__ import main\nif __name__ == '__main__': main({words})"
    if not command:
        code = f"""
from pathlib import Path
from cdm_lightning.data.preparation.folders import prepare_folder
if __name__ == "__main__":
    source, out = Path({str(source)!r}), Path({str(out)!r})
    prepare_folder(source, out, resolutions=[64, 32], images_per_shard=4, workers={workers}, max_corrupt=0.01)
"""
    environment = {**os.environ, "PYTHONPATH": f"{early}:{ROOT}"}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        start_new_session=True,
    )  # fmt: skip


def wait_for_records(out: Path, process: subprocess.Popen[str], count: int) -> list[Path]:
    while len(records := sorted((out / "train/.progress").glob("0*.json"))) < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    return records


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A source of 120 images and the hashes of its shards made in one go by one process."""
    root = tmp_path_factory.mktemp("unbroken")
    source = tiny_tree(root / "raw", classes=3, per_class=40, side=100)
    (source / "class1/0007.bmp").write_bytes(b"no image")
    prepare_folder(source, root / "out", resolutions=[64, 32], images_per_shard=4, workers=1, max_corrupt=0.01)
    return source, hashes(root / "out")


def resume(source: Path, out: Path, workers: int) -> None:
    prepare_folder(source, out, resolutions=[64, 32], images_per_shard=4, workers=workers, max_corrupt=0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, unbroken: tuple[Path, dict[str, str]]) -> None:
    source, expected = unbroken
    process = start(source, tmp_path / "out", workers=2)
    wait_for_records(tmp_path / "out", process, 3)
    workers = workers_of(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 120
    while (left := list(filter(alive, workers))) and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert len(workers) == 2 and not left  # none goes on writing beside the next run

    out = tmp_path / "out/train"
    finished = [f.stem for f in (out / ".progress").glob("0*.json")]
    assert 3 <= len(finished) < 30 and not list(out.rglob("manifest.json"))
    lost, *kept = finished
    (out / "32" / f"{lost}.tar").unlink()
    before = times(out)
    resume(source, tmp_path / "out", workers=1)
    assert hashes(tmp_path / "out") == expected
    again = {f.stem for f, written in times(out).items() if written != before.get(f)}
    assert lost in again and not again & set(kept)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_ctrl_c_ends_all_workers_with_one_sentence(tmp_path: Path, unbroken: tuple[Path, dict[str, str]]) -> None:
    process = start(unbroken[0], tmp_path / "out", workers=2, command=True)
    wait_for_records(tmp_path / "out", process, 1)
    workers = workers_of(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in error
    assert error.endswith("Ctrl-C: what is written stays, and the same command goes on\n")
    assert len(workers) == 2 and not any(map(alive, workers))


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_dead_worker_is_an_error_and_two_workers_make_the_same_bytes(
    tmp_path: Path, unbroken: tuple[Path, dict[str, str]]
) -> None:
    source, expected = unbroken
    process = start(source, tmp_path / "out", workers=2)
    wait_for_records(tmp_path / "out", process, 1)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, error = process.communicate(timeout=300)
    assert process.returncode != 0 and "InputError: one of 2 workers was ended from outside" in error
    resume(source, tmp_path / "out", workers=2)
    assert hashes(tmp_path / "out") == expected


def test_same_command_again_changes_nothing_and_another_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_tree(tmp_path / "raw", classes=2, per_class=4)
    prepare_folder(source, tmp_path / "out", resolutions=[8, 4], workers=1)
    before = times(tmp_path / "out")
    capsys.readouterr()
    prepare_folder(source, tmp_path / "out", resolutions=[4, 8], workers=2)
    assert "8 images of 2 classes" in capsys.readouterr().out
    assert times(tmp_path / "out") == before
    with pytest.raises(InputError, match=r"was prepared with seed 0 \(now 1\), crop adm \(now area\): give another"):
        prepare_folder(source, tmp_path / "out", resolutions=[8, 4], workers=1, seed=1, crop="area")
    (source / "class0/new.bmp").write_bytes(encoded(picture(), "BMP"))
    with pytest.raises(InputError, match=r"images 8 \(now 9\), listing"):
        prepare_folder(source, tmp_path / "out", resolutions=[8, 4], workers=1)
    (tmp_path / "other/train/8").mkdir(parents=True)
    (tmp_path / "other/train/8/000000.tar").write_bytes(b"")
    with pytest.raises(InputError, match="holds shards that no `cdm prepare` made"):
        prepare_folder(source, tmp_path / "other", resolutions=[8], workers=1)


def test_pictures_that_are_enlarged_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"dot": (1, 1), "flat": (90, 15), "even": (16, 16), "big": (40, 30)}
    source = write_tree(tmp_path / "raw", {"a": {f"{name}.png": encoded(picture(*sizes[name])) for name in sizes}})
    prepare_folder(source, tmp_path / "out", resolutions=[16, 8], workers=1)
    said = [line for line in capsys.readouterr().out.splitlines() if "smaller" in line]
    names = ("a/dot.png of 1x1", "a/flat.png of 90x15")
    assert said in [[f"2 images are smaller than 16x16 and were enlarged, first {name}"] for name in names]
    prepare_folder(source, tmp_path / "other", resolutions=[1], workers=1)
    assert "smaller" not in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------- corrupt images


def test_corrupt_images_are_counted_listed_and_limited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, whole = train_files(5), jpeg(200, 150)
    bad = {"n01440764_90.JPEG": b"", "n01440764_91.JPEG": b"<html>", "n01440764_92.JPEG": whole[: len(whole) // 2]}
    files["n01440764"] |= bad | {"n01440764_93.JPEG": whole[: len(whole) * 19 // 20]}
    source = write_train_archive(tmp_path / "train.tar", files)
    sentence = (
        r"4 of 24 images \(16.67%\) cannot be read, the first is n01440764/n01440764_9\d.JPEG \(.*\): more than max_"
    )
    with pytest.raises(InputError, match=sentence):
        prepare_imagenet(source, tmp_path / "out", resolutions=[16], workers=1, max_corrupt=0.125, images_per_shard=6)
    assert not list(tmp_path.rglob("manifest.json"))
    prepare_imagenet(source, tmp_path / "out", resolutions=[16], workers=1, max_corrupt=4 / 24, images_per_shard=6)
    manifest = read_manifest(tmp_path / "out/train/16")
    assert (manifest.count, manifest.skipped, manifest.counts) == (20, 4, [5, 5, 5, 5])
    reasons = {entry["name"].split("/")[1]: entry["reason"] for entry in manifest.extra["skipped"]}
    assert set(reasons) == {f"n01440764_{i}.JPEG" for i in range(90, 94)}
    assert reasons["n01440764_91.JPEG"] == "no known image format" and "truncated" in reasons["n01440764_93.JPEG"]
    assert "skipped n01440764/n01440764_91.JPEG: no known image format" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- bad input


def refused(sentence: str, *arguments: object, folder: bool = False, **options: object) -> None:
    """The call raises one sentence, and leaves nothing under a final name."""
    with pytest.raises(InputError, match=sentence) as caught:
        (prepare_folder if folder else prepare_imagenet)(*arguments, **{"resolutions": [16], "workers": 1} | options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    out = Path(str(arguments[1]))
    assert not list(out.rglob("manifest.json")) and not list(out.rglob("*.partial"))


def test_bad_arguments(tmp_path: Path) -> None:
    source, out = tiny_tree(tmp_path / "raw", 1, 1), tmp_path / "out"
    refused("nowhere does not exist: it should be", tmp_path / "nowhere", out)
    refused("resolution 24 cannot be reached from 64", source, out, folder=True, resolutions=[64, 24])
    refused(r"resolutions are \[\]: at least one", source, out, folder=True, resolutions=[])
    refused("each positive and named once", source, out, folder=True, resolutions=[16, 16])
    refused("each positive and named once", source, out, folder=True, resolutions=[16, 0])
    refused("crop is lanczos: it must be one of adm, area", source, out, folder=True, crop="lanczos")
    refused("images_per_shard is 0: it must be at least 1", source, out, folder=True, images_per_shard=0)
    refused("workers is 0: it must be at least 1", source, out, folder=True, workers=0)
    refused("limit is 0: it must be at least 1", source, out, folder=True, limit=0)
    refused("8192]: 4096 is the largest", source, out, folder=True, resolutions=[8192])
    refused("images_per_shard is 10000001: a shard can hold", source, out, folder=True, images_per_shard=10**7 + 1)
    refused("max_corrupt is 2: it is a share", source, out, folder=True, max_corrupt=2)
    assert not out.exists()


def test_bad_folders(tmp_path: Path) -> None:
    source, out = tiny_tree(tmp_path / "raw", 2, 1), tmp_path / "out"
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/x.png").write_bytes(encoded(picture()))
    refused("flat has no subfolders: one folder per class", tmp_path / "flat", out, folder=True)
    refused("x.png is not a folder: one subfolder per class", tmp_path / "flat/x.png", out, folder=True)
    refused("holds a folder class0: ImageNet has nXXXXXXXX", source, out)
    assert not out.exists()


def test_bad_archives(tmp_path: Path) -> None:
    files, out = train_files(2), tmp_path / "out"
    train = write_train_archive(tmp_path / "train.tar", files)
    val, _ = val_archive(tmp_path, [1, 2, 3])
    refused("is not the training archive: it holds ILSVRC2012_val_00000003.JPEG where", val, out)
    refused("is not the validation archive: it holds n02119789.tar, not", train, out, "val")
    (tmp_path / "text").write_text("not a tar " * 100)
    refused("text cannot be read as a tar archive: .*unfinished download", tmp_path / "text", out)
    data = train.read_bytes()
    for cut in (len(data) // 2, data.rindex(b"n02100735.tar") + 100, data.rindex(b"n02100735.tar")):
        (tmp_path / "cut.tar").write_bytes(data[:cut])  # within a picture, within a header, between two members
        refused("cut.tar cannot be read as a tar archive: .*unfinished download", tmp_path / "cut.tar", out)
    (tmp_path / "none.tar").write_bytes(tar_bytes({}))
    refused("none.tar holds no images", tmp_path / "none.tar", out)
    refused("holds no images in n01440764.tar", write_train_archive(tmp_path / "x.tar", files | {"n01440764": {}}), out)
    assert not out.exists()


def test_bad_devkits(tmp_path: Path) -> None:
    val, _ = val_archive(tmp_path, [1, 2, 3])
    out, devkit = tmp_path / "out", tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    refused("labels 2 images and .* holds 3: they must be equal", val, out, "val", devkit=write_devkit(devkit, [1, 2]))
    refused("ILSVRC2012_ID 5, which is no class", val, out, "val", devkit=write_devkit(devkit, [1, 2, 5]))
    devkit.write_bytes(b"no gzip")
    refused("is not ILSVRC2012_devkit_t12.tar.gz as downloaded: ReadError: truncated header", val, out, "val")
    devkit.write_bytes(gzip.compress(tar_bytes({"data/readme.txt": b""})))
    refused("as downloaded: KeyError: 'meta.mat'", val, out, "val")
    devkit.unlink()
    refused("t12.tar.gz does not exist: without .* the validation images have no labels", val, out, "val")
    assert not out.exists()


def test_splits_must_agree_on_classes(tmp_path: Path) -> None:
    prepare_folder(tiny_tree(tmp_path / "a", 3, 1), tmp_path / "out", split="train", resolutions=[8], workers=1)
    source = tiny_tree(tmp_path / "b", 4, 1)
    with pytest.raises(InputError, match=r"4 classes, .*train has 3, and label 3 is \['class3'\] here and \[\] there"):
        prepare_folder(source, tmp_path / "out", split="val", resolutions=[8], workers=1)
    assert not (tmp_path / "out/val").exists()


def test_full_disk_is_one_sentence_and_the_run_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tiny_tree(tmp_path / "raw", 2, 6), tmp_path / "out"
    prepare_folder(source, tmp_path / "whole", resolutions=[8, 4], images_per_shard=4, workers=1)
    write_bytes = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name.startswith("000001.tar.") and path.parent.name == "4":
            write_bytes(path, data[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(shards.Path, "write_bytes", full)
        sentence = "000001.tar could not be written: No space left"
        refused(sentence, source, out, folder=True, resolutions=[8, 4], images_per_shard=4)
    assert (out / "train/.progress/000000.json").exists() and not (out / "train/4/000001.tar").exists()
    prepare_folder(source, out, resolutions=[8, 4], images_per_shard=4, workers=1)
    assert hashes(out) == hashes(tmp_path / "whole")
