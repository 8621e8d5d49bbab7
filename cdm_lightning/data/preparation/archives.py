"""Reading tar archives of raw images, and refusing those that are cut."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cdm_lightning.data.shards.tar import check_member
from cdm_lightning.foundation.errors import InputError


@contextmanager
def open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """Open an uncompressed tar. Raises InputError if it cannot be read."""
    try:
        with tarfile.open(path, mode="r:") as tar:
            yield tar
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{path} cannot be read as a tar archive: {error}; is it an unfinished download?") from error


def members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files of a tar. tarfile stops silently at a broken header, so the zero block at the end is checked here."""
    for member in tar:
        check_member(member, str(tar.name))
        if member.isfile():
            yield member
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"its end is missing at byte {tar.offset}")
