"""Errors that have a sentence for the person at the terminal, and how to tell them from defects."""

from __future__ import annotations

import sys


class InputError(Exception):
    """What a person gave cannot be used: one sentence that names the value and the rule.

    The command line prints the sentence and exits with 2; everything else is a defect and keeps its traceback.
    """


class TrainingFault(InputError):
    """A training cannot go on: one sentence that says what happened to it and when, printed as an InputError's is."""


def user_error(error: BaseException | None) -> Exception | None:
    """The error among `error` and its causes that has a sentence for people; None for a defect.

    jsonargparse wraps what it catches, so that the sentence is often that of a cause.
    """
    while error is not None:
        if isinstance(error, InputError) or (isinstance(error, OSError) and error.errno is not None):
            return error
        if is_misconfiguration(error):
            return InputError(" ".join(str(error).split()))
        if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid"):
            return InputError(
                f"a process that reads images was ended from outside, as happens when memory runs out "
                f"({str(error).split('. ')[0]}): the same command goes on, with fewer data.num_workers if need be"
            )
        error = error.__cause__
    return None


def is_misconfiguration(error: BaseException) -> bool:
    """Whether it is Lightning's error for wrong settings. Lightning is not imported to find out."""
    lightning = sys.modules.get("lightning.pytorch.utilities.exceptions")
    return lightning is not None and isinstance(error, lightning.MisconfigurationException)


def sentence_of(error: Exception) -> str:
    """The sentence of an error, which a worker process wraps in its own traceback."""
    return str(error).strip().splitlines()[-1].removeprefix(f"{InputError.__module__}.{InputError.__qualname__}: ")
