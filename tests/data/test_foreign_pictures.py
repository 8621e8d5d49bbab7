"""Pictures that are made to take all memory: `cdm prepare` takes them, counts them, or says which one it was."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from cdm_lightning.data.preparation import raw_images
from cdm_lightning.data.preparation.raw_images import MAX_RATIO, cut_square, decode, on_white

RNG = np.random.default_rng(0)


def encoded(form: str, width: int = 40, height: int = 30, **options: object) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))
    image.save(buffer, form, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def png(width: int, height: int, pixels: bytes, kind: int = 2, before: bytes = b"") -> bytes:
    """A PNG of any header, with compressed pixels, after the chunks `before`."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def zeros(mebibytes: int) -> bytes:
    """So many MiB of zeros, compressed, made without holding them."""
    deflate = zlib.compressobj(1)
    return b"".join([deflate.compress(bytes(1 << 20)) for _ in range(mebibytes)]) + deflate.flush()


def tiff(tags: dict[int, object], pixels: bytes = b"") -> bytes:
    """A little-endian TIFF of these tags, with one strip."""
    directory = ImageFileDirectory_v2()
    defaults = {256: 8, 257: 8, 258: (8,), 259: 1, 262: 1, 273: (8,), 277: 1, 278: 8, 279: (len(pixels),)}
    for tag, value in (defaults | tags).items():
        directory[tag] = value
    directory[273] = (8 + len(pixels),)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory.tobytes(8 + len(pixels))


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new)


def jpeg_of(width: int, height: int, **options: object) -> bytes:
    """A JPEG of 40x30 whose header claims another size."""
    return patched(encoded("JPEG", **options), struct.pack(">HH", 30, 40), struct.pack(">HH", height, width))


def gif_of(screen: tuple[int, int], frame: tuple[int, int]) -> bytes:
    """A GIF of 40x30 whose screen and first frame claim other sizes."""
    data = encoded("GIF")
    data = data[:6] + struct.pack("<HH", *screen) + data[10:]
    return patched(data, b"\x2c\0\0\0\0" + struct.pack("<HH", 40, 30), b"\x2c\0\0\0\0" + struct.pack("<HH", *frame))


def webp_of(width: int, height: int) -> bytes:
    """A lossless WebP of 40x30 whose header claims another size (14 bits each)."""
    data = encoded("WEBP", lossless=True)
    at = data.index(b"VP8L") + 9
    bits = struct.unpack("<I", data[at : at + 4])[0] & ~0x0FFFFFFF | (width - 1) | (height - 1) << 14
    return data[:at] + struct.pack("<I", bits) + data[at + 4 :]


def webp_canvas(width: int, height: int) -> bytes:
    """An animated WebP of a large canvas and a small frame."""
    frame = encoded("WEBP")[12:]
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    place = bytes(6) + b"\x27\0\0\x1d\0\0" + bytes(4)  # 40x30 at (0, 0)
    body = b"WEBP"
    for kind, data in [(b"VP8X", b"\x02\0\0\0" + size), (b"ANIM", bytes(6)), (b"ANMF", place + frame)]:
        body += kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bmp_of(width: int, height: int) -> bytes:
    data = encoded("BMP")
    return data[:18] + struct.pack("<ii", width, height) + data[26:]


def avif_of(width: int, height: int) -> bytes:
    return patched(encoded("AVIF"), struct.pack(">II", 40, 30), struct.pack(">II", width, height))


def gif_of_frames(count: int) -> bytes:
    data = encoded("GIF", 8, 8)
    start = data.index(b"\x2c\0\0\0\0")
    return data[:start] + data[start:-1] * count + b";"


