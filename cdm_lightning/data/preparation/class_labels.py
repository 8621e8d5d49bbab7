"""The labels of a source that states them beside its images: numbers, or names of classes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from cdm_lightning.foundation.class_names import suggestion
from cdm_lightning.foundation.errors import InputError

MAX_CLASSES = 1_000_000
MAX_DIGITS = 20  # of a number that is read


class ClassLabels:
    """What a label of a source stands for. names: of the classes in label order, where they are known.

    Without names a label is the number of a class or, where `free`, its name, which may look like a number. numbers:
    labels are numbers alone.
    """

    def __init__(self, names: Sequence[str] | None = None, free: bool = False, numbers: bool = False) -> None:
        self.names, self.free, self.numbers = names, free and names is None, numbers
        self.known = {name: number for number, name in enumerate(names or [])}

    def class_of(self, label: Any, image: str) -> str:
        """The name of the class, which is its number where classes have none.

        Raises InputError for what is no class, and for a text that is the name of one class and the number of another.
        image: whose label it is.
        """
        text = label.strip() if isinstance(label, str) else str(label)
        digits = isinstance(label, (str, int)) and not isinstance(label, bool) and is_number(text) and not self.free
        number = int(text) if digits and len(text) <= MAX_DIGITS else MAX_CLASSES
        if text in self.known and isinstance(label, str) and not self.numbers:
            if number != self.known[text] and number < len(self.known):
                raise InputError(
                    f"{image} has the label {text}, which is the name of class {self.known[text]} and the number of "
                    "another: a source with such names must state its labels as whole numbers, in JSON or parquet"
                )
            return text
        if digits:
            if number >= (MAX_CLASSES if self.names is None else len(self.names)):
                raise InputError(
                    f"{image} has the label {text[:40]}, which lies outside 0 ... {len(self.known) - 1} of the classes"
                    if self.names is not None
                    else f"{image} has the label {text[:40]}: {MAX_CLASSES:,} classes at most can be numbered"
                )
            return str(number) if self.names is None else self.names[number]
        shown = text if len(text) <= 40 else f"{text[:40]} ..."
        if self.names is not None:
            raise InputError(f"{image} has the label {shown!r}, which is no class: {suggestion(shown, self.names)}")
        if not self.free:
            raise InputError(
                f"{image} has the label {shown!r}: it must be the number of a class, or be in --classes FILE"
            )
        if not text or not text.isprintable():
            raise InputError(f"{image} has the label {shown!r}: the name of a class must be printable")
        return text

    def in_order(self, found: Iterable[str]) -> list[str]:
        """All classes in label order: those with names, else the names that were found, or 0 ... the highest number."""
        if self.names is not None:
            return list(self.names)
        if self.free:
            return sorted_names(found)
        return [str(number) for number in range(max(map(int, found), default=-1) + 1)]


def is_number(text: str) -> bool:
    """Whether a text is a whole number, of any length."""
    return text.isascii() and text.isdecimal()


def sorted_names(names: Iterable[str]) -> list[str]:
    """Names of classes in label order: by number where all are numbers, else by name.

    Raises InputError for two that are one number, such as 9 and 009.
    """
    names = sorted(set(names))
    if not all(map(is_number, names)):
        return names
    plain = {name: name.lstrip("0") for name in names}
    names.sort(key=lambda name: (len(plain[name]), plain[name]))  # as numbers of any size
    for one, other in pairwise(names):
        if plain[one] == plain[other]:
            raise InputError(f"labels {one} and {other} are one number, and would be two classes: write them alike")
    return names


def read_class_names(path: Path) -> list[str]:
    """The names of the classes in label order, from a file of one name a line or of a JSON list."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        names = json.loads(text) if text.lstrip().startswith("[") else [line.strip() for line in text.splitlines()]
    except OSError as error:
        raise InputError(f"classes {path} cannot be read: {(error.strerror or str(error)).lower()}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"classes {path} is neither lines of text nor a JSON list: {error}") from error
    while names and names[-1] == "":
        names.pop()
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name or not name.isprintable():
            raise InputError(f"classes {path} gives class {number} the name {name!r}: a line of text is expected")
    if not names:
        raise InputError(f"classes {path} is empty: one name a line is expected, in the order of the labels")
    return distinct(names)


def distinct(names: Sequence[str]) -> list[str]:
    """The names, with the number of the class behind one that an earlier class has: ImageNet has two called crane."""
    first = {name: number for number, name in reversed(list(enumerate(names)))}
    return [name if first[name] == number else f"{name} ({number})" for number, name in enumerate(names)]
