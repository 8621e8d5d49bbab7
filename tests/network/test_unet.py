"""The U-Net against diffusers' UNet2DModel with transferred weights, and against what the paper's options promise."""

import pytest
import torch
from diffusers import UNet2DModel

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.network import ResidualBlock, SelfAttention, UNet
from cdm_lightning.network import layers as normalisation
from cdm_lightning.network.layers import conv_of_upsampled, pointwise
from cdm_lightning.network.unet import sinusoidal_embedding

CHANNELS, MULT, BLOCKS, HEADS = 32, (1, 2, 2), 2, 4


def oracle() -> UNet2DModel:
    """diffusers' U-Net configured as ADM's; its class embedding takes a vector that is added to the time's."""
    return UNet2DModel(
        sample_size=16, in_channels=6, out_channels=6, block_out_channels=tuple(CHANNELS * m for m in MULT),
        layers_per_block=BLOCKS, down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"), downsample_type="resnet",
        upsample_type="resnet", resnet_time_scale_shift="scale_shift", attention_head_dim=64 // HEADS,
        attn_norm_num_groups=32, norm_eps=1e-5, dropout=0.0, class_embed_type="identity",
    )  # fmt: skip


def ours(**options) -> UNet:
    return UNet(16, 6, 6, CHANNELS, MULT, BLOCKS, (8, 4), HEADS, **options)


def copy(target, source) -> None:
    target.weight.data.copy_(source.weight.data.reshape(target.weight.shape))
    target.bias.data.copy_(source.bias.data)


def copy_residual(mine: ResidualBlock, theirs) -> None:
    pairs = [
        ("norm1", "norm1"),
        ("conv1", "conv1"),
        ("modulation", "time_emb_proj"),
        ("norm2", "norm2"),
        ("conv2", "conv2"),
    ]
    for a, b in pairs:
        copy(getattr(mine, a), getattr(theirs, b))
    if theirs.conv_shortcut is not None:
        copy(mine.skip, theirs.conv_shortcut)


def copy_attention(mine: SelfAttention, theirs) -> None:
    copy(mine.norm, theirs.group_norm)
    for what in ("weight", "bias"):
        joined = torch.cat([getattr(layer, what).data for layer in (theirs.to_q, theirs.to_k, theirs.to_v)])
        getattr(mine.qkv, what).data.copy_(joined)
    copy(mine.project, theirs.to_out[0])


def transfer(mine: UNet, theirs: UNet2DModel) -> None:
    """Every weight of the oracle into its place here; both lists are in the order of the forward pass."""
    for a, b in ((0, theirs.time_embedding.linear_1), (2, theirs.time_embedding.linear_2)):
        copy(mine.time_embedding[a], b)
    copy(mine.conv_in, theirs.conv_in)
    copy(mine.norm_out, theirs.conv_norm_out)
    copy(mine.conv_out, theirs.conv_out)
    residuals, attentions = [], []
    for block in [*theirs.down_blocks, theirs.mid_block, *theirs.up_blocks]:
        residuals += [
            *block.resnets,
            *(getattr(block, "downsamplers", None) or []),
            *(getattr(block, "upsamplers", None) or []),
        ]
        if hasattr(block, "resnet_up") and block.resnet_up is not None:
            residuals.append(block.resnet_up)
        attentions += list(getattr(block, "attentions", []))
    own_residuals = [
        m for part in (mine.down, mine.middle, mine.up) for m in part.modules() if isinstance(m, ResidualBlock)
    ]
    own_attentions = [m for m in mine.modules() if isinstance(m, SelfAttention)]
    for pair in zip(own_residuals, residuals, strict=True):
        copy_residual(*pair)
    for pair in zip(own_attentions, attentions, strict=True):
        copy_attention(*pair)


def randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("small", [0, 2**17])  # by the fused norm, and by the plain one that small inputs get
def test_parity_with_diffusers_forward_and_backward(small, monkeypatch):
    monkeypatch.setattr(normalisation, "FUSED_MIN_SIZE", small)
    theirs, mine = oracle(), ours(num_classes=10, level_embedding=True)
    randomise(theirs)
    transfer(mine, theirs)
    randomise(mine.label_embedding)
    randomise(mine.level_embedding)
    extra = sum(p.numel() for m in (mine.label_embedding, mine.level_embedding) for p in m.parameters())
    assert sum(p.numel() for p in mine.parameters()) - extra == sum(p.numel() for p in theirs.parameters())
    g = torch.Generator().manual_seed(1)
    x, low_res = torch.randn(3, 3, 16, 16, generator=g), torch.randn(3, 3, 16, 16, generator=g)
    t, level, label = torch.tensor([1.0, 300.5, 4000.0]), torch.tensor([0.0, 101.0, 1001.0]), torch.tensor([0, 3, 9])
    second = mine.label_embedding(label) + mine.level_embedding(level - 1)
    expected = theirs(torch.cat([x, low_res], 1), t - 1, class_labels=second.detach()).sample
    got = mine(x, t, label, low_res, level)
    print(float((got - expected).detach().abs().max()), float(expected.detach().std()))
    assert float((got - expected).detach().abs().max()) < 1e-5 and float(expected.detach().std()) > 0.1
    weight = torch.randn(got.shape, generator=g)
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(mine.conv_in.weight.grad, theirs.conv_in.weight.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("changed", ["t", "label", "low_res", "level"])
def test_every_input_reaches_the_output(changed):
    model = ours(num_classes=10, level_embedding=True)
    randomise(model)
    inputs = dict(
        t=torch.tensor([5.0]), label=torch.tensor([1]), low_res=torch.zeros(1, 3, 16, 16), level=torch.tensor([7.0])
    )
    x = torch.randn(1, 3, 16, 16)
    other = {**inputs, changed: inputs[changed] + 1}
    assert float((model(x, **inputs) - model(x, **other)).abs().max()) > 1e-4


def test_it_starts_as_zero_and_without_classes_ignores_the_label():
    model = ours()
    x = torch.randn(2, 6, 16, 16)
    assert float(model(x, torch.tensor([1.0, 2.0])).abs().max()) == 0
    assert model.label_embedding is None and model.level_embedding is None


def test_sinusoids_are_cosines_then_sines():
    embedding = sinusoidal_embedding(torch.tensor([0.0, 2.0]), 4)
    expected = [torch.tensor(v) for v in (2.0, 0.02)]
    torch.testing.assert_close(embedding[0], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(embedding[1], torch.stack([e.cos() for e in expected] + [e.sin() for e in expected]))


def test_the_paper_networks_have_attention_where_it_says():
    with torch.device("meta"):
        base = UNet(32, 3, 6, 256, (1, 2, 3, 4), 6, (8, 16), 4, 0.1, 1000)
        last = UNet(256, 6, 3, 128, (1, 2, 4, 4, 8, 8), 3, (16,), 1, 0.0, 1000)
    # 32, 16, 8, 4: six blocks down and seven up at two of the four sizes, and the middle
    assert sum(isinstance(m, SelfAttention) for m in base.modules()) == 2 * (6 + 7) + 1
    assert sum(isinstance(m, SelfAttention) for m in last.modules()) == 3 + 4 + 1


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(resolution=18), "resolution 18 cannot be halved 2 times"),
        (dict(norm_groups=24), "norm_groups 24 does not divide the 32 channels"),
        (dict(num_heads=3), "num_heads 3 does not divide the 64 channels"),
        (dict(channels=33), "channels 33 is odd"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(change, sentence):
    options = dict(resolution=16, in_channels=3, out_channels=3, channels=32, channel_mult=(1, 2, 2), num_res_blocks=1,
                   attention_resolutions=(8,), num_heads=4)  # fmt: skip
    with pytest.raises(InputError, match=sentence):
        UNet(**{**options, **change})


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (9, 12)])
def test_a_convolution_of_repeated_pixels_is_the_plain_one(size):
    conv = torch.nn.Conv2d(5, 7, 3, padding=1).double()
    x = torch.randn(2, 5, *size, dtype=torch.float64, requires_grad=True)
    got, expected = conv_of_upsampled(x, conv), conv(torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(got)
    wanted = (x, conv.weight, conv.bias)
    pairs = zip(*(torch.autograd.grad((y * weight).sum(), wanted) for y in (got, expected)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


def test_a_layer_along_the_channels_is_the_linear_layer():
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64, requires_grad=True)
    layer = torch.nn.Linear(6, 8).double()
    wanted, weight = (x, layer.weight, layer.bias), torch.randn(2, 8, 3, 5, dtype=torch.float64)
    expected = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    got = pointwise(x, layer)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    for mine, theirs in zip(*(torch.autograd.grad((y * weight).sum(), wanted) for y in (got, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def gradients(model: UNet, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x, weight = torch.randn(2, 6, 16, 16, generator=g), torch.randn(2, 6, 16, 16, generator=g)
    torch.manual_seed(seed)  # of dropout
    output = model(x, torch.tensor([3.0, 700.0]), torch.tensor([1, 2]), level=torch.tensor([0.0, 9.0]))
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), list(model.parameters()))]


def test_checkpointing_gives_the_same_bits_and_keeps_less():
    options = dict(num_classes=10, level_embedding=True, dropout=0.3)
    plain, frugal = ours(**options), ours(**options, checkpointing=True)
    randomise(plain)
    frugal.load_state_dict(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(gradients(plain), gradients(frugal), strict=True))

    def kept(model: UNet) -> int:
        sizes: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = model(
                torch.randn(2, 6, 16, 16), torch.ones(2), torch.zeros(2, dtype=torch.long), None, torch.ones(2)
            )
        assert output.grad_fn is not None  # alive until here, and with it all that it keeps
        return sum(sizes.values())

    assert kept(frugal) < 0.5 * kept(plain)


def test_the_whole_network_is_one_graph_for_a_compiler():
    model = UNet(16, 6, 6, CHANNELS, (1, 2), 1, (8,), HEADS, num_classes=10, level_embedding=True)
    randomise(model)
    expected = gradients(model)
    model.compile(fullgraph=True, backend="eager")
    for mine, theirs in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    assert all("_orig_mod" not in name for name in model.state_dict())


def test_what_no_t_changes_may_be_computed_once():
    model = ours(num_classes=10, level_embedding=True)
    randomise(model)
    x, t, label, level = torch.randn(2, 6, 16, 16), torch.ones(2), torch.tensor([4, 5]), torch.tensor([0.0, 9.0])
    conditioning = model.condition(label, level)
    assert torch.equal(model(x, t, conditioning=conditioning), model(x, t, label, level=level))
    assert ours().condition(None, None) is None
