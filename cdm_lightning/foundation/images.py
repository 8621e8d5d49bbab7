"""Images: uint8 to float32 in [-1, 1] and back, exact downscaling, PNG, and grids of images in one picture."""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import write_atomically


def to_float(image: torch.Tensor) -> torch.Tensor:
    """u / 127.5 - 1: uint8 of any shape to float32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def to_uint8(image: torch.Tensor) -> torch.Tensor:
    """round((x + 1) * 127.5), clamped to 0 ... 255: float of any shape to uint8, the inverse of `to_float`."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def stored_to_tensor(stored: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, C) as stored to (B, C, H, W), with the strides of images drawn in memory.

    The last bits of a network's output depend on the strides of its input. `contiguous()` is not enough: with one
    channel it keeps the strides of the stored array.
    """
    return torch.from_numpy(stored).permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)


def quantize(image: torch.Tensor) -> torch.Tensor:
    """Round to 8-bit values, as float32: the next stage gets the same image from memory as from a PNG."""
    return to_float(to_uint8(image))


def output_images(image: torch.Tensor, kind: str) -> Any:
    """Images as diffusers gives them out. image: float (B, C, H, W) in [-1, 1].

    kind: "pil" for a list of PIL images, "np" for float32 (B, H, W, C) in [0, 1], "pt" for float32 (B, C, H, W) in
    [0, 1]. Raises InputError for another.
    """
    if kind not in ("pil", "np", "pt"):
        raise InputError(f"output_type {kind!r} is none of pil, np and pt")
    if kind == "pil":
        stored = to_uint8(image).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one) for one in stored]
    unit = ((image.float() + 1) / 2).clamp(0, 1)
    return unit if kind == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()


def downscale(image: torch.Tensor, resolution: int) -> torch.Tensor:
    """Halve the image by 2x2 means, rounded half to even to 8 bits, until it is `resolution` pixels wide.

    image: uint8 (..., H, W) with H = W = resolution * 2^k. Because each step halves and rounds, 256 -> 64 gives the
    same bits as 256 -> 128 -> 64.
    """
    check_power_of_two(image.shape[-1], resolution)
    while image.shape[-1] > resolution:
        total = image[..., ::2, :].short() + image[..., 1::2, :]  # integers: exact, and faster than pooling
        total = total[..., ::2] + total[..., 1::2]
        image = ((total + 1 + ((total >> 2) & 1)) >> 2).to(torch.uint8)
    return image


def check_power_of_two(high: int, low: int) -> None:
    """Refuse two resolutions whose ratio is not a power of two."""
    ratio = high // low if low > 0 else 0
    if ratio < 1 or ratio * low != high or ratio & (ratio - 1):
        raise InputError(f"resolution {low} cannot be reached from {high}: their ratio must be a power of two")


def encode_png(image: np.ndarray) -> bytes:
    """Lossless PNG bytes of one uint8 image (H, W, C), C = 1 or 3."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def encode_photo(image: np.ndarray) -> bytes:
    """Lossless PNG bytes of a photograph, uint8 (H, W, C), C = 1 or 3: 8 times faster than `encode_png`, a bit larger.

    Every row uses the "average" filter, x - floor((left + above) / 2), where Pillow tries all five filters. zlib
    searches only for runs of equal bytes, as filtered photographs have hardly any longer repeats. Source: the PNG
    specification, chapters 5, 9 and 11.
    """
    height, width, channels = image.shape
    rows = image.reshape(height, width * channels)
    left, above = np.zeros_like(rows), np.zeros_like(rows)
    left[:, channels:], above[1:] = rows[:, :-channels], rows[:-1]
    filtered = np.full((height, width * channels + 1), 3, np.uint8)  # each row starts with its filter type, 3 = average
    filtered[:, 1:] = rows - ((left.astype(np.uint16) + above) >> 1).astype(np.uint8)  # modulo 256
    deflate = zlib.compressobj(6, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", deflate.compress(filtered.tobytes()) + deflate.flush()), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def decode_png(data: bytes, side: int | None = None) -> np.ndarray:
    """uint8 (H, W, C) of one PNG, C = 1 for grey and 3 for colour. Refuses palettes, 16 bits and transparency.

    side: the required width and height; checked in the header, before memory is allocated for the pixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=["PNG"])
    except UnidentifiedImageError as error:
        raise InputError("it is no PNG image") from error  # Pillow's own message holds a memory address
    if side is not None and image.size != (side, side):
        raise InputError(f"it is {image.width}x{image.height} where {side}x{side} is expected")
    if image.mode not in ("L", "RGB"):
        raise InputError(f"an image of mode {image.mode} is neither 8-bit grey nor 8-bit RGB")
    array = np.array(image)
    return array[..., None] if array.ndim == 2 else array


def save_grid(
    rows: Sequence[Sequence[torch.Tensor]],
    path: str | Path,
    cell: int,
    gap: int = 2,
    heads: Sequence[str] = (),
    names: Sequence[str] = (),
) -> None:
    """Save rows of images as one PNG, each image resized to `cell` pixels by nearest neighbour.

    rows: uint8 (C, H, W) images; rows may differ in length and images in size. heads: texts above the columns, of one
    line or several. names: texts left of the rows.
    """
    columns = max(len(row) for row in rows)
    sizes: dict[str, tuple[float, float]] = {}
    if heads or names:
        from matplotlib import get_data_path  # for its font, which has more letters than Pillow's

        font = ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 12)
        ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
        sizes = {text: ruler.multiline_textbbox((0, 0), text, font)[2:] for text in (*heads, *names)}
    left = math.ceil(max((sizes[name][0] + 8 for name in names), default=0))
    top = math.ceil(max((sizes[head][1] + 8 for head in heads), default=0))
    wide = math.ceil(max([cell, *(sizes[head][0] for head in heads)])) + gap
    size = (left + columns * wide - gap, top + len(rows) * (cell + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for x, head in enumerate(heads):
        pen.multiline_text((left + x * wide, top - 4), head, "black", font, anchor="ld")
    for y, name in enumerate(names):
        pen.text((0, top + y * (cell + gap) + cell // 2), name, "black", font, anchor="lm")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            array = image.cpu().permute(1, 2, 0).numpy()
            picture = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).convert("RGB")
            sheet.paste(
                picture.resize((cell, cell), Image.Resampling.NEAREST), (left + x * wide, top + y * (cell + gap))
            )
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_atomically(Path(path), buffer.getvalue())  # two commands on one folder may end at the same time
