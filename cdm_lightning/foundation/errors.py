"""Errors that are explained to the user in one sentence, and how to tell them from bugs."""

from __future__ import annotations

import shlex
import sys


class InputError(Exception):
    """The user's input cannot be used. The message is one sentence that names the value and the rule.

    The command line prints the message and exits with code 2. Any other exception is a bug and keeps its traceback.
    """


class TrainingFault(InputError):
    """A training cannot continue. The message is one sentence that says what happened and when."""


def user_error(error: BaseException | None) -> Exception | None:
    """The error to explain to the user: `error` or one of its causes; None for a bug.

    jsonargparse wraps the errors that it catches, so that the message is often that of a cause.
    """
    while error is not None:
        if isinstance(error, InputError) or (isinstance(error, OSError) and error.errno is not None):
            return error
        if is_misconfiguration(error):
            return InputError(" ".join(str(error).split()))
        if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("cdm_lightning"):
            return InputError(f"a package is missing: {' '.join(str(error).split())}")
        if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid"):
            if "Bus error" in str(error):
                return InputError(
                    "a process that reads images found no room in /dev/shm: give fewer data.num_workers, or a larger "
                    "/dev/shm (docker run --shm-size), and the same command goes on"
                )
            return InputError(
                f"a process that reads images was ended from outside, as happens when memory runs out "
                f"({str(error).split('. ')[0]}): the same command goes on, with fewer data.num_workers if need be"
            )
        if isinstance(error, RuntimeError) and "received 0 items of ancdata" in str(error) + str(error.__cause__):
            return InputError("too many files are open: raise the limit by `ulimit -n`, or give fewer data.num_workers")
        error = error.__cause__
    return None


def is_misconfiguration(error: BaseException) -> bool:
    """Whether this is Lightning's error for wrong settings. Does not import Lightning."""
    lightning = sys.modules.get("lightning.pytorch.utilities.exceptions")
    return lightning is not None and isinstance(error, lightning.MisconfigurationException)


def error_sentence(error: Exception) -> str:
    """The message of an error. An error from a worker process holds a traceback too; only its last line counts."""
    return str(error).strip().splitlines()[-1].removeprefix(f"{InputError.__module__}.{InputError.__qualname__}: ")


def split_arguments(text: str) -> list[str]:
    """The words of a line of options, as a shell splits them. Raises InputError if a quotation does not end."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError(f"arguments {text!r} cannot be split into words: {str(error).lower()}") from error
