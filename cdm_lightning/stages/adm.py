"""ADM's networks (guided-diffusion; Dhariwal and Nichol, 2021) as stages: flags to arguments, parameters by name.

The U-Net is the same function. Two things cannot be seen in a file of weights: the number of attention heads, and the
order of the rows of qkv. They come from the flags that the network was built with. Wrong flags give another network.
"""

from __future__ import annotations

import re
import shlex
from difflib import get_close_matches
from typing import Any

import torch

from cdm_lightning.foundation.errors import InputError

# The flags of the published files, as guided-diffusion's README gives them for sampling.
_COMMON = "--diffusion_steps 1000 --learn_sigma True --resblock_updown True --use_scale_shift_norm True"
_IMAGE = f"{_COMMON} --attention_resolutions 32,16,8 --noise_schedule linear --num_channels 256 --num_res_blocks 2"
_UPSAMPLER = f"{_COMMON} --class_cond True --noise_schedule linear --num_channels 192 --num_res_blocks 2"
_BY_WIDTH = "--num_head_channels 64"
_LSUN = f"{_IMAGE} --image_size 256 --class_cond False {_BY_WIDTH}"
PRESETS = {
    "64x64_diffusion": f"{_COMMON} --image_size 64 --class_cond True --attention_resolutions 32,16,8 --dropout 0.1 "
    f"--noise_schedule cosine --num_channels 192 {_BY_WIDTH} --num_res_blocks 3 --use_new_attention_order True",
    "128x128_diffusion": f"{_IMAGE} --image_size 128 --class_cond True --num_heads 4",
    "256x256_diffusion": f"{_IMAGE} --image_size 256 --class_cond True {_BY_WIDTH}",
    "256x256_diffusion_uncond": f"{_IMAGE} --image_size 256 --class_cond False {_BY_WIDTH}",
    "512x512_diffusion": f"{_IMAGE} --image_size 512 --class_cond True {_BY_WIDTH}",
    "64_256_upsampler": f"{_UPSAMPLER} --large_size 256 --small_size 64 --attention_resolutions 32,16,8 --num_heads 4",
    "128_512_upsampler": f"{_UPSAMPLER} --large_size 512 --small_size 128 --attention_resolutions 32,16 {_BY_WIDTH}",
    "lsun_bedroom": f"{_LSUN} --dropout 0.1",
    "lsun_cat": f"{_LSUN} --dropout 0.1",
    "lsun_horse": f"{_LSUN} --dropout 0.1",
    "lsun_horse_nodropout": f"{_LSUN} --dropout 0.0",
}
DEFAULTS = {  # of guided-diffusion's scripts; what has no influence on the weights or on sampling is None
    "image_size": "64", "large_size": "", "small_size": "", "num_channels": "128", "num_res_blocks": "2",
    "num_heads": "4", "num_heads_upsample": "-1", "num_head_channels": "-1", "attention_resolutions": "16,8",
    "channel_mult": "", "dropout": "0.0", "class_cond": "False", "use_scale_shift_norm": "True",
    "resblock_updown": "False", "use_new_attention_order": "False", "learn_sigma": "False", "diffusion_steps": "1000",
    "noise_schedule": "linear", "predict_xstart": "False", "rescale_timesteps": "False", "use_fp16": None,
    "use_checkpoint": None, "use_kl": None, "rescale_learned_sigmas": None, "timestep_respacing": None,
}  # fmt: skip
CHANNEL_MULT = {512: [0.5, 1, 1, 2, 2, 4, 4], 256: [1, 1, 2, 2, 4, 4], 128: [1, 1, 2, 3, 4], 64: [1, 2, 3, 4]}
UPSAMPLER_CHANNEL_MULT = {512: [1, 1, 2, 2, 4, 4], 256: [1, 1, 2, 2, 4, 4], 64: [1, 2, 3, 4]}
NUM_CLASSES = 1000  # in every network with --class_cond True
SAMPLING_STEPS = 250  # --timestep_respacing of the published results


