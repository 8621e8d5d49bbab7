"""The compiled network on the GPU, also as CUDA graphs, against the plain one: in training and in sampling."""

import copy

import pytest
import torch
from commands import ROOT
from devices import DEVICE, error, levels_apart, needs_cuda, tf32
from small_models import SMALL, randomise_weights

from cdm_lightning.cascade import CascadeModule
from cdm_lightning.foundation.images import to_uint8
from cdm_lightning.stages import SuperResolutionStage

pytestmark = [pytest.mark.gpu, needs_cuda, pytest.mark.filterwarnings("ignore")]
CLOCK = {"low_resolution": 16, "low_res_timesteps": 4000, "low_res_schedule": "cosine"}


def inputs(seed):
    g = torch.Generator().manual_seed(seed)
    x, low_res = (torch.randn(8, 1, 32, 32, generator=g) for _ in range(2))
    t, level = (torch.randint(1, 4000, (8,), generator=g).float() for _ in range(2))
    return [part.to(DEVICE) for part in (x, t, torch.randint(10, (8,), generator=g), low_res, level)]


def forward_and_gradients(unet, *seeds):
    """The last output, and the gradients summed over the inputs; copies, as the network's may be a graph's buffers."""
    unet.zero_grad()
    for seed in seeds:
        output = unet(*inputs(seed))
        (output * torch.linspace(-1, 1, output.numel(), device=DEVICE).view_as(output)).sum().backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in unet.parameters()])
    return output.detach().clone(), gradient.clone()


@pytest.fixture(autouse=True)
def nothing_compiled():
    """No test meets the compiled code of another."""
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_network_is_the_plain_one(mode, figures):
    """Called with one input after another, so that a buffer that stays from a call before would show.

    Two passes before an update are for the default mode alone: with CUDA graphs `cdm fit` refuses to accumulate.
    """
    torch.manual_seed(0)
    sizes = {**SMALL, "channels": 16, "norm_groups": 8, "attention_resolutions": [], "channel_mult": [1]}
    stage = randomise_weights(SuperResolutionStage(resolution=32, **CLOCK, **sizes))
    plain = stage.unet.to(DEVICE).train().requires_grad_(True)
    compiled = copy.deepcopy(plain)
    compiled.compile(mode=mode)
    found = {}
    with tf32(False):
        once = [(1,), (2,), (3,), (4,)]  # CUDA graphs warm up, are recorded, and replay
        for seeds in [*once, (5, 6)] if mode == "default" else once:
            results = zip(forward_and_gradients(compiled, *seeds), forward_and_gradients(plain, *seeds), strict=True)
            found[seeds] = [error(*pair) for pair in results]
    figures(**{"output": max(one for one, _ in found.values()), "gradient": max(one for _, one in found.values())})
    worst = max(max(pair) for pair in found.values())
    assert worst < 3e-5, f"compiled as {mode} and plain are apart, relative to the norm: {found}"


def test_samples_of_cuda_graphs_are_those_without(figures):
    """Of the shipped cascade with its base stage compiled: a block that records the graph, and one that replays it."""
    index = torch.arange(24, device=DEVICE)
    drawn = []
    for compiled in (False, True):
        cascade = CascadeModule.from_pretrained(
            ROOT / "data/fashion-cascade", sampler="dpm++", sampling_steps=[6, 2, 2]
        ).to(DEVICE)
        if compiled:
            cascade.stages[0].unet.compile(mode="reduce-overhead")
        with tf32(False), torch.inference_mode():
            drawn.append(torch.cat([to_uint8(cascade.sample(part % 10, part)[-1]) for part in index.split(12)]))
    most, share = levels_apart(*drawn)
    figures(largest=most, within_one=f"{100 * share:.4f}%")
    assert most <= 1, f"samples lie up to {most} grey levels apart, {100 * share:.3f} % of the pixels within one"
