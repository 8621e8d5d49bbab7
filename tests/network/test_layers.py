"""The fused norm against torch's own operations one after another, and what it keeps for the backward pass."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.network import layers as normalisation
from cdm_lightning.network.layers import ModulatedNorm


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    monkeypatch.setattr(normalisation, "FUSED_MIN_SIZE", 0)


EXACT = 1e-5  # of float32 beside float64, relative to the largest value


def given(widths, modulated, activation, offset=0.0, layout=torch.channels_last):
    """A norm with random weights, its inputs, and a direction to differentiate along."""
    g = torch.Generator().manual_seed(0)
    channels = sum(widths)
    norm = ModulatedNorm(channels, 32, activation)
    for parameter in norm.parameters():
        parameter.data.normal_(generator=g)
    parts = [torch.randn(3, width, 6, 4, generator=g).add(offset).to(memory_format=layout) for width in widths]
    modulation = torch.randn(3, 2 * channels, generator=g) if modulated else None
    return norm, parts, modulation, torch.randn(3, channels, 6, 4, generator=g)


def everything(norm, form, parts, modulation, weight):
    """Output and all gradients."""
    inputs = [part.detach().requires_grad_() for part in parts]
    told = modulation.detach().requires_grad_() if modulation is not None else None
    output = form(*inputs, modulation=told)
    wanted = [*inputs, *norm.parameters(), *([told] if told is not None else [])]
    return [output, *torch.autograd.grad((output * weight).sum(), wanted)]


@pytest.mark.parametrize("widths", [(64,), (96, 32), (40, 24)])  # the last boundary lies within a group
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("offset", [0.0, 20.0])
def test_it_equals_the_plain_form_in_float64(widths, modulated, activation, offset):
    norm, parts, modulation, weight = given(widths, modulated, activation, offset)
    got = everything(norm, norm, parts, modulation, weight)
    exact = ModulatedNorm(sum(widths), 32, activation).double()
    exact.load_state_dict(norm.state_dict())
    told = modulation.double() if modulated else None
    expected = everything(exact, exact.plain, [p.double() for p in parts], told, weight.double())
    plain = everything(norm, norm.plain, parts, modulation, weight)
    for mine, theirs, truth in zip(got, plain, expected, strict=True):
        error, size = float((mine - truth).detach().abs().max()), float(truth.detach().abs().max())
        assert error < EXACT * size * (1 + offset)
        assert error < 2 * float((theirs - truth).detach().abs().max()) + 1e-6 * size  # no worse than torch's own


def test_its_gradients_are_those_of_finite_differences():
    norm, parts, modulation, _ = given((20, 12), True, True)
    norm = norm.double()
    inputs = [value[:2, ..., :2, :2].double().requires_grad_() for value in parts]
    told = modulation[:2].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda told, *x: norm(*x, modulation=told), (told, *inputs))


def test_the_layout_of_its_input_changes_nothing_and_its_output_is_channels_last():
    norm, parts, modulation, weight = given((64,), True, True)
    expected = everything(norm, norm, parts, modulation, weight)
    contiguous = [part.contiguous() for part in parts]
    for mine, theirs in zip(everything(norm, norm, contiguous, modulation, weight), expected, strict=True):
        assert torch.equal(mine, theirs)
    assert norm(*contiguous, modulation=modulation).is_contiguous(memory_format=torch.channels_last)


def test_bf16_is_computed_in_float32_and_rounded_once():
    norm, parts, modulation, _ = given((64,), True, True)
    part = parts[0].bfloat16()
    got = norm(part, modulation=modulation)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, norm(part.float(), modulation=modulation).bfloat16())


def test_it_keeps_its_input_and_nothing_else_of_that_size():
    norm, parts, modulation, _ = given((96, 32), True, True)
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norm(*[part.requires_grad_() for part in parts], modulation=modulation)
    large = [tensor.data_ptr() for tensor in kept if tensor.numel() >= min(part.numel() for part in parts)]
    assert sorted(large) == sorted(part.data_ptr() for part in parts)


def test_compilers_get_the_plain_form_in_one_graph():
    norm, parts, modulation, weight = given((64, 64), True, True)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    got = everything(norm, compiled, parts, modulation, weight)
    for mine, theirs in zip(got, everything(norm, norm, parts, modulation, weight), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match="norm_groups 32 does not divide the 48 channels"):
        ModulatedNorm(48, 32)


def test_small_inputs_take_the_plain_form(monkeypatch):
    monkeypatch.setattr(normalisation, "FUSED_MIN_SIZE", 3 * 64 * 6 * 4 + 1)
    norm, parts, modulation, _ = given((64,), True, True)
    assert torch.equal(norm(*parts, modulation=modulation), norm.plain(*parts, modulation=modulation))
    assert norm(parts[0].repeat(2, 1, 1, 1)).grad_fn.name() == "_ModulatedNormBackward"
