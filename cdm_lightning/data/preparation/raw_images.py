"""Raw images: decoded by what they hold, whatever their name ends in, and cropped to squares, in bounded memory."""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import IO, Any, Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# Rasters alone: Pillow opens PostScript with an external program. JPEG 2000 takes 20 bytes of memory a pixel.
FORMATS = ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "AVIF"]
MAX_FILE_BYTES = 1 << 30  # of one encoded image
MAX_RATIO = 32  # of the long side to the short one; what lies beyond, at both ends, is cut off before scaling
BAND = 1 << 22  # pixels that are put on white at once
Crop = Literal["adm", "area"]
FILTERS: dict[Crop, str] = {"adm": "box halvings, then bicubic", "area": "box"}


@dataclass(slots=True)
class RawImage:
    """One encoded image: `size` bytes at `offset` of `file`. `name` is CLASS/FILE, in archives and folders alike.

    problem: why it cannot be read, if that is known before. label: the place of its class, set once all are known.
    """

    name: str
    file: str
    offset: int
    size: int
    problem: str = ""
    label: int = -1

    def read(self) -> bytes:
        """The encoded bytes. Raises ValueError if it has a problem or more than MAX_FILE_BYTES, and OSError."""
        if self.problem:
            raise ValueError(self.problem)
        if self.size > MAX_FILE_BYTES:
            raise ValueError(f"{self.size:,} bytes are more than the {MAX_FILE_BYTES:,} that one image may have")
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@cache
def image_suffixes() -> set[str]:
    """The endings of names, such as .jpg, that Pillow knows for FORMATS."""
    return {suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS}


def has_image_header(stream: IO[bytes]) -> bool:
    """Whether an open file begins as an image of FORMATS does. Decodes no pixels."""
    with warnings.catch_warnings(action="ignore"):
        try:
            Image.open(stream, formats=FORMATS)
            return True
        except (Image.DecompressionBombError, MemoryError):  # an image, which will be counted as unreadable
            return True
        except Exception:  # plugins raise OSError, ValueError, KeyError and more for a text that begins as their format
            return False


def decode(data: bytes, grey: bool = False) -> Image.Image:
    """Decode an image, or the first of several, to RGB or grey. Raises ValueError with the reason if it is damaged.

    Of an image longer than MAX_RATIO times its width only the middle is returned. Memory is bounded: Pillow's limit is
    179 million pixels, which take 1.3 to 3 GB.
    """
    with warnings.catch_warnings(action="ignore"):  # Pillow warns of broken EXIF data although the pixels are good
        try:
            image: Any = Image.open(io.BytesIO(data), formats=FORMATS)
            image.load()
            return as_displayed(image, "L" if grey else "RGB")
        except MemoryError:
            raise
        except UnidentifiedImageError as error:
            raise ValueError("no known image format" if data else "an empty file") from error
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error and more
            if "out of memory" in str(error):
                raise MemoryError from error
            raise ValueError(str(error) or type(error).__name__) from error


def as_displayed(image: Any, mode: str) -> Image.Image:
    """The middle of the image as a viewer displays it: rotated by its EXIF tag, 8 bits, transparency on white.

    Large images are not copied without need: one may hold 179 million pixels of 4 bytes.
    """
    is_16_bit = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")
    with suppress(Exception):  # the EXIF block may be broken
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    image = cut_ends(image)
    if is_16_bit:  # convert() would clip 16-bit grey at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no fixed range")
    if image.has_transparency_data:
        return on_white(image, mode)
    return image if image.mode == mode else image.convert(mode)


def cut_ends(image: Image.Image) -> Image.Image:
    """The middle of an image, at most MAX_RATIO times as long as wide; its centre stays where it was."""
    if not min(image.size):
        raise ValueError(f"{image.width}x{image.height} has no pixels")
    longest = MAX_RATIO * min(image.size)
    if max(image.size) <= longest:
        return image
    cut = [max(0, -(-(side - longest) // 2)) for side in image.size]  # as much at both ends
    return image.crop((cut[0], cut[1], image.width - cut[0], image.height - cut[1]))


def on_white(image: Image.Image, mode: str) -> Image.Image:
    """A transparent image on white. Works in bands, as compositing holds several copies of what it is given."""
    result, rows = Image.new(mode, image.size), max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        result.paste(Image.alpha_composite(Image.new("RGBA", band.size, "white"), band).convert(mode), (0, top))
    return result


def cut_square(image: Image.Image, size: int, crop: Crop) -> np.ndarray:
    """The centre square at size x size: uint8 (size, size, C).

    image: as `decode` returns it, at most MAX_RATIO times as long as wide: so many squares `adm` holds in memory.
    adm: resizes the image, then crops, with the steps and the rounding of guided-diffusion (ADM).
    area: crops the square, then takes the mean over the area of each target pixel (bicubic for enlarging).
    """
    if crop == "adm":
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    else:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((size, size), Image.Resampling.BOX if side > size else Image.Resampling.BICUBIC)
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array
