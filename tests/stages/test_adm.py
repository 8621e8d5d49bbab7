"""Importing ADM's networks: they are diffusers' U-Net in ADM's configuration; other files are refused."""

import pytest
import torch
from adm_files import random_state, reduced
from diffusers import DDIMScheduler, UNet2DModel
from refusals import sentence_of_error, sentence_of_refusal

from cdm_lightning.__main__ import main
from cdm_lightning.cascade.bundle import read_bundle
from cdm_lightning.stages.adm import PRESETS, read_flags, stage_arguments
from cdm_lightning.stages.loading import load_stage, stage_class

IMAGE = "--image_size 16 --class_cond True --learn_sigma True --resblock_updown True --num_channels 32 " \
    "--num_res_blocks 2 --channel_mult 1,2,2 --attention_resolutions 8,4 --noise_schedule linear"  # fmt: skip
HEADS = 8  # channels of a head
SIZES = {  # parameters of the networks that guided-diffusion's own constructors make of the same flags
    "64x64_diffusion": 295_904_454, "128x128_diffusion": 421_529_606, "256x256_diffusion": 553_838_086,
    "256x256_diffusion_uncond": 552_814_086, "512x512_diffusion": 558_997_638, "64_256_upsampler": 311_795_910,
    "128_512_upsampler": 308_835_270, "lsun_bedroom": 552_814_086, "lsun_cat": 552_814_086, "lsun_horse": 552_814_086,
    "lsun_horse_nodropout": 552_814_086,
}  # fmt: skip


def oracle() -> UNet2DModel:
    """diffusers' U-Net as ADM configures its own, with random weights."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=6, block_out_channels=(32, 64, 64), layers_per_block=2,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"), downsample_type="resnet",
        upsample_type="resnet", resnet_time_scale_shift="scale_shift", attention_head_dim=HEADS,
        attn_norm_num_groups=32, norm_eps=1e-5, dropout=0.0, num_class_embeds=1000,
    )  # fmt: skip
    for parameter in network.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    return network.eval().requires_grad_(False)


def in_adm_names(network: UNet2DModel, legacy: bool) -> dict[str, torch.Tensor]:
    """The weights of diffusers' network under ADM's names: a table of its own, written from ADM's module lists."""
    found: dict[str, torch.Tensor] = {}

    def put(name, module):
        found[f"{name}.weight"], found[f"{name}.bias"] = module.weight, module.bias

    def residual(name, block):
        layers = {
            "in_layers.0": block.norm1, "in_layers.2": block.conv1, "emb_layers.1": block.time_emb_proj,
            "out_layers.0": block.norm2, "out_layers.3": block.conv2,
        }  # fmt: skip
        for ours, theirs in layers.items():
            put(f"{name}.{ours}", theirs)
        if block.conv_shortcut is not None:
            put(f"{name}.skip_connection", block.conv_shortcut)

    def attention(name, block):
        put(f"{name}.norm", block.group_norm)
        for what in ("weight", "bias"):
            q, k, v = (getattr(layer, what) for layer in (block.to_q, block.to_k, block.to_v))
            parts = (
                [part[i : i + HEADS] for i in range(0, len(q), HEADS) for part in (q, k, v)] if legacy else (q, k, v)
            )
            found[f"{name}.qkv.{what}"] = torch.cat(parts)
            found[f"{name}.proj_out.{what}"] = getattr(block.to_out[0], what)
        for layer in ("qkv", "proj_out"):  # convolutions over one position
            found[f"{name}.{layer}.weight"] = found[f"{name}.{layer}.weight"][:, :, None]

    put("time_embed.0", network.time_embedding.linear_1)
    put("time_embed.2", network.time_embedding.linear_2)
    found["label_emb.weight"] = network.class_embedding.weight
    put("input_blocks.0.0", network.conv_in)
    number = 1
    for block in network.down_blocks:
        for i, layer in enumerate(block.resnets):
            residual(f"input_blocks.{number}.0", layer)
            if getattr(block, "attentions", None):
                attention(f"input_blocks.{number}.1", block.attentions[i])
            number += 1
        for layer in block.downsamplers or []:
            residual(f"input_blocks.{number}.0", layer)
            number += 1
    residual("middle_block.0", network.mid_block.resnets[0])
    attention("middle_block.1", network.mid_block.attentions[0])
    residual("middle_block.2", network.mid_block.resnets[1])
    number = 0
    for block in network.up_blocks:
        for i, layer in enumerate(block.resnets):
            residual(f"output_blocks.{number}.0", layer)
            if getattr(block, "attentions", None):
                attention(f"output_blocks.{number}.1", block.attentions[i])
            number += 1
        last = getattr(block, "resnet_up", None) or (block.upsamplers or [None])[0]
        if last is not None:
            after = 2 if getattr(block, "attentions", None) else 1
            residual(f"output_blocks.{number - 1}.{after}", last)
    put("out.0", network.conv_norm_out)
    put("out.2", network.conv_out)
    return found