def read_flags(text: str) -> dict[str, str]:
    """The flags of a line such as "--image_size 64 --class_cond True", over guided-diffusion's defaults."""
    try:
        words = shlex.split(text.replace("=", " "))
    except ValueError as error:  # a quote without its fellow
        raise InputError(f"the flags {text!r} are no list of --name value: {str(error).lower()}") from error
    given = dict(zip(words[::2], words[1::2], strict=False))
    if len(words) % 2 or not all(word.startswith("--") for word in given):
        raise InputError(f"the flags {text!r} are no list of --name value")
    for word in given:
        if word[2:] not in DEFAULTS:
            near = get_close_matches(word[2:], DEFAULTS, n=1)
            hint = f"; the nearest is --{near[0]}" if near else ""
            raise InputError(f"{word} is no flag of guided-diffusion's networks{hint}")
    return {name: value for name, value in DEFAULTS.items() if value is not None} | {
        word[2:]: value for word, value in given.items() if DEFAULTS[word[2:]] is not None
    }


def is_true(flags: dict[str, str], name: str) -> bool:
    """A flag that is yes or no, in the words that guided-diffusion takes."""
    word = flags[name].lower()
    if word not in ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"):
        raise InputError(f"--{name} {flags[name]} is neither True nor False")
    return word in ("yes", "true", "t", "y", "1")


def number(flags: dict[str, str], name: str) -> int:
    """A flag that is a whole number."""
    try:
        return int(flags[name])
    except ValueError:
        raise InputError(f"--{name} {flags[name]} is no whole number") from None


def numbers(flags: dict[str, str], name: str) -> list[Any]:
    """A flag that is a list such as 0.5,1,2; an empty one is none."""
    try:
        return [float(word) if "." in word else int(word) for word in flags[name].split(",") if word]
    except ValueError:
        raise InputError(f"--{name} {flags[name]} is no list of numbers") from None


