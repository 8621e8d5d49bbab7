"""What a source holds: its classes and images, and what is left out of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import IO, Literal

from cdm_lightning.data.preparation.raw_images import MAX_FILE_BYTES, RawImage, has_image_header, image_suffixes
from cdm_lightning.foundation.terminal import printable

HIDDEN = "hidden"
Split = Literal["train", "val"]


class Listing:
    """Images by class, in any order, and the names of what is left out, by kind.

    A file that is called an image, by its suffix, is listed as one, and counted as unreadable later if it is none. Any
    other file is listed if it begins as an image does.
    """

    def __init__(self, *classes: str) -> None:
        self.images: dict[str, list[RawImage]] = {name: [] for name in classes}
        self.classes: list[str] | None = None  # in label order; None: sorted
        self.left_out: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, to_class: str, image: RawImage, open_file: Callable[[], IO[bytes] | None]) -> None:
        """Add a file to a class, or to what is left out. open_file: opens it, to look at its first bytes."""
        path = PurePosixPath(image.name)
        if path.name.startswith("."):
            kind = HIDDEN
        elif path.suffix.lower() in image_suffixes():
            kind = ""
        else:
            kind = image.problem or without_image(image.size, open_file)
        if kind:
            self.left_out[kind].append(image.name)
        else:
            self.images[to_class].append(image)

    def merge(self, other: Listing) -> None:
        """Add what another listing holds."""
        self.images |= other.images
        for kind, names in other.left_out.items():
            self.left_out[kind] += names

    def labelled(self, classes: list[str]) -> list[RawImage]:
        """All images, each with the place of its class in `classes`."""
        labels = {name: label for label, name in enumerate(classes)}
        for name, images in self.images.items():
            for image in images:
                image.label = labels[name]
        return [image for images in self.images.values() for image in images]

    def about_left_out(self) -> str:
        """How many files of each kind are left out, with some names. "" if none are."""
        return "; ".join(f"{kind}: {len(names):,} ({examples(names)})" for kind, names in self.left_out.items())


def without_image(size: int, open_file: Callable[[], IO[bytes] | None]) -> str:
    """Why a file that is not called an image is left out; "" if it is one."""
    if size > MAX_FILE_BYTES:
        return "larger than an image may be"
    try:
        file = open_file()
        assert file is not None
        with file:
            return "" if has_image_header(file) else "no known image format"
    except OSError as error:
        return (error.strerror or "cannot be opened").lower()


def examples(names: Iterable[str]) -> str:
    """Three of the names, of different suffixes where possible."""
    names = sorted(names)
    of_suffix = {PurePosixPath(name).suffix.lower(): name for name in reversed(names)}
    chosen = list(dict.fromkeys([*sorted(of_suffix.values()), *names[:3]]))[:3]
    return ", ".join(map(printable, chosen)) + (", ..." if len(names) > 3 else "")
