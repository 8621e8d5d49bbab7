"""Tables that name the class of each picture: CSV, tab or semicolon separated, or words; and pictures sorted by one."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cdm_lightning.data.preparation.class_labels import sorted_names
from cdm_lightning.data.preparation.listing import Listing
from cdm_lightning.data.preparation.raw_images import RawImage
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.terminal import printable

IMAGE_WORDS = {"image", "images", "imageid", "image_id", "image_name", "image_path", "img", "file", "filename"}
IMAGE_WORDS |= {"file_name", "filepath", "file_path", "path", "id", "picture", "photo"}
LABEL_WORDS = {"label", "labels", "class", "class_name", "classname", "category", "target", "wnid", "species", "breed"}
BOXES = "PredictionString"  # of Kaggle's ImageNet: the class, then four numbers; several times where there are several
LABEL_WORDS |= {BOXES.lower()}
MAX_BYTES = 1 << 28  # of a table: some millions of lines
WITHOUT_LINE, WITHOUT_PICTURE = "pictures that the table does not name", "lines of the table without a picture"


@dataclass(frozen=True)
class LabelTable:
    """A table of labels. columns: of the picture and of its class, by name, or by number from 1; None: as they look.

    The separator is that of the first line: a tab, else a comma, else a semicolon, else white space. The first line is
    a header if a column is chosen by name, if it calls its picture image, file, path or the like, or if it names both.
    Without a header the first column is the picture and the second its class.
    """

    path: Path
    image_column: str | None = None
    label_column: str | None = None

    def read(self) -> list[tuple[str, str]]:
        """(picture, class) of each line, in order."""
        lines = self.lines()
        image, label, header = self.places(lines[0][1])
        pairs = []
        for number, cells in lines[header:]:
            if len(cells) <= max(image, label):
                wanted = max(image, label) + 1
                raise InputError(f"{self.path} has {len(cells)} columns in line {number}, and {wanted} are needed")
            name, words = cells[image], cells[label].split() if header and lines[0][1][label] == BOXES else None
            found = cells[label] if words is None else "".join(words[:1])
            if not name or not found:
                raise InputError(f"{self.path} has no {'class' if name else 'picture'} in line {number}")
            if not found.isprintable():
                raise InputError(f"{self.path} names a class {found!r} in line {number}: it must be printable")
            pairs.append((name, found))
        if not pairs:
            raise InputError(f"{self.path} holds a header and no line below it")
        return pairs

    def lines(self) -> list[tuple[int, list[str]]]:
        """(number, cells) of each line that is not empty; at least one."""
        if not self.path.is_file():
            raise InputError(f"{self.path} is no file: it should be a table that names the class of each picture")
        if (size := self.path.stat().st_size) > MAX_BYTES:
            raise InputError(f"{self.path} has {size:,} bytes: a table of labels may have {MAX_BYTES:,}")
        try:
            text = self.path.read_bytes().decode("utf-8-sig")
            if "\0" in text:
                raise ValueError("it holds zero bytes")
            first = next((line for line in io.StringIO(text, newline=None) if line.strip()), "")
            if separator := next((sign for sign in "\t,;" if sign in first), None):
                reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
                lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
            else:
                lines = [(number, line.split()) for number, line in enumerate(io.StringIO(text, newline=None), 1)]
        except csv.Error as error:
            quote = "a quotation mark is open at its end" if "end of data" in str(error) else str(error)
            raise InputError(f"{self.path} is no table: {quote}") from error
        except ValueError as error:
            raise InputError(f"{self.path} is no table of text in UTF-8: {error}") from error
        lines = [(number, cells) for number, cells in lines if any(cells)]
        if not lines:
            raise InputError(f"{self.path} is empty: it should be a table that names the class of each picture")
        return lines

    def places(self, first: list[str]) -> tuple[int, int, bool]:
        """Where picture and class stand in a line, and whether the first line is a header."""
        chosen = [self.place(column, first) for column in (self.image_column, self.label_column)]
        words = [cell.lower() for cell in first]
        seen = [[k for k, word in enumerate(words) if word in known] for known in (IMAGE_WORDS, LABEL_WORDS)]
        by_name = any(column and not column.isdecimal() for column in (self.image_column, self.label_column))
        header = by_name or words[chosen[0] or 0] in IMAGE_WORDS or all(seen)
        for place, option in enumerate(("image_column", "label_column")):
            if chosen[place] is None:
                others = [k for k in range(len(first)) if k != chosen[1 - place]]
                if header:
                    others = [k for k in others if (k in seen[place] if seen[place] else k not in seen[1 - place])]
                if not others or (header and len(others) > 1):
                    raise InputError(f"{self.path} has columns {self.about(first)}: give {option}, by name or number")
                chosen[place] = others[0]
        image, label = chosen
        assert image is not None and label is not None
        if image == label:
            raise InputError(f"image_column and label_column are both column {image + 1} of {self.path}")
        return image, label, header

    def place(self, column: str | None, first: list[str]) -> int | None:
        """Where a column stands that was chosen by name or number; None if it was not."""
        if column is None:
            return None
        if column.isdecimal() and 1 <= int(column) <= len(first):
            return int(column) - 1
        if column.isdecimal() or column not in first:
            raise InputError(f"{self.path} has no column {column}: its first line has {self.about(first)}")
        return first.index(column)

    def about(self, first: list[str]) -> str:
        """The cells of the first line, the first ten of them."""
        return ", ".join(map(printable, first[:10])) + (", ..." if len(first) > 10 else "")


def sorted_by_table(images: list[RawImage], table: LabelTable) -> Listing:
    """Pictures by the class that a table names. Their names become CLASS/NAME; the others are left out.

    A line names a picture by its path or its file name, with or without suffix, and may begin with further folders.
    Raises InputError if it could be several pictures, if two lines disagree, or if no line names any.
    """
    by_name: defaultdict[str, list[int]] = defaultdict(list)
    for number, image in enumerate(images):
        path = PurePosixPath(image.name)
        for name in {image.name, str(path.with_suffix("")), path.name, path.stem}:
            by_name[name].append(number)
    labels: dict[int, str] = {}
    listing, lines = Listing(), table.read()
    for name, label in lines:
        parts = PurePosixPath(name.replace("\\", "/")).parts
        tails = ("/".join(parts[start:]) for start in range(len(parts)))
        found = next((by_name[tail] for tail in tails if tail in by_name), [])
        if len(found) > 1:
            raise InputError(
                f"{table.path} names {printable(name)}, which may be "
                f"{' or '.join(printable(images[k].name) for k in found[:2])}: it must name one picture"
            )
        if not found:
            listing.left_out[WITHOUT_PICTURE].append(name)
        elif labels.setdefault(found[0], label) != label:
            raise InputError(
                f"{table.path} names {printable(name)} twice, as {labels[found[0]]} and as {label}: one class is needed"
            )
    if images and not labels:
        raise InputError(
            f"{table.path} names none of the {len(images):,} pictures: it begins with "
            f"{printable(lines[0][0])}, and the first picture is {printable(images[0].name)}"
        )
    listing.classes = sorted_names(labels.values())
    listing.images = {label: [] for label in listing.classes}
    for number, image in enumerate(images):
        if number in labels:
            image.name = f"{labels[number]}/{image.name}"
            listing.images[labels[number]].append(image)
        else:
            listing.left_out[WITHOUT_LINE].append(image.name)
    return listing
