"""`cdm inspect`: say what a folder or file is, and whether it is whole."""

from __future__ import annotations

import stat
from contextlib import suppress
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from cdm_lightning.foundation.addresses import is_address
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.terminal import printable
from cdm_lightning.inspection.findings import Findings

KNOWN = "shards, samples, a bundle, a checkpoint, a run or a reference card"
LOOKED_AT = 1000  # entries of an unknown folder
CHECKED_GB = 2.0  # that are kept of what is fetched to be checked
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def inspect(path: str, check: bool = False, picture: str | None = None) -> None:
    """Say what a folder or file is: shards, samples, a bundle, a checkpoint or a card; and whether it is whole.

    Args:
        path: Shards (a root, a split or one resolution), samples, a bundle, a checkpoint or run, a reference card. An
            address, such as https://host/imagenet, may be of shards.
        check: Read everything: every hash, image and number. What is damaged or unfinished ends with exit code 2.
        picture: The PNG to draw the first images of shards or samples into; null for none.
    """
    if picture is not None and Path(picture).suffix != ".png":
        raise InputError(f"picture {picture} is the name of no .png file")
    found = look_at_address(path, check) if is_address(path) else look_at(Path(path), check)
    if picture is not None and not found.pictures:
        raise InputError(f"{printable(path)} is {printable(found.kind)}: a picture is drawn of finished images only")
    if found.unfinished:
        found.note(whole="no, unfinished")
    elif found.damage:
        found.note(whole="NO, it is damaged")
    elif check:
        found.note(whole="yes, everything was read")
    else:
        found.note(whole="not read; `--check true` reads everything")
    if found.pictures and picture is None:
        found.note(picture="none; `--picture FILE.png` draws the first images")
    found.print(path)
    if found.damage:
        others = f", the first of {len(found.damage)} that are damaged" if len(found.damage) > 1 else ""
        raise InputError(printable(found.damage[0]) + others)
    if picture is not None:
        from cdm_lightning.inspection.stored_images import draw_first

        print(printable(draw_first(found.pictures, Path(picture))))
    if check and found.unfinished:
        raise InputError(f"{printable(path)} is unfinished, though nothing of it is damaged")


def look_at_address(address: str, check: bool) -> Findings:
    """What folders of shards at an address hold. With `check` all is fetched anew, whatever the cache holds."""
    from cdm_lightning.data.shards import RemoteFolder, shards_root
    from cdm_lightning.inspection.stored_images import inspect_images, remote_folders

    root = shards_root(address)
    assert isinstance(root, RemoteFolder)
    folders = remote_folders(root)
    if not folders:
        raise InputError(
            f"{printable(address)} holds no shards that can be found: manifest.json is looked for there, and in "
            "<split>/<resolution> below; of what lies at an address, only shards can be inspected"
        )
    if not check:
        return inspect_images(root, folders, check)
    with TemporaryDirectory(ignore_cleanup_errors=True) as fresh:
        anew = shards_root(address, Path(fresh), cache_gb=CHECKED_GB)
        assert isinstance(anew, RemoteFolder)
        found = inspect_images(anew, remote_folders(anew), check)
    found.pictures = folders
    return found


def look_at(path: Path, check: bool) -> Findings:
    """What `path` is. Raises InputError for a thing of no known kind, with what it looks like."""
    if path.is_dir():
        return look_at_folder(path, check)
    if not path.is_file():
        raise InputError(f"{printable(str(path))} {no_file(path)}: {KNOWN} can be inspected")
    if path.name == "bundle.json":
        from cdm_lightning.inspection.networks import inspect_bundle

        return inspect_bundle(path, check)
    if path.name == "manifest.json":
        return look_at_folder(path.parent, check)
    if path.suffix == ".safetensors":
        from cdm_lightning.inspection.cards import inspect_card, is_card
        from cdm_lightning.inspection.networks import inspect_weights

        if (found := inspect_weights(path, check)) is not None:
            return found
        if is_card(path):
            return inspect_card(path, check)
    if path.suffix == ".npz":
        from cdm_lightning.inspection.cards import inspect_npz

        return inspect_npz(path, check)
    if path.suffix in (".ckpt", ".pt", ".pth"):
        from cdm_lightning.inspection.networks import inspect_checkpoint

        return inspect_checkpoint(path, check)
    raise InputError(f"{printable(str(path))} is not {KNOWN}{looks_like([path])}")


