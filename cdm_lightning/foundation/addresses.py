"""Files at addresses (https://, s3://, gs://, hf:// ...), read through fsspec; what fails is tried again."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from cdm_lightning.foundation.errors import InputError

PAUSES = (0.5, 1, 2, 4)  # seconds between two tries
SILENCE = 60  # seconds without a byte after which a try over http has failed
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # protocol -> extra of this package
FINAL = (400, 401, 403, 404, 405, 410, 451)  # answers of a server that another try would get again
CHAIN = re.compile(r"(^|::)(simplecache|filecache|blockcache|cached|zip|tar|libarchive)(:/.*?)?::[\w+.-]+:/", re.ASCII)
Result = TypeVar("Result")
kept = threading.local()  # the file systems of each thread


class NoSuchFile(InputError):
    """A server answers that there is no such file, or none for us."""


class NoAnswer(InputError):
    """A server cannot be reached, or fails."""


def is_address(text: str | Path) -> bool:
    """Whether a text names a file by an address (`protocol://...`), not by a path."""
    return address_of(text) is not None


def address_of(text: str | Path) -> str | None:
    """The address that a text is, or None for a path. A Path has swallowed a slash of it, which is put back.

    Raises InputError for a chain of fsspec, such as simplecache::s3://..., since "::" parts the patterns of a source.
    """
    if CHAIN.search(str(text)):
        raise InputError(f"{text} is a chain of addresses, as fsspec knows them: give the plain address of the files")
    pattern = r"([a-zA-Z][\w+.-]+):/+(.*)" if isinstance(text, Path) else r"([a-zA-Z][\w+.-]+)://(.*)"
    found = re.fullmatch(pattern, str(text), re.ASCII)
    return f"{found[1].lower()}://{found[2]}" if found else None


def open_address(address: str, stream: bool = False) -> BinaryIO:
    """Open the file at an address for reading, in binary.

    stream: read it from the first byte to the last by one request, where the protocol can, instead of seeking.
    Raises InputError for an unknown protocol or a missing package, NoSuchFile, or, after several tries, NoAnswer.
    """
    options = {"block_size": 0} if stream else {}
    return cast(BinaryIO, several_tries(address, lambda files, path: files.open(path, **options)))


def read_address(address: str) -> bytes:
    """The whole file at an address. Raises as `open_address` does."""
    return cast(bytes, several_tries(address, lambda files, path: files.cat_file(path)))


def several_tries(address: str, operation: Callable[[Any, str], Result]) -> Result:
    """The result of operation(file system, path) for an address, tried again after growing pauses where it fails.

    Raises InputError, NoSuchFile or NoAnswer, each with one sentence.
    """
    for pause in (*PAUSES, None):
        try:
            return operation(*file_system(address))
        except (InputError, MemoryError):
            raise
        except Exception as error:  # every protocol has errors of its own
            cause = first_cause(error)
            if isinstance(cause, ValueError):  # an address that the protocol does not understand
                raise InputError(f"{address} cannot be read: {' '.join(str(cause).split())}") from error
            if is_final(cause):
                raise NoSuchFile(f"{address} cannot be read: {describe(cause)}") from error
            if pause is None:
                raise NoAnswer(
                    f"{address} could not be read in {len(PAUSES) + 1} tries, {describe(cause)}: once it can, the same "
                    "command goes on"
                ) from error
            time.sleep(pause)
    raise AssertionError("unreachable")


def file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it. It belongs to the process and thread that asks.

    fsspec's own cache is not used: a forked process would empty it, and so close connections in the event loop that it
    shares with its parent, whose next request would wait for ever.
    """
    import fsspec

    known = kept.__dict__.setdefault("systems", {})
    key = (os.getpid(), *address.split("/")[:3])
    if key in known:
        return known[key], known[key]._strip_protocol(address)
    protocol = address.partition("://")[0]
    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        # By default a request that takes more than five minutes in all fails, however steadily its bytes come.
        options = {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)}}
    try:
        known[key], path = fsspec.core.url_to_fs(address, skip_instance_cache=True, **options)
        return known[key], path
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        cure = f'pip install "cdm_lightning[{extra}]"' if extra else " ".join(str(error).split())
        raise InputError(f"{address} needs a package that is missing: {cure}") from error
    except ValueError as error:
        raise InputError(f"{address} is no address that can be opened: {' '.join(str(error).split())}") from error


def first_cause(error: BaseException) -> BaseException:
    """What fsspec reports as a missing file may be a server that does not answer: the error behind it."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def status_of(error: BaseException) -> int | None:
    """The HTTP status in an error of aiohttp, requests, httpx or gcsfs, or None."""
    for value in (getattr(error, "status", None), getattr(getattr(error, "response", None), "status_code", None)):
        if isinstance(value, int):
            return value
    with suppress(AttributeError, TypeError, ValueError):
        return int(error.code)  # type: ignore[attr-defined]  # of gcsfs
    return None


def is_final(error: BaseException) -> bool:
    """Whether another try would end in the same."""
    missing = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError)
    return isinstance(error, (*missing, KeyError)) or status_of(error) in FINAL  # KeyError: of fsspec's memory


def describe(error: BaseException) -> str:
    """An error of a protocol as one line; some have no message, and some repeat the address."""
    if status := status_of(error):
        return f"the server answers {status} {getattr(error, 'message', '')}".strip()
    if isinstance(error, (FileNotFoundError, KeyError)):
        return "there is no such file"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")