def imported(tmp_path, state, flags, name="adm"):
    """The stage that `cdm import` makes of a state_dict."""
    torch.save(state, tmp_path / f"{name}.pt")
    main(["import", f"--file={tmp_path / name}.pt", f"--out={tmp_path / name}.ckpt", f"--flags={flags}"])
    return load_stage(tmp_path / f"{name}.ckpt")


@pytest.mark.parametrize("legacy", [False, True])
def test_an_import_is_the_function_of_the_other_network(tmp_path, legacy):
    network = oracle()
    flags = f"{IMAGE} --num_head_channels {HEADS} --use_new_attention_order {not legacy}"
    stage = imported(tmp_path, in_adm_names(network, legacy), flags)
    assert stage.num_classes == 1000 and stage.name == "base16"
    x, label, t = torch.randn(3, 3, 16, 16), torch.tensor([0, 417, 999]), torch.tensor([1.0, 500.0, 1000.0])
    expected = network(x, t - 1, class_labels=label).sample
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(stage.unet(x, t, label), expected, rtol=0, atol=2e-5)
    other = imported(tmp_path, in_adm_names(network, not legacy), flags, "other")  # the order matters
    assert float((other.unet(x, t, label) - expected).abs().max()) > 1e-3

    # A sampled image, by diffusers' own scheduler on diffusers' own network.
    stage.diffusion.sampler, stage.diffusion.sampling_steps = "ddim", 5
    scheduler = DDIMScheduler(1000, beta_start=1e-4, beta_end=0.02, clip_sample=True, timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    noise = torch.randn(3, 3, 16, 16)
    image = noise
    for time in scheduler.timesteps:
        predicted = network(image, time, class_labels=label).sample[:, :3]
        image = scheduler.step(predicted, time, image, use_clipped_model_output=True).prev_sample
    mine = stage.diffusion.sample(stage.predictor(label), noise)
    torch.testing.assert_close(mine, image, rtol=0, atol=1e-3)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_the_shapes_of_its_published_file(preset):
    kind, arguments = stage_arguments(read_flags(PRESETS[preset]))
    with torch.device("meta"):
        stage = stage_class(kind, preset)(**arguments)
    size = sum(parameter.numel() for parameter in stage.parameters())
    assert size == SIZES[preset]
    heads = {m.heads for m in stage.modules() if hasattr(m, "heads")}
    assert len(heads) == 1 if "--num_heads 4" in PRESETS[preset] or preset == "128_512_upsampler" else len(heads) > 1


def test_two_imports_are_a_cascade(tmp_path, capsys):
    parts = {"base": "64x64_diffusion", "upsampler": "64_256_upsampler"}
    flags = {name: reduced(preset) for name, preset in parts.items()}
    for name in parts:
        imported(tmp_path, random_state(flags[name]), flags[name], name)
    printed = capsys.readouterr().out
    assert "SHA-256" in printed and "SuperResolutionStage sr32" in printed and "1000 classes" in printed
    assert "a file does not show them" in printed
    checkpoints = ",".join(str(tmp_path / f"{name}.ckpt") for name in parts)
    main(["bundle", f"--checkpoints=[{checkpoints}]", f"--out={tmp_path / 'bundle'}"])
    assert "base16 (imported) -> sr32 (imported)" in capsys.readouterr().out
    (base, upsampler), about = read_bundle(tmp_path / "bundle")
    assert [stage.trained["imported"]["file"] for stage in (base, upsampler)] == ["base.pt", "upsampler.pt"]
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert all(stage.trained["imported"]["sha256"] in card for stage in (base, upsampler))
    assert "--large_size 32" in card and "--class_cond True" in card
    assert about["levels"] == [0] and upsampler.augmentation.takes_level is False
    sample = ["sample", f"--bundle={tmp_path / 'bundle'}", f"--out={tmp_path / 'samples'}", "--classes=[417]"]
    main([*sample, "--count=2", "--block_size=2", "--sampling_steps=[2,2]"])
    assert (tmp_path / "samples/samples.png").is_file()


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--preset=64x64_difusion"], "the nearest is 64x64_diffusion"),
        ([], "give one of --preset and --flags"),
        (["--preset=lsun_cat", "--flags=--image_size 64"], "give one of --preset and --flags"),
        (
            ["--flags=--image_sise 64"],
            "--image_sise is no flag of guided-diffusion's networks; the nearest is --image_size",
        ),
        (["--flags=--image_size"], "no list of --name value"),
        (["--flags=--image_size '64"], "no list of --name value: no closing quotation"),
        (["--flags={IMAGE} --channel_mult ,"], "--channel_mult is missing"),
        (["--flags={IMAGE} --noise_schedule cosine --diffusion_steps -5"], "--diffusion_steps -5 is less than 1"),
        (["--flags={IMAGE} --dropout 0.1,0.9"], "--dropout 0.1,0.9 is not one number"),
        (["--flags=--image_size 48 --resblock_updown True"], "--channel_mult is missing"),
        (["--flags=--resblock_updown True --num_channels wide"], "--num_channels wide is no whole number"),
        (["--flags=--image_size 64"], "improved-diffusion's files cannot be imported"),
        (["--flags=--resblock_updown True --noise_schedule quadratic"], "schedule"),
        (["--flags={IMAGE} --num_channels 64"], "of shape (128, 32), and the flags ask for (256, 64)"),
        (["--flags={IMAGE} --class_cond False"], "holds label_emb.weight, and the flags have no place for it"),
        (["--flags={IMAGE} --num_res_blocks 3"], "and the flags ask for it"),
    ],
)
def test_wrong_flags_are_refused(tmp_path, capsys, options, sentence):
    torch.save(random_state(IMAGE), tmp_path / "adm.pt")
    options = [option.replace("{IMAGE}", IMAGE) for option in options]
    told = sentence_of_refusal(capsys, ["import", f"--file={tmp_path}/adm.pt", f"--out={tmp_path}/adm.ckpt", *options])
    assert sentence in told and not (tmp_path / "adm.ckpt").exists()


