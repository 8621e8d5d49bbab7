"""`cdm bundle`: put trained stages into one folder, the bundle."""

from __future__ import annotations

from pathlib import Path

import torch


def bundle(
    checkpoints: list[Path],
    out: Path,
    levels: list[int] | None = None,
    truncated: bool = False,
    half: bool = False,
    data: str | None = None,
    license: str | None = None,
) -> None:
    """Put trained stages into one folder: averaged weights as safetensors, everything else as JSON, all hashed.

    Args:
        checkpoints: One checkpoint or run folder per stage, from low to high resolution; of a run folder the newest
            checkpoint is taken.
        out: The folder to write.
        levels: The default level s of each super-resolution stage in sampling; null for 0.
        truncated: Whether sampling is truncated by default.
        half: Store the weights as float16, for half the size.
        data: A sentence on the training images and their terms, for the model card; null for none.
        license: The licence of the weights, such as mit, for the model card; null for none.
    """
    from cdm_lightning.cascade.bundle import write_bundle
    from cdm_lightning.cascade.cascade import CascadeModule, check_stages
    from cdm_lightning.stages.checkpoints import newest_checkpoint
    from cdm_lightning.stages.loading import load_stage

    stages = []
    for path in map(Path, checkpoints):
        newest = newest_checkpoint([path / "checkpoints", path]) if path.is_dir() else path
        stages.append(load_stage(newest or path / "checkpoints" / "last.ckpt"))
    check_stages(stages)
    cascade = CascadeModule.from_stages(stages)
    cascade.set_levels(cascade.levels if levels is None else levels, truncated)
    classes = next((c for stage in stages if (c := stage.trained.get("classes"))), None)
    dtype = torch.float16 if half else torch.float32
    about = {"levels": cascade.levels, "truncated": truncated, "classes": classes}
    about |= {name: value for name, value in (("data", data), ("license", license)) if value is not None}
    write_bundle(out, stages, about, dtype)
    total = sum(p.numel() for stage in stages for p in stage.parameters())
    trained = ["imported" if "imported" in s.trained else f"{s.trained.get('steps', '?')} steps" for s in stages]
    steps = " -> ".join(f"{stage.name} ({how})" for stage, how in zip(stages, trained, strict=True))
    unaveraged = [stage.name for stage in stages if not stage.trained.get("averaged")]
    note = f", NOT averaged: {', '.join(unaveraged)}" if unaveraged else ""
    print(f"{out}: {steps}, {total / 1e6:.2f} M parameters{note}")
