"""Files such as ADM's published ones, of random numbers and small."""

import torch

from cdm_lightning.stages.adm import PRESETS, adm_name, read_flags, stage_arguments
from cdm_lightning.stages.loading import stage_class


def reduced(preset: str) -> str:
    """A preset at a size that a test can afford, with its heads, orders, classes and fractions."""
    upsampler = "--large_size 32 --small_size 16 --attention_resolutions 16"
    size = upsampler if "upsampler" in preset else "--image_size 16 --attention_resolutions 8"
    mults = "0.5,1,2" if preset.startswith("512") else "1,2"
    return f"{PRESETS[preset]} {size} --channel_mult {mults} --num_channels 64 --num_res_blocks 1"


def random_state(flags: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state_dict of random numbers in the names and shapes of ADM's network for these flags."""
    kind, arguments = stage_arguments(read_flags(flags))
    torch.manual_seed(seed)
    return {
        adm_name(name): 0.02 * torch.randn(value.shape + (1,) * name.endswith(("qkv.weight", "project.weight")))
        for name, value in stage_class(kind, "adm")(**arguments).state_dict().items()
    }
