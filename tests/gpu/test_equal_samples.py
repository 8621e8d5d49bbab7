"""The shipped cascade on the device: its images at other block sizes, and beside those of a CPU."""

import numpy as np
import pytest
import torch
from commands import ROOT
from devices import CUDA, DEVICE, levels_apart, tf32, threads
from PIL import Image

from cdm_lightning.cascade import CascadeModule
from cdm_lightning.foundation.images import quantize, to_uint8
from cdm_lightning.stages import SuperResolutionStage

pytestmark = pytest.mark.gpu
COUNT, STEPS = (64, 10) if CUDA else (8, 3)


def shipped(device):
    """The cascade of data/fashion-cascade with a few steps of DPM-Solver++ in each stage."""
    cascade = CascadeModule.from_pretrained(ROOT / "data/fashion-cascade", sampler="dpm++", sampling_steps=[STEPS] * 3)
    return cascade.to(device)


def in_blocks(cascade, size, batch_sizes=None):
    """The finished images of COUNT samples, uint8, drawn in blocks."""
    cascade.set_batch_sizes(batch_sizes)
    index = torch.arange(COUNT, device=cascade.device)
    blocks = [cascade.sample(part % 10, part)[-1] for part in index.split(size)]
    return to_uint8(torch.cat(blocks))


def test_images_do_not_depend_on_the_block(figures):
    """In full float32; how far TF32, which torch allows in convolutions by default, takes them is only measured."""
    cascade, few = shipped(DEVICE), COUNT // 4
    with tf32(False):
        whole = in_blocks(cascade, COUNT)
        found = {"blocks": levels_apart(in_blocks(cascade, few), whole)}
        found["batch_sizes"] = levels_apart(in_blocks(cascade, COUNT, [COUNT, few, few // 2]), whole)
    if CUDA:
        whole = in_blocks(cascade, COUNT)
        found["blocks_in_tf32"] = levels_apart(in_blocks(cascade, few), whole)
    figures(**{f"{name}_largest": most for name, (most, _) in found.items()})
    figures(**{f"{name}_within_one": f"{100 * share:.4f}%" for name, (_, share) in found.items()})
    for name in ("blocks", "batch_sizes"):
        assert found[name][0] <= 1, f"{name}: pixels lie up to {found[name][0]} grey levels apart"


def test_images_are_those_of_a_cpu(figures):
    """The same noise given to every stage, and the CPU's images as the input of the next one; in full float32."""
    here, there = shipped(torch.device("cpu")), shipped(DEVICE)
    label = torch.arange(COUNT) % 10
    g = torch.Generator().manual_seed(0)
    low_res, found = None, {}
    with torch.no_grad(), tf32(False), threads(8 if CUDA else 1):
        for one, other in zip(here.stages, there.stages, strict=True):
            noise = torch.randn(COUNT, 1, one.resolution, one.resolution, generator=g)
            images = []
            for stage, device in ((one, "cpu"), (other, DEVICE)):
                given = [label.to(device)]
                if isinstance(stage, SuperResolutionStage):
                    given += [low_res.to(device), torch.zeros(COUNT, device=device)]
                predict = (stage.conditioned_predictor if len(given) > 1 else stage.predictor)(*given)
                images.append(to_uint8(stage.diffusion.sample(predict, noise.to(device))).cpu())
            found[one.name] = levels_apart(*images)
            low_res = quantize(images[0].float() / 127.5 - 1)
    figures(**{name: f"{100 * share:.4f}% within one, largest {most};" for name, (most, share) in found.items()})
    for name, (most, share) in found.items():
        assert share >= 0.999, f"{name}: {100 * share:.3f} % of the pixels lie within one level, the largest by {most}"


def test_a_cascade_on_the_device_gives_pictures(figures):
    cascade = shipped(DEVICE)
    images = cascade(classes=[0, 3, 9], seed=1, progress=False, sampling_steps=[4, 4, 4])
    assert [type(image) for image in images] == [Image.Image] * 3
    assert all(image.size == (32, 32) and len(np.unique(np.asarray(image))) > 20 for image in images)
    arrays = cascade(count=2, output_type="pt", progress=False, sampling_steps=[2, 2, 2], all_resolutions=True)
    assert [tuple(array.shape) for array in arrays] == [(2, 1, r, r) for r in (8, 16, 32)]
    assert all(array.device.type == DEVICE.type for array in arrays)
    figures(device=arrays[0].device)