@pytest.mark.parametrize(
    "state, sentence",
    [
        ({"conv.weight": torch.zeros(3)}, "holds conv.weight, which is no name of guided-diffusion's networks"),
        ({"input_blocks.0.0.weight": torch.zeros(3), "out.2.c_proj.bias": torch.zeros(3)}, "is a classifier"),
        (
            {"input_blocks.3.0.op.weight": torch.zeros(3), "output_blocks.0.0.bias": torch.zeros(3)},
            "improved-diffusion",
        ),
        ({"step": 3}, "is no state_dict of guided-diffusion"),
        ([1, 2], "is no state_dict of guided-diffusion"),
        *(
            ({"input_blocks.0.0.weight": value}, "real numbers are expected")
            for value in (
                torch.zeros(3).to_sparse(),
                torch.zeros(3, device="meta"),
                torch.zeros(3, dtype=torch.int8),
                torch.zeros(3, dtype=torch.complex64),
            )
        ),
    ],
)
def test_files_of_others_are_refused(tmp_path, capsys, state, sentence):
    torch.save(state, tmp_path / "other.pt")
    command = ["import", f"--file={tmp_path}/other.pt", f"--out={tmp_path}/adm.ckpt", "--preset=64x64_diffusion"]
    assert sentence in sentence_of_refusal(capsys, command)
    assert not (tmp_path / "adm.ckpt").exists()