def hostile() -> dict[str, dict[str, bytes]]:
    """Files by what happens to them where 320 MB are left."""
    whole, exif = encoded("JPEG"), Image.Exif()
    exif[0x0112] = 6
    text = chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(1 << 20)))
    profile = chunk(b"iCCP", b"x\0\0" + zeros(256))
    return {
        "taken": {
            "strip.png": png(1, 60_000, zeros(1)),
            "wide strip": png(60_000, 1, zeros(1)),
            "strip.jpg": encoded("JPEG", 1, 60_000),
            "turned strip.jpe": encoded("JPEG", 1, 60_000, exif=exif),
            "two wide.gif": encoded("GIF", 2, 60_000),
            "plain.ppm": b"P3 1 60000 255 " + b"1 " * 180_000,
            "transparent.png": png(5000, 5000, zeros(100), kind=6),
            "long transparent.png": png(16_000_000, 1, zeros(65), kind=6),
            "more than its pixels.png": png(8, 8, zeros(256)),
            "frames.gif": gif_of_frames(5000),
            "profile.jpg": encoded("JPEG", icc_profile=bytes(100_000)),
            "claims.jpg": jpeg_of(4000, 4000),  # libjpeg fills what is missing with grey
            "claims, progressive.jpg": jpeg_of(4000, 4000, progressive=True),
        },
        "counted": {
            "empty.jpg": b"",
            "cut.jpg": whole[: len(whole) // 2],
            "zero.jpg": jpeg_of(40, 0),
            "claims.jpg": jpeg_of(65_500, 65_500),
            "zero.png": png(0, 8, zeros(1)),
            "claims.png": png(4000, 4000, zlib.compress(bytes(1000))),
            "claims 10 gigapixels": png(100_000, 100_000, zeros(1)),
            "texts.png": png(8, 8, zeros(1), before=text * 100),
            "profile.png": png(8, 8, zeros(1), before=profile),
            "zero.gif": gif_of((0, 0), (0, 0)),
            "screen.gif": gif_of((65_535, 65_535), (40, 30)),
            "frame.gif": gif_of((1, 1), (65_535, 65_535)),
            "lossless.webp": webp_of(16_383, 16_383),
            "canvas.webp": webp_canvas(1 << 24, 1 << 24),
            "wide.bmp": bmp_of(2**31 - 1, 1),
            "tall.bmp": bmp_of(1, -(2**31)),
            "zero.bmp": bmp_of(0, 0),
            "claims.ppm": b"P6 100000 100000 255 x",
            "overflows.ppm": b"P6 99999999999 1 255 x",
            "zero.ppm": b"P6 0 8 255 x",
            "claims.avif": avif_of(30_000, 30_000),
            "claims.tif": tiff({256: 10**6, 257: 10**6}),
            "zero.tif": tiff({256: 0}),
            "strips.tif": tiff({257: 10_000, 278: 1, 279: (1,) * 10_000}, b"x"),
            "deflated.tif": tiff({256: 4000, 257: 4000, 278: 4000, 259: 8}, zeros(16)[:100]),
            "tiles.tif": tiff({322: 2**31 - 16, 323: 2**31 - 16, 324: (8,), 325: (1,), 259: 8}, b"x"),
            "tags.tif": b"II*\0\x08\0\0\0\xff\xff" + struct.pack("<HHII", 256, 4, 2**32 - 1, 8) * 65_535,
        },
        "refused": {
            "claims 169 megapixels.png": png(13_000, 13_000, zeros(1)),
            "claims 169 megapixels.jpg": jpeg_of(13_000, 13_000, progressive=True),
            "172 megapixels in a row.png": png(172_000_000, 1, zeros(1)),
            "notes": b"GIF89a is the name of a format",
        },
    }


PREPARE = """
import json, os, resource, signal, sys
from pathlib import Path
from cdm_lightning.data.preparation.folders import prepare_folder
from cdm_lightning.data.preparation.raw_images import image_suffixes
from cdm_lightning.foundation.errors import InputError

image_suffixes()  # loads Pillow's plugins once
held = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize"))
for source in sorted(Path(sys.argv[1]).glob("*/*")):
    if os.fork() == 0:
        signal.alarm(120)  # ends a process that hangs
        resource.setrlimit(resource.RLIMIT_AS, [held + (320 << 20)] * 2)
        try:
            prepare_folder(source / "in", source / "out", resolutions=[256], workers=1, max_corrupt=1)
            outcome = "taken"
        except InputError as error:
            outcome = f"refused: {error}"
            for record in source.glob("out/train/.progress/0*.json"):
                outcome = "counted: " + json.loads(record.read_text())["skipped"][0]["reason"]
        (source / "outcome").write_text(outcome)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is limited as Linux does it")
def test_no_picture_takes_all_memory(tmp_path: Path) -> None:
    files = {tmp_path / outcome / name: data for outcome, some in hostile().items() for name, data in some.items()}
    for folder, data in files.items():
        (folder / "in/class").mkdir(parents=True)
        (folder / "in/class" / folder.name).write_bytes(data)
    for name, form in [("counted/sparse.jpg", "JPEG"), ("refused/sparse", "WEBP")]:
        folder = tmp_path / name
        (folder / "in/class").mkdir(parents=True)
        with open(folder / "in/class" / folder.name, "wb") as file:
            file.write(encoded(form))
            file.truncate(1 << 40)  # a tebibyte that takes no room on the disk
        files[folder] = b""
    command = [sys.executable, "-c", PREPARE, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    outcomes = {f: (f / "outcome").read_text() if (f / "outcome").exists() else run.stderr[-2000:] for f in files}
    assert not {f: outcome for f, outcome in outcomes.items() if not outcome.startswith(f.parent.name)}
    for folder, outcome in outcomes.items():
        assert "\n" not in outcome and (folder.parent.name != "refused" or folder.name in outcome), outcome


@pytest.mark.parametrize("width,height", [(1, 500), (500, 1), (2, 501), (801, 3)])
def test_a_strip_is_cut_as_if_it_had_been_scaled_whole(width: int, height: int) -> None:
    image = Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    middle = decode(buffer.getvalue())
    assert max(middle.size) <= MAX_RATIO * min(middle.size)
    for crop in ("adm", "area"):
        assert np.array_equal(cut_square(middle, 24, crop), cut_square(image, 24, crop))


def test_transparency_is_the_same_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("RGBA", "LA"):
        pixels = RNG.integers(0, 256, (30, 40, len(mode)), dtype=np.uint8)
        image = Image.fromarray(pixels, mode)
        whole = on_white(image, "RGB")
        monkeypatch.setattr(raw_images, "BAND", 40 * 7)
        assert np.array_equal(whole, on_white(image, "RGB"))
        monkeypatch.undo()
