"""Folders of shards and of samples: whole, unfinished or damaged."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from cdm_lightning.data.preparation.tasks import PROGRESS
from cdm_lightning.data.shards import Folder, Manifest, RemoteFolder, Shard, open_images, read_manifest
from cdm_lightning.data.shards.folders import MAX_RESOLUTION, local_file
from cdm_lightning.foundation.addresses import NoSuchFile
from cdm_lightning.foundation.class_names import NO_CLASSES
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import read_table
from cdm_lightning.foundation.images import save_grid
from cdm_lightning.foundation.progress_bar import ProgressBar
from cdm_lightning.inspection.findings import Findings, about_classes, settings, size_of, written

AT_ONCE = 64  # images decoded together
PICTURES, COLUMNS = 40, 10
SPLITS = ("train", "val")


def shard_folders(path: Path) -> list[Path]:
    """The folders of shards at `path`: a root with splits, a split, or one resolution. Unfinished ones too."""
    candidates = [path, *path.glob("*"), *path.glob("*/*")]
    found = [f for f in candidates if f.name.isdecimal() and f.is_dir() and holds_shards(f)]
    if not found and (path / "manifest.json").is_file() and sample_plan(path) is None:
        found = [path]  # a folder of one resolution under another name
    return sorted(found, key=lambda folder: (folder.parent.name, int(folder.name) if folder.name.isdecimal() else 0))


def remote_folders(root: RemoteFolder) -> list[Folder]:
    """The folders of shards at an address, which cannot be listed: itself, or a split, or a root with train and val."""
    sizes = [str(1 << number) for number in range(MAX_RESOLUTION.bit_length())]
    places = [root, *(root / size for size in sizes), *(root / split / size for split in SPLITS for size in sizes)]
    found: list[Folder] = []
    for place in places:
        with suppress(NoSuchFile):
            assert place.manifest
            found.append(place)
            if place is root:
                break
    return found


def sample_plan(path: Path) -> tuple[int, int] | None:
    """(images, images per shard) of a folder that `cdm sample` or `cdm upscale` began; None for another folder."""
    try:
        table = read_table(path / "manifest.json", "count", "block_size", "bundle")
    except InputError:
        return None
    count, size = table["count"], table["block_size"]
    return (count, size) if type(count) is int and type(size) is int and size > 0 else None


def holds_shards(folder: Path) -> bool:
    """Whether a folder holds a manifest of shards, or shards that wait for one."""
    if (folder / "manifest.json").is_file():
        return True
    return any(folder.glob("*.tar")) or any(folder.glob("*.tar.gz"))


def inspect_images(path: Folder, folders: Sequence[Folder], check: bool) -> Findings:
    """What folders of shards hold. check: read every shard, and decode every image."""
    found = Findings("shards of images", ("split", "resolution", "images", "per class", "shards", "stored as", "size"))
    manifests: dict[Folder, Manifest] = {}
    for folder in folders:
        if isinstance(folder, Path) and not (folder / "manifest.json").is_file():
            tars = sum(1 for _ in folder.glob("*.tar*"))
            found.unfinished = True
            found.rows.append((folder.parent.name, folder.name, "unfinished", "", str(tars), "", ""))
        elif manifest := found.try_to(read_manifest, folder, False):
            manifests[folder] = manifest
            found.rows.append(row_of(manifest))
            found.pictures.append(folder)
            if check:
                found.damage += damage_in(folder, manifest)
            else:
                found.try_to(read_manifest, folder)
    about = {manifest.split: about_split(manifest) for manifest in manifests.values()}
    for name in next(iter(about.values()), {}):
        values = {split: notes[name] for split, notes in about.items()}
        alike = len(set(map(str, values.values()))) == 1
        for split, value in list(values.items())[: 1 if alike else None]:
            found.note(**{name if alike else f"{name} of {split}": value})
    if isinstance(last := next(reversed(manifests), None), Path):
        found.note(written=written(last / "manifest.json"))
    if any(isinstance(manifest.extra.get("samples"), dict) for manifest in manifests.values()):
        found.kind = "samples of a cascade"
    if isinstance(path, Path):
        note_progress(found, path, [folder for folder in folders if isinstance(folder, Path)])
    return found


def about_split(manifest: Manifest) -> dict[str, Any]:
    """What a manifest tells of its split, by name; None is not shown."""
    return {
        "classes": about_classes(manifest.classes if manifest.classes != NO_CLASSES else None),
        "source": manifest.source,
        "crop": manifest.crop if manifest.crop != "none" else None,
        "filter": manifest.filter if manifest.filter != "none" else None,
        "seed": manifest.seed,
        "left_out": f"{manifest.skipped} unreadable images" if manifest.skipped else None,
        "made_by": how_made(manifest),
    }


def row_of(manifest: Manifest) -> tuple[str, ...]:
    """The row of a folder in the table."""
    size = f"{manifest.resolution}x{manifest.resolution}, {'grey' if manifest.channels == 1 else 'colour'}"
    form = "packed" if manifest.packed else "PNG"
    stored = size_of(sum(shard.bytes for shard in manifest.shards))
    low, high = min(manifest.counts), max(manifest.counts)
    each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return manifest.split, size, f"{manifest.count:,}", each, f"{len(manifest.shards):,}", form, stored


def how_made(manifest: Manifest) -> str:
    """The settings that a manifest records, in one line."""
    drawn, arguments = manifest.extra.get("samples"), manifest.extra.get("arguments")
    if isinstance(drawn, dict):
        names = ("bundle", "levels", "truncated", "samplers", "sampling_steps", "precision", "block_size", "start")
        about = {name: drawn.get(name) for name in names}
        about["bundle"] = str(about["bundle"])[:12]
        return f"cdm sample or upscale: {settings(about)}"
    if isinstance(arguments, dict):
        shown = ("resolutions", "images_per_shard", "limit", "grey", "pillow", "png")
        return f"cdm prepare: {settings({name: arguments.get(name) for name in shown})}"
    return ""


def note_progress(found: Findings, path: Path, folders: Sequence[Path]) -> None:
    """How far an unfinished `cdm prepare` or `cdm sample` is."""
    splits = {path, *path.glob("*"), *(folder.parent for folder in folders)}
    for progress in sorted(split / PROGRESS for split in splits if (split / PROGRESS).is_dir()):
        found.unfinished = True
        done = sum(file.stem.isdecimal() for file in progress.glob("*.json"))
        begun = progress / "arguments.json"
        arguments = found.try_to(read_table, begun) if begun.is_file() else {}
        images, per = (arguments or {}).get("images"), (arguments or {}).get("images_per_shard")
        limit = (arguments or {}).get("limit")
        total = ""
        if type(images) is int and type(per) is int and per > 0:
            total = f" of {-(-min(images, limit if type(limit) is int else images) // per):,}"
        found.facts[f"unfinished {progress.parent.name}"] = (
            f"{done:,}{total} shards are made; the same `cdm prepare` goes on, or is still at work"
        )
    if not found.pictures and (plan := sample_plan(path)) is not None:
        count, size = plan
        found.unfinished, found.kind = True, "samples of a cascade"
        done = min((sum(1 for _ in folder.glob("*.tar")) for folder in folders), default=0)
        found.facts["unfinished"] = (
            f"{done:,} of {-(-count // size):,} shards of {count:,} images are drawn; the same command goes on, or "
            "is still at work"
        )
    if found.unfinished and not any(name.startswith("unfinished") for name in found.facts):
        found.facts["unfinished"] = "a folder holds shards and no manifest.json, which is written last"


def damage_in(folder: Folder, manifest: Manifest) -> list[str]:
    """A sentence for each shard that is not the manifest's, and each image that cannot be decoded."""
    damage: list[str] = []
    counts = np.zeros(len(manifest.classes), np.int64)
    for shard in ProgressBar(manifest.shards, f"{manifest.split}/{folder.name}", unit="shard"):
        before = len(damage)
        if manifest.packed and (other := other_file(folder, shard)):  # opening one reads its head alone
            damage.append(other)
            continue
        try:
            opened = open_images(folder, manifest, [shard], range(shard.count), lambda e: damage.append(str(e)))
        except (OSError, InputError) as error:
            damage.append(str(error))
            continue
        for start in range(0, shard.count, AT_ONCE):
            labels = opened.read(range(start, min(start + AT_ONCE, shard.count))).label
            counts += np.bincount(labels, minlength=len(counts))
        opened.close()
        if len(damage) > before:
            counts[:] = -1  # no longer known
    if not damage and counts.tolist() != manifest.counts:
        label = next(k for k, (a, b) in enumerate(zip(counts.tolist(), manifest.counts, strict=True)) if a != b)
        damage.append(
            f"{folder}/manifest.json counts {manifest.counts[label]} images of class {label}, and the shards hold "
            f"{counts[label]}"
        )
    return damage


def other_file(folder: Folder, shard: Shard) -> str:
    """A sentence if a shard is missing or has another SHA-256 than its manifest's; else ""."""
    path = folder / shard.name
    try:
        with local_file(folder, shard) as local, local.open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    except InputError as error:
        return str(error)
    return "" if same else f"{path} is not the file its manifest lists: its SHA-256 is another"


def draw_first(folders: Sequence[Folder], picture: Path) -> str:
    """Save the first images of the folder of the highest resolution as one PNG. Gives a line about it."""
    from cdm_lightning.evaluation.report.stored_samples import read_pictures

    folder = max(folders, key=lambda each: read_manifest(each).resolution)
    manifest = read_manifest(folder)
    images = read_pictures(folder, list(range(min(PICTURES, manifest.count))))
    rows = [images[start : start + COLUMNS] for start in range(0, len(images), COLUMNS)]
    picture.parent.mkdir(parents=True, exist_ok=True)
    save_grid(rows, picture, cell=max(64, manifest.resolution))
    return f"{picture}: the first {len(images)} images of {folder}"