def no_file(path: Path) -> str:
    """What a path is that leads to no plain file and no folder."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "is a link to nothing" if path.is_symlink() else "does not exist"
    except OSError as error:
        return f"cannot be opened, {(error.strerror or str(error)).lower()}"
    return "is a pipe" if stat.S_ISFIFO(mode) else "is a socket" if stat.S_ISSOCK(mode) else "is a device"


def look_at_folder(path: Path, check: bool) -> Findings:
    """What a folder is, by the files that only one kind has."""
    if (path / "bundle.json").is_file():
        from cdm_lightning.inspection.networks import inspect_bundle

        return inspect_bundle(path, check)
    found = sorted([*path.glob("checkpoints/*.ckpt"), *path.glob("*.ckpt")])
    if checkpoints := [file for file in found if file.is_file() or not file.exists()]:  # a pipe would be waited for
        from cdm_lightning.inspection.networks import inspect_run

        return inspect_run(path, checkpoints, check)
    from cdm_lightning.data.preparation.tasks import PROGRESS
    from cdm_lightning.inspection.stored_images import inspect_images, sample_plan, shard_folders

    folders = shard_folders(path)
    begun = (path / PROGRESS).is_dir() or any(path.glob(f"*/{PROGRESS}")) or sample_plan(path) is not None
    if folders or begun:
        return inspect_images(path, folders, check)
    entries = list(islice(path.iterdir(), LOOKED_AT))
    raise InputError(f"{printable(str(path))} is not {KNOWN}{looks_like(entries)}")


def looks_like(entries: list[Path]) -> str:
    """What an unknown thing may be, and the command that takes it. entries: of the folder, or the file alone."""
    names = {entry.name for entry in entries}
    kinds = {entry.suffix.lower() for entry in entries if entry.is_file()}
    if "data.mdb" in names or kinds & {".mdb"}:
        return "; it looks like an LMDB, as LSUN's are, of which `cdm prepare lsun` makes shards"
    if ".parquet" in kinds:
        return "; it looks like a data set in parquet, of which `cdm prepare parquet` makes shards"
    tars = [entry for entry in entries if entry.name.endswith((".tar", ".tar.gz")) and entry.is_file()]
    if tars and ((home := tars[0].absolute().parent).name.isdecimal() or (home / "manifest.json").is_file()):
        return f"; it looks like one of the shards in {printable(str(home))}, which can be inspected"
    if tars and is_packed(tars[0]):
        return "; it looks like shards without the manifest.json that lay beside them"
    if tars:
        return "; it looks like tars of images, of which `cdm prepare webdataset` makes shards"
    if kinds & {".pt", ".pth"}:
        return "; it holds weights of another project, and ADM's networks become checkpoints by `cdm import`"
    if "results.json" in names:
        return "; it looks like figures that were measured, and report.html there shows them"
    inside = (file for entry in entries[:20] if entry.is_dir() for file in islice(entry.glob("*"), 20))
    if any(file.suffix.lower() in PICTURES for file in inside):
        return "; it looks like a folder of class folders, of which `cdm prepare folder` makes shards"
    if kinds & set(PICTURES):
        return (
            "; it looks like pictures without class folders: `cdm prepare folder` makes shards of them with a table of "
            "their classes, --labels FILE, or once each class has a folder"
        )
    return "" if entries else "; it is empty"


def is_packed(tar: Path) -> bool:
    """Whether a tar begins as a packed shard does."""
    with suppress(OSError), open(tar, "rb") as file:
        return file.read(100).rstrip(b"\0").endswith(b".labels.npy")
    return False
