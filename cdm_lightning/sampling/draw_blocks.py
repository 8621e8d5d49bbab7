"""Drawing the samples of a manifest: block by block on any number of processes, into folders of shards."""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import asdict
from pathlib import Path

import numpy as np

from cdm_lightning.cascade import CascadeModule
from cdm_lightning.data.shards import Manifest, Shard, read_manifest, read_shard, write_manifest
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import begin_folder
from cdm_lightning.foundation.process_group import first_process, wait_for_all
from cdm_lightning.sampling.blocks import BlockDataModule, BlockWriter
from cdm_lightning.sampling.manifest import SampleManifest, shard_name, start_labels
from cdm_lightning.sampling.shared_work import EndOnSigterm, join_processes, make_trainer


def draw(
    cascade: CascadeModule,
    manifest: SampleManifest,
    out: Path,
    start: Path | None = None,
    devices: int = 1,
    accelerator: str = "auto",
) -> list[Path]:
    """Draw the samples of a manifest into out/train/<resolution>/, one folder of shards for each resolution.

    Blocks that exist already are not drawn again. start: a folder of stored images of a lower resolution; sample i
    continues from its image i. Truncated sampling stores only the last resolution. Returns the folders, in every
    process, when the last process is done.
    """
    join_processes()
    resolutions, labels = [stage.resolution for stage in cascade.stages], []
    if start is not None:
        given = read_manifest(start)
        resolutions, labels = [r for r in resolutions if r > given.resolution], start_labels(cascade, given, start)
    # Z_s is noisy, and no 8-bit image.
    kept = resolutions[-1:] if cascade.truncated and any(cascade.levels) else resolutions
    folders = [Path(out) / "train" / str(resolution) for resolution in kept]
    todo = [n for n in range(manifest.blocks) if not all((f / shard_name(n)).is_file() for f in folders)]
    writer = BlockWriter(Path(out), folders, manifest)
    trainer = make_trainer(
        devices, accelerator, callbacks=[writer, EndOnSigterm()], default_root_dir=out, precision=manifest.precision
    )
    begun = any(shard for folder in folders for shard in folder.glob("*.tar"))
    begin_folder(out, manifest, begun)
    wait_for_all()
    if todo or trainer.world_size > 1:  # with several processes, only the first one's list of blocks counts
        blocks = BlockDataModule(manifest, todo, start, labels)
        try:
            trainer.predict(cascade, datamodule=blocks, return_predictions=False)
            wait_for_all()  # the code below reads the shards of all processes
        finally:
            writer.close()
    if first_process():
        for folder in folders:
            if not (folder / "manifest.json").is_file():
                finish_folder(folder, manifest, cascade)
        for partial in [p for folder in (Path(out), *folders) for p in folder.glob("*.partial")]:
            partial.unlink(missing_ok=True)  # of killed processes; one that still writes starts again
    wait_for_all()
    return folders


def finish_folder(folder: Path, manifest: SampleManifest, cascade: CascadeModule) -> None:
    """Write the manifest of one folder of samples, which marks it as finished. Refuses a damaged shard."""
    classes = cascade.origin["classes"] or [str(c) for c in range(cascade.num_classes or 1)]
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
    folder_manifest = Manifest(
        int(folder.name), cascade.image_channels, "train", classes, counts, shards, manifest.seed,
        cascade.origin["crop"] or "none", cascade.origin["filter"] or "none", "samples",
        extra={"samples": asdict(manifest)},
    )  # fmt: skip
    write_manifest(folder, folder_manifest)
