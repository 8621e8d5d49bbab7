"""The shards of a sampling run: a manifest of (index, class), drawn block by block on any number of processes."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import numpy as np
import torch

from cdm_lightning.cascade.cascade import CascadeModule
from cdm_lightning.data.shards.manifest import Manifest, Shard, digest_of, read_manifest, write_manifest
from cdm_lightning.data.shards.tar import read_shard
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import write_atomically
from cdm_lightning.network.unet import Compile
from cdm_lightning.sampling.blocks import Blocks, BlockWriter, SampleManifest, shard_name
from cdm_lightning.sampling.shared_work import EndOnSigterm, first_process, join, shared_out, wait_for_all

NO_CLASSES = ["0"]  # as shards name the one class of samples of a cascade without classes
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


def plan(
    cascade: CascadeModule,
    bundle: str,
    count: int,
    classes: Sequence[int] | None = None,
    block_size: int = 64,
    start: Path | None = None,
    precision: Precision = "32-true",
    compile: Compile | None = None,
) -> SampleManifest:
    """The manifest of `count` samples of a cascade as it is set; refuses what makes no sense."""
    chosen = list(range(cascade.num_classes or 1)) if classes is None else list(classes)
    if not chosen:
        raise InputError("classes [] names no class")
    cascade.check_labels(torch.tensor(chosen))
    if cascade.num_classes is None and set(chosen) != {0}:
        raise InputError(f"classes {chosen} given to a cascade without classes, which calls its one class 0")
    for name, value in (("count", count), ("block_size", block_size)):
        if value < 1:
            raise InputError(f"{name} {value} is less than 1")
    diffusions = [stage.diffusion for stage in cascade.stages]
    manifest = SampleManifest(
        bundle, count, chosen, cascade.seed, block_size, cascade.levels, cascade.truncated,
        [d.sampler for d in diffusions], [d.sampling_steps or d.timesteps for d in diffusions],
        precision, digest_of(read_manifest(start).shards) if start is not None else None, compile,
        cascade.batch_sizes,
    )  # fmt: skip
    if start is not None:
        check_start(cascade, manifest, start)
    return manifest


def check_start(cascade: CascadeModule, manifest: SampleManifest, start: Path) -> None:
    """Refuse stored images that the cascade cannot go on from."""
    given, resolutions = read_manifest(start), [stage.resolution for stage in cascade.stages]
    if given.resolution not in resolutions[:-1]:
        raise InputError(f"{start} holds images of {given.resolution}: the cascade goes on from {resolutions[:-1]}")
    if given.channels != cascade.image_channels:
        raise InputError(f"{start} has {given.channels} channels, and the cascade makes {cascade.image_channels}")
    if given.count < manifest.count:
        raise InputError(f"{start} holds {given.count} images, and {manifest.count} are to be drawn from them")


def draw(
    cascade: CascadeModule,
    manifest: SampleManifest,
    out: Path,
    start: Path | None = None,
    devices: int = 1,
    accelerator: str = "auto",
    about: dict[str, Any] | None = None,
) -> list[Path]:
    """Draw what a manifest says into out/train/<resolution>/, a folder of shards per resolution that the cascade makes.

    Only blocks that are not there yet are drawn. start: a folder of stored images of a lower resolution, of which image
    i is where sample i goes on. about: more for the folders' manifests: classes, crop, filter. Truncated sampling keeps
    finished images alone. Returns in every process when the last one is done.
    """
    join()
    begin(out, manifest)
    resolutions = [stage.resolution for stage in cascade.stages]
    if start is not None:
        resolutions = [r for r in resolutions if r > read_manifest(start).resolution]
    kept = resolutions[-1:] if cascade.truncated and any(cascade.levels) else resolutions  # z_s is no 8-bit image
    folders = [Path(out) / "train" / str(resolution) for resolution in kept]
    todo = [n for n in range(manifest.blocks) if not all((f / shard_name(n)).is_file() for f in folders)]
    wait_for_all()
    shared = shared_out(devices, accelerator)
    if todo or shared["strategy"] != "auto":  # several may have looked at different moments: one of them decides
        writer = BlockWriter(folders, manifest)
        trainer = L.Trainer(
            **shared, logger=False,
            callbacks=[writer, EndOnSigterm()],
            enable_model_summary=False, enable_progress_bar=False, default_root_dir=out,
            precision=manifest.precision,  # type: ignore[arg-type]  # a word that plan() took
            use_distributed_sampler=False,  # whole blocks are shared out below
        )  # fmt: skip
        try:
            trainer.predict(cascade, datamodule=Blocks(manifest, todo, start), return_predictions=False)
            wait_for_all()  # for the slowest process: what follows reads the shards of all
        finally:
            writer.close()
    if first_process():
        for folder in folders:
            if not (folder / "manifest.json").is_file():
                finish(folder, manifest, cascade, about or {})
        for partial in [p for folder in (Path(out), *folders) for p in folder.glob("*.partial")]:
            partial.unlink(missing_ok=True)  # of processes that were killed; one that still writes begins again
    wait_for_all()
    return folders


def begin(out: Path, manifest: Any) -> None:
    """Write the manifest, a dataclass, into a new folder; in one begun before, refuse to go on with another."""
    path = Path(out) / "manifest.json"
    if not path.is_file():  # every process that finds none: under torchrun they start together, and write the same
        write_atomically(path, (json.dumps(asdict(manifest), indent=1) + "\n").encode())
    try:
        before = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    differing = [name for name, value in asdict(manifest).items() if before.get(name) != value]
    if differing:
        name = differing[0]
        raise InputError(
            f"{out} was begun with {name} {before.get(name)}, not {getattr(manifest, name)}: choose another folder"
        )


def finish(folder: Path, manifest: SampleManifest, cascade: CascadeModule, about: dict[str, Any]) -> None:
    """Write the manifest of one folder of samples, its last file; refuses a shard that is not whole."""
    classes = about.get("classes") or [str(c) for c in range(cascade.num_classes or 1)]
    shards = []
    for number in range(manifest.blocks):
        path, size = folder / shard_name(number), manifest.size(number)
        try:
            deque(read_shard(path, size), maxlen=0)
        except InputError as error:
            raise InputError(f"{error}; remove it, and the same command draws it again") from error
        data = path.read_bytes()
        shards.append(Shard(path.name, size, len(data), hashlib.sha256(data).hexdigest()))
    counts = np.bincount(manifest.labels().numpy(), minlength=len(classes)).tolist()
    made = Manifest(
        int(folder.name), cascade.image_channels, "train", classes, counts, shards, manifest.seed,
        about.get("crop") or "none", about.get("filter") or "none", "samples", extra={"samples": asdict(manifest)},
    )  # fmt: skip
    write_manifest(folder, made)
