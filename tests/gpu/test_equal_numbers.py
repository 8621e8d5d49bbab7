"""The network, the fused norm and the detector on the device, against a CPU in float64 or the plain form."""

import copy

import pytest
import torch
from devices import CUDA, DEVICE, error, needs_cuda, tf32, threads

from cdm_lightning.evaluation.detectors import load_detector
from cdm_lightning.evaluation.detectors.detector import features_of
from cdm_lightning.network import layers
from cdm_lightning.network.layers import ModulatedNorm

pytestmark = pytest.mark.gpu
BATCH = 4


def network_inputs(stage, dtype, device):
    """x, t, label, low_res and level, the same numbers in every type and on every device."""
    g = torch.Generator().manual_seed(1)
    size = (BATCH, stage.image_channels, stage.resolution, stage.resolution)
    x, low_res = (torch.randn(size, generator=g) for _ in range(2))
    t, level = torch.tensor([1.0, 400.0, 1999.0, 4000.0]), torch.tensor([0.0, 1.0, 1001.0, 3000.0])
    label = torch.tensor([0, 3, 3, 9])
    given = [x, t, label, *([low_res, level] if stage.is_super_resolution else [])]
    return [part.to(device, dtype if part.is_floating_point() else part.dtype) for part in given]


def forward_and_gradients(stage, dtype, device, cast=None):
    """The output, and the gradients of all parameters as one vector."""
    unet = copy.deepcopy(stage.unet).to(device, dtype).train().requires_grad_(True)
    with torch.autocast(device.type, cast, enabled=cast is not None):
        output = unet(*network_inputs(stage, dtype, device))
    along = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    (output.to(dtype) * along).sum().backward()
    return output, torch.cat([parameter.grad.flatten() for parameter in unet.parameters()])


REFERENCES = {}  # of each kind of stage, as three tests need it


def reference(stage):
    if stage.name not in REFERENCES:
        with threads(8 if CUDA else 1):
            REFERENCES[stage.name] = forward_and_gradients(stage, torch.float64, torch.device("cpu"))
    return REFERENCES[stage.name]


@pytest.mark.parametrize(
    ("precision", "most", "most_of_gradient"),
    [
        ("fp32", 1e-5, 2e-5),
        pytest.param("tf32", 3e-3, 6e-3, marks=needs_cuda),
        ("bf16", 3e-2, 6e-2),
    ],
)
def test_the_network_is_that_of_float64(stage, precision, most, most_of_gradient, figures):
    expected = reference(stage)
    with tf32(precision == "tf32"):
        cast = torch.bfloat16 if precision == "bf16" else None
        output, gradient = (error(*pair) for pair in zip(
            forward_and_gradients(stage, torch.float32, DEVICE, cast), expected, strict=True
        ))  # fmt: skip
    figures(output=output, gradient=gradient)
    assert output < most, f"the output is {output:.2e} apart from float64, relative to its norm; at most {most}"
    assert gradient < most_of_gradient, f"the gradient is {gradient:.2e} apart from float64; at most {most_of_gradient}"


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_fused_norm_is_the_plain_one(dtype, most, figures, monkeypatch):
    """Of one part and of two, modulated or not, with SiLU or without; in bf16 under autocast, as in a network."""
    monkeypatch.setattr(layers, "FUSED_MIN_SIZE", 0)
    batch, size = (16, 32) if CUDA else (3, 6)
    g = torch.Generator().manual_seed(0)
    worst = {"output": 0.0, "gradient": 0.0}
    for widths in ((64,), (96, 32), (40, 24)):  # the last boundary lies within a group
        for modulated, activation in ((False, False), (True, True)):
            norm = ModulatedNorm(sum(widths), 32, activation)
            for parameter in norm.parameters():
                parameter.data.normal_(generator=g)
            norm = norm.to(DEVICE)
            inputs = [torch.randn(batch, width, size, size, generator=g) + 1 for width in widths]
            inputs += [torch.randn(batch, 2 * sum(widths), generator=g)] if modulated else []
            along = torch.randn(batch, sum(widths), size, size, generator=g).to(DEVICE)
            found = []
            for form in (norm, norm.plain):
                given = [part.to(DEVICE, dtype).requires_grad_() for part in inputs]
                parts, told = (given[:-1], given[-1]) if modulated else (given, None)
                parts = [part.contiguous(memory_format=torch.channels_last) for part in parts]
                with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                    output = form(*parts, modulation=told)
                if form is norm:
                    assert (
                        "KernelNorm" if CUDA else "_ModulatedNorm"
                    ) in output.grad_fn.name() or dtype != torch.float32
                wanted = [*given, *norm.parameters()]
                found.append([output, *torch.autograd.grad((output.float() * along).sum(), wanted)])
            for number, pair in enumerate(zip(*found, strict=True)):
                name = "gradient" if number else "output"
                worst[name] = max(worst[name], error(*pair))
    figures(**worst)
    assert max(worst.values()) < most, f"fused and plain form are apart, relative to the norm: {worst}; at most {most}"


def test_the_detector_makes_the_features_of_a_cpu(figures):
    """Also where TF32 is allowed, as torch allows it in convolutions and `cdm fit` in matrix products."""
    image = torch.randint(256, (64, 1, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    detector = load_detector("fashion-cnn-64")
    expected = features_of(detector, image)
    with tf32(True):
        apart = error(features_of(copy.deepcopy(detector).to(DEVICE), image.to(DEVICE)), expected)
    figures(features=apart)
    assert apart < 1e-4, f"features on {DEVICE} are {apart:.2e} apart from those of a CPU, relative to their norm"
