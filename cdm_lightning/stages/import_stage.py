"""`cdm import`: a published network of ADM as a checkpoint of a stage."""

from __future__ import annotations

from pathlib import Path


def import_adm(file: Path, out: Path, preset: str | None = None, flags: str | None = None) -> None:
    """Make a checkpoint of a stage from a network of guided-diffusion (ADM), such as 64x64_diffusion.pt.

    The checkpoint goes into `cdm bundle`, `cdm validate`, and into a training with --model.init_from. It has no
    optimizer, so a training cannot resume from it. The weights have their authors' terms, which are not looked up here.

    Args:
        file: The downloaded .pt file. Nothing in it is run.
        out: The checkpoint to write, such as runs/adm64.ckpt.
        preset: The published file that it is: 64x64_diffusion, 128x128_diffusion, 256x256_diffusion,
            256x256_diffusion_uncond, 512x512_diffusion, 64_256_upsampler, 128_512_upsampler, lsun_bedroom, lsun_cat,
            lsun_horse or lsun_horse_nodropout.
        flags: Instead of a preset: the MODEL_FLAGS that the network was trained with, in quotes.
    """
    import hashlib
    from difflib import get_close_matches

    import lightning.pytorch as L
    import torch

    from cdm_lightning.foundation.errors import InputError
    from cdm_lightning.stages.adm import PRESETS, adm_name, is_true, read_flags, stage_arguments, stage_weights
    from cdm_lightning.stages.checkpoints import load_safely, write_checkpoint
    from cdm_lightning.stages.loading import stage_class, validated_arguments

    if (preset is None) == (flags is None):
        raise InputError("the file does not say which network it is: give one of --preset and --flags")
    if preset is not None and preset not in PRESETS:
        near = get_close_matches(preset, PRESETS, n=1, cutoff=0)
        raise InputError(f"preset {preset} is none of {', '.join(PRESETS)}; the nearest is {near[0]}")
    if out.is_dir():
        raise InputError(f"out {out} is a folder: give the name of a checkpoint, such as {out / 'adm.ckpt'}")
    if out.exists() and file.exists() and out.samefile(file):
        raise InputError(f"out {out} is the file itself, which would be lost: give another name")
    if not file.is_file():
        raise InputError(f"{file} does not exist: a file of guided-diffusion is expected")
    table = read_flags(PRESETS[preset] if preset is not None else flags or "")
    kind, arguments = stage_arguments(table)
    made = stage_class(kind, file)
    try:
        arguments = validated_arguments(made, arguments)
    except Exception as error:  # jsonargparse names the argument and the types that it may have
        raise InputError(f"the flags are no network of ADM: {' '.join(str(error).split())}") from error
    with torch.device("meta"):
        stage = made(**arguments)
    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    theirs = load_safely(file, mmap=True) if is_zip(file) else load_safely(file)
    state = stage_weights(theirs, stage, not is_true(table, "use_new_attention_order"), str(file))
    if broken := next((name for name, value in state.items() if not value.isfinite().all()), None):
        raise InputError(f"{file} holds numbers that are not finite in {adm_name(broken)}")
    source = {"file": file.name, "sha256": sha256, "flags": given_flags(table)}
    imported = {"averaged": True, "steps": None, "images": None, "imported": source}
    checkpoint = {
        "stage": kind, "hyper_parameters": dict(stage.hparams), "state_dict": state, "imported": imported,
        "global_step": 0, "epoch": 0, "pytorch-lightning_version": L.__version__,
    }  # fmt: skip
    write_checkpoint(checkpoint, out)
    size = sum(value.numel() for value in state.values())
    classes = f"{stage.num_classes} classes" if stage.num_classes else "no classes"
    print(f"{file}: SHA-256 {sha256}")
    if flags is not None:
        print("heads and the order of qkv are those of the flags: a file does not show them, and wrong ones draw noise")
    print(f"{out}: {kind} {stage.name}, {size / 1e6:.1f} M parameters, {classes}, flags {' '.join(given_flags(table))}")


def is_zip(file: Path) -> bool:
    """Whether a file is in torch's present format, which can be mapped into memory."""
    with file.open("rb") as opened:
        return opened.read(2) == b"PK"


def given_flags(table: dict[str, str]) -> list[str]:
    """The flags that differ from guided-diffusion's defaults, as on a command line."""
    from cdm_lightning.stages.adm import DEFAULTS

    return [f"--{name} {value}" for name, value in table.items() if value != DEFAULTS[name]]