def stage_arguments(flags: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """The kind of stage and its arguments for the flags of `read_flags`. Raises InputError for another network."""
    for name, needed in {"use_scale_shift_norm": True, "resblock_updown": True, "rescale_timesteps": False}.items():
        if is_true(flags, name) is not needed:
            raise InputError(
                f"--{name} {flags[name]} is another network than ADM's, which has {needed}: improved-diffusion's files "
                "cannot be imported"
            )
    if number(flags, "num_heads_upsample") not in (-1, number(flags, "num_heads")):
        raise InputError(f"--num_heads_upsample {flags['num_heads_upsample']} differs from --num_heads: not supported")
    upsamples = bool(flags["large_size"] or flags["small_size"])
    resolution = number(flags, "large_size" if upsamples else "image_size")
    mults = UPSAMPLER_CHANNEL_MULT if upsamples else CHANNEL_MULT
    given = numbers(flags, "channel_mult")
    if not given and resolution not in mults:
        raise InputError(f"--channel_mult is missing: guided-diffusion has no default at {resolution}x{resolution}")
    head_channels, dropout = number(flags, "num_head_channels"), numbers(flags, "dropout")
    if number(flags, "diffusion_steps") < 1:
        raise InputError(f"--diffusion_steps {flags['diffusion_steps']} is less than 1")
    if len(dropout) != 1:
        raise InputError(f"--dropout {flags['dropout']} is not one number")
    arguments = {
        "resolution": resolution,
        "image_channels": 3,
        "num_classes": NUM_CLASSES if is_true(flags, "class_cond") else None,
        "channels": number(flags, "num_channels"),
        "channel_mult": given or mults[resolution],
        "num_res_blocks": number(flags, "num_res_blocks"),
        "attention_resolutions": numbers(flags, "attention_resolutions"),
        "num_heads": number(flags, "num_heads"),
        "num_head_channels": None if head_channels == -1 else head_channels,
        "dropout": dropout[0],
        "timesteps": number(flags, "diffusion_steps"),
        "schedule": flags["noise_schedule"],
        "variance": "learned" if is_true(flags, "learn_sigma") else "fixed_large",
        "prediction": "sample" if is_true(flags, "predict_xstart") else "epsilon",
        "sampling_steps": min(SAMPLING_STEPS, number(flags, "diffusion_steps")),
    }
    if not upsamples:
        return "BaseStage", arguments
    return "SuperResolutionStage", {**arguments, "low_resolution": number(flags, "small_size"), "augmentation": "none"}


LAYERS = {  # of a residual block and of an attention block
    "norm1": "in_layers.0", "conv1": "in_layers.2", "modulation": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "skip": "skip_connection", "norm": "norm", "qkv": "qkv", "project": "proj_out",
}  # fmt: skip


def adm_name(name: str) -> str:
    """guided-diffusion's name of a stage's parameter, such as unet.down.0.1.qkv.weight: input_blocks.1.1.qkv.weight."""
    part, *rest, parameter = name.removeprefix("unet.").split(".")
    if part in ("down", "middle", "up"):
        *place, layer = rest
        if part == "down":  # conv_in is input block 0
            place[0] = str(int(place[0]) + 1)
        block = {"down": "input_blocks", "middle": "middle_block", "up": "output_blocks"}[part]
        return ".".join([block, *place, LAYERS[layer], parameter])
    block = {
        "time_embedding": "time_embed", "label_embedding": "label_emb", "conv_in": "input_blocks.0.0",
        "norm_out": "out.0", "conv_out": "out.2",
    }[part]  # fmt: skip
    return ".".join([block, *rest, parameter])


def stage_weights(theirs: Any, stage: Any, legacy: bool, source: str) -> dict[str, torch.Tensor]:
    """The state_dict of `stage`, float32, from guided-diffusion's. Raises InputError where names or shapes differ.

    stage: of the arguments above; its weights are not read, so it may be on the meta device. legacy: the rows of qkv
    are (head, 3, d), the order without --use_new_attention_order; in the stage they are (3, head, d). source: the name
    of the file, for errors.
    """
    check_kind(theirs, source)
    heads = {name: module.heads for name, module in stage.named_modules() if hasattr(module, "heads")}
    expected = {adm_name(name): name for name in stage.state_dict()}
    for name in sorted(theirs.keys() ^ expected.keys()):
        holds, flags = ("holds", "have no place for it") if name in theirs else ("holds no", "ask for it")
        raise InputError(f"{source} {holds} {name}, and the flags {flags}: they are those of another network")
    state = {}
    for name, own in stage.state_dict().items():
        value = theirs[adm_name(name)].float()
        if value.ndim == own.ndim + 1:  # a convolution over one position is a linear layer
            value = value.squeeze(-1)
        if value.shape != own.shape:
            raise InputError(
                f"{source} has {adm_name(name)} of shape {tuple(value.shape)}, and the flags ask for "
                f"{tuple(own.shape)}: they are those of another network"
            )
        layer, _, kind = name.rpartition(".")
        if legacy and layer.endswith(".qkv"):
            count = heads[layer.removesuffix(".qkv")]
            rows = value.reshape(count, 3, -1, *value.shape[1:])  # (head, 3, d, ...)
            value = rows.transpose(0, 1).reshape(value.shape)
        state[name] = value.contiguous()
    return state


def is_plain(value: torch.Tensor) -> bool:
    """Whether a tensor holds its numbers, real and one by one."""
    return value.is_floating_point() and value.layout is torch.strided and not value.is_meta


def check_kind(theirs: Any, source: str) -> None:
    """Refuse what is no state_dict of ADM's U-Net, and name what it is where that can be told."""
    if not isinstance(theirs, dict) or not theirs or not all(isinstance(v, torch.Tensor) for v in theirs.values()):
        raise InputError(f"{source} is no state_dict of guided-diffusion: a table of name and tensor is expected")
    if odd := next((n for n, v in theirs.items() if not is_plain(v)), None):
        raise InputError(f"{source} has {odd} as {theirs[odd].dtype}, {theirs[odd].layout}: real numbers are expected")
    names = list(map(str, theirs))
    if not any(name.startswith("input_blocks.") for name in names):
        raise InputError(f"{source} holds {names[0]}, which is no name of guided-diffusion's networks")
    if not any(name.startswith("output_blocks.") for name in names):
        raise InputError(
            f"{source} is a classifier of guided-diffusion and no diffusion model: it has no output_blocks"
        )
    if any(re.fullmatch(r"(in|out)put_blocks\.\d+\.\d+\.(op|conv)\.\w+", name) for name in names):
        raise InputError(
            f"{source} halves the size by plain convolutions, as improved-diffusion's networks do: only networks with "
            "--resblock_updown True can be imported"
        )
