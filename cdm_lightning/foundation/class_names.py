"""Names of classes. A class number means something in its own list of names only, so lists are compared by name."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from cdm_lightning.foundation.errors import InputError

NO_CLASSES = ["0"]  # the class names of samples from a cascade without class conditioning
SHOWN = 10  # names in a sentence


def check_same_classes(
    classes: Sequence[str] | None, others: Sequence[str] | None, what: object, other: object
) -> None:
    """Refuse two lists of class names that differ, in their order too. None is unknown, and not compared.

    what, other: how the sentence calls the owners of the two lists.
    """
    if classes is None or others is None or list(classes) == list(others):
        return
    if len(classes) != len(others):
        raise InputError(f"{what} has {len(classes)} classes, and {other} {len(others)}")
    number = next(k for k, (name, another) in enumerate(zip(classes, others, strict=True)) if name != another)
    order = ": the names are the same, in another order" if sorted(classes) == sorted(others) else ""
    raise InputError(f"{what} calls class {number} {classes[number]!r}, and {other} {others[number]!r}{order}")


def numbers_in(
    names: Sequence[str], classes: Sequence[str], counts: Sequence[int], what: object, other: object
) -> list[int]:
    """The number in `names` of each class in `classes`, by name; -1 for an unknown class without images.

    counts: images of each class in `classes`. Raises InputError for an unknown class that has images.
    """
    number = {name: k for k, name in reversed(list(enumerate(names)))}
    for name, count in zip(classes, counts, strict=True):
        if count and name not in number:
            raise InputError(
                f"{what} holds images of class {name!r}, which is none of {other}: {suggestion(name, names)}"
            )
    return [number.get(name, -1) for name in classes]


def class_number(word: str, names: Sequence[str] | None) -> int:
    """The number of a class that a user gives by its name or its number; a name goes before a number.

    names: of all classes, None if they are not known. Raises InputError for an unknown name.
    """
    if names is not None and word in names:
        return list(names).index(word)
    if word.removeprefix("-").isdecimal():
        return int(word)
    if names is None:
        raise InputError(f"class {word!r} is no number, and the names of this cascade's classes are not known")
    raise InputError(f"class {word!r} is none of this cascade's classes: {suggestion(word, names)}")


def suggestion(word: str, names: Sequence[str]) -> str:
    """The end of a sentence about an unknown class: the nearest name, or else the first names."""
    folded = {name.casefold(): name for name in names}
    if near := get_close_matches(word.casefold(), folded, 1):
        return f"did you mean {folded[near[0]]!r}?"
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