def test_the_download_is_not_lost_and_its_numbers_are_finite(tmp_path, capsys):
    state = random_state(IMAGE)
    torch.save({**state, "out.2.bias": torch.full((6,), float("nan"))}, tmp_path / "adm.pt")
    command = ["import", f"--file={tmp_path}/adm.pt", f"--flags={IMAGE}"]
    before = (tmp_path / "adm.pt").read_bytes()
    assert "is the file itself" in sentence_of_refusal(capsys, [*command, f"--out={tmp_path}/adm.pt"])
    assert "not finite in out.2.bias" in sentence_of_refusal(capsys, [*command, f"--out={tmp_path}/adm.ckpt"])
    below = sentence_of_refusal(capsys, [*command[:2], f"--flags={IMAGE}", f"--out={tmp_path}/adm.pt/x.ckpt"])
    assert (tmp_path / "adm.pt").read_bytes() == before and "adm.pt" in below


def test_a_cut_file_is_refused(tmp_path, capsys):
    torch.save(random_state(IMAGE), tmp_path / "cut.pt")
    whole = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    command = ["import", f"--file={tmp_path}/cut.pt", f"--out={tmp_path}/adm.ckpt", f"--flags={IMAGE}"]
    assert "cut.pt is cut short" in sentence_of_refusal(capsys, command) and not (tmp_path / "adm.ckpt").exists()


def test_a_training_cannot_resume_from_an_import(tmp_path):
    imported(tmp_path, random_state(IMAGE), IMAGE)
    from cdm_lightning.stages.checkpoints import check_checkpoint

    sentence_of_error(lambda: check_checkpoint(tmp_path / "adm.ckpt"), "init_from")


QUICK_PRESETS = ("512x512_diffusion", "64_256_upsampler")  # fractions, and an augmentation that is new


@pytest.mark.parametrize(
    "preset", [p if p in QUICK_PRESETS else pytest.param(p, marks=pytest.mark.long) for p in PRESETS]
)
def test_an_import_is_tuned(tmp_path, preset):
    """Steps from the imported weights, with Gaussian augmentation where it is an upsampler."""
    flags = reduced(preset)
    source = imported(tmp_path, random_state(flags), flags)
    arguments = {**source.hparams, "dropout": 0.0, "init_from": str(tmp_path / "adm.ckpt")}
    if source.is_super_resolution:
        arguments |= {"augmentation": "gaussian", "low_res_timesteps": 1000, "low_res_schedule": "cosine"}
    tuned = type(source)(**arguments)
    g = torch.Generator().manual_seed(0)
    image = torch.rand(4, 3, tuned.resolution, tuned.resolution, generator=g) * 2 - 1
    batch = image, torch.tensor([0, 1, 2, 3]), torch.arange(4)
    optimizer = torch.optim.Adam(tuned.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        losses.append(tuned.losses(batch, "train")["loss"].mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    if not source.is_super_resolution:  # an upsampler sees another input, as its augmentation is new
        torch.testing.assert_close(source.losses(batch, "train")["loss"].mean(), losses[0])
    assert float(losses[2]) < float(losses[0])
