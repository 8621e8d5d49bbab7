"""`cdm bundle`: trained stages put into one folder."""

from __future__ import annotations

from pathlib import Path

import torch


def bundle(
    checkpoints: list[Path], out: Path, levels: list[int] | None = None, truncated: bool = False, half: bool = False
) -> None:
    """Put trained stages into one folder: averaged weights as safetensors, everything else as JSON, all hashed.

    Args:
        checkpoints: One checkpoint or run folder per stage, from low to high resolution; a run folder stands for the
            newest of its checkpoints.
        out: The folder to write.
        levels: The level s of each super-resolution stage that sampling shall use when told none; null for 0.
        truncated: Whether that sampling is truncated.
        half: Round the weights to 16 bits, for half the size.
    """
    from cdm_lightning.cascade.bundle import write_bundle
    from cdm_lightning.cascade.cascade import CascadeModule, check_stages
    from cdm_lightning.stages.loading import load_stage, newest_checkpoint

    stages = []
    for path in map(Path, checkpoints):
        newest = newest_checkpoint([path / "checkpoints"]) if path.is_dir() else path
        stages.append(load_stage(newest or path / "checkpoints" / "last.ckpt"))
    check_stages(stages)
    cascade = CascadeModule.from_stages(stages)
    cascade.set_levels(levels or cascade.levels, truncated)
    classes = next((c for stage in stages if (c := stage.trained.get("classes"))), None)
    dtype = torch.float16 if half else torch.float32
    write_bundle(out, stages, {"levels": cascade.levels, "truncated": truncated, "classes": classes}, dtype)
    total = sum(p.numel() for stage in stages for p in stage.parameters())
    steps = " -> ".join(f"{stage.name} ({stage.trained.get('steps', '?')} steps)" for stage in stages)
    raw = [stage.name for stage in stages if not stage.trained.get("averaged")]
    print(f"{out}: {steps}, {total / 1e6:.2f} M parameters{', NOT averaged: ' + ', '.join(raw) if raw else ''}")
