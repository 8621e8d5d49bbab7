"""The shards of a sampling run: a manifest of (index, class), drawn block by block on any number of processes."""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np

from cdm_lightning.cascade import CascadeModule
from cdm_lightning.data.shards import Manifest, Shard, read_manifest, read_shard, write_manifest
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import begin
from cdm_lightning.foundation.process_group import first_process, wait_for_all
from cdm_lightning.sampling.blocks import Blocks, BlockWriter
from cdm_lightning.sampling.manifest import SampleManifest, shard_name
from cdm_lightning.sampling.shared_work import EndOnSigterm, join, shared_out


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
