"""Network benchmark: forward pass and training step of our U-Net, compared with those of other projects.

The others are diffusers' UNet2DModel with its EMAModel and, if a checkout is given, guided-diffusion's UNetModel with
its own averaging. All are configured as the same ADM network, with equal parameters, inputs and precision, so that one
FLOP count holds for all.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from torch import nn

from cdm_lightning.foundation.errors import InputError
from cdm_lightning.network import UNet
from cdm_lightning.planning.devices import measure_rates
from cdm_lightning.planning.flops import forward_flops

CLASSES = 10
Seconds = dict[str, dict[str, list[float]]]  # by network and by what is timed, one a round
AUTOCAST = {"cuda": torch.bfloat16, "cpu": None}  # of each kind of device; None: float32


@dataclass(frozen=True)
class Size:
    """The size of the common network. attention: sizes of the feature maps that have it, beside the middle's.

    diffusers takes the width of a head instead of their number, which then holds for the widest layer: of 1, 2, 3, 4
    times the channels and four heads it has 2, 3 and 4.
    """

    resolution: int = 32
    channels: int = 64
    blocks: int = 2
    batch: int = 16
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    attention: tuple[int, ...] = (16, 8)
    heads: int = 4


# The paper's base32, sr256 and sr64, the last two without their low-resolution input.
LARGE = [Size(32, 256, 6, 64), Size(256, 128, 3, 8, (1, 2, 4, 4, 8, 8), (16,), 1), Size(64, 256, 5, 16)]


@dataclass
class Contestant:
    """One network with the optimizer and the weight averaging of its project."""

    network: nn.Module
    call: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    update: Callable[[], None]
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward
    autocast: bool = True  # whether it is called under autocast; else it has its own half precision


def ours(size: Size, device: torch.device) -> Contestant:
    """Our U-Net with fused Adam and our EMA."""
    with device:
        network = UNet(
            size.resolution, 3, 6, size.channels, size.multipliers, size.blocks, size.attention, size.heads,
            num_classes=CLASSES,
        )  # fmt: skip
    optimizer = torch.optim.Adam(network.parameters(), 1e-4, fused=True)
    weights = list(network.parameters())
    averaged = [weight.detach().clone() for weight in weights]

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, weights, 1e-4)

    return Contestant(network, network, update)


def compiled(size: Size, device: torch.device) -> Contestant:
    """Ours, with its network compiled."""
    contestant = ours(size, device)
    contestant.network.compile(mode="default")
    return contestant


def diffusers(size: Size, device: torch.device) -> Contestant:
    """diffusers' UNet2DModel with AdamW and its EMAModel."""
    widths = tuple(size.channels * multiplier for multiplier in size.multipliers)
    attends = [size.resolution // 2**depth in size.attention for depth in range(len(widths))]
    down = ["AttnDownBlock2D" if has else "ResnetDownsampleBlock2D" for has in attends]
    with device:
        network = UNet2DModel(
            sample_size=size.resolution, in_channels=3, out_channels=6, layers_per_block=size.blocks,
            block_out_channels=widths, down_block_types=tuple(down),
            up_block_types=tuple("AttnUpBlock2D" if has else "ResnetUpsampleBlock2D" for has in reversed(attends)),
            downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift",
            attention_head_dim=widths[-1] // size.heads, attn_norm_num_groups=32, norm_eps=1e-5,
            num_class_embeds=CLASSES,
        )  # fmt: skip
    optimizer, average = torch.optim.AdamW(network.parameters(), 1e-4), EMAModel(network.parameters())

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())

    return Contestant(network, lambda x, t, label: network(x, t, class_labels=label).sample, update)


def guided_diffusion(size: Size, device: torch.device, checkout: Path) -> Contestant:
    """The UNetModel of a guided-diffusion checkout with AdamW and its own EMA.

    On a GPU in float16, as that project trains: its weights, its loss scale, and float32 copies that are updated. Its
    checkpointed attention does not run under autocast.
    """
    if not (checkout / "guided_diffusion" / "unet.py").is_file():
        raise InputError(f"{checkout} is no checkout of guided-diffusion: it holds no guided_diffusion/unet.py")
    sys.path.insert(0, str(checkout))
    from guided_diffusion.nn import update_ema
    from guided_diffusion.unet import UNetModel

    half = device.type == "cuda"
    with device:
        network = UNetModel(
            image_size=size.resolution, in_channels=3, model_channels=size.channels, out_channels=6,
            num_res_blocks=size.blocks,
            attention_resolutions=tuple(size.resolution // side for side in size.attention),
            channel_mult=size.multipliers, num_classes=CLASSES, num_heads=size.heads, use_scale_shift_norm=True,
            resblock_updown=True, use_new_attention_order=True, use_fp16=half,
        )  # fmt: skip
    fill_zero_layers(network)
    trainer = None
    if half:
        from guided_diffusion import logger
        from guided_diffusion.fp16_util import MixedPrecisionTrainer

        logger.configure(tempfile.mkdtemp(), [])  # else it writes what it logs
        # At this loss scale nothing overflows: a step that does would not be made.
        trainer = MixedPrecisionTrainer(model=network, use_fp16=True, initial_lg_loss_scale=8)
    weights = list(network.parameters()) if trainer is None else trainer.master_params
    optimizer = torch.optim.AdamW(weights, 1e-4, weight_decay=0.0)
    averaged = [weight.detach().clone() for weight in weights]

    def update() -> None:
        if trainer is None:
            optimizer.step()
            optimizer.zero_grad()
        else:
            assert trainer.optimize(optimizer), "a step of guided-diffusion overflowed"
            trainer.zero_grad()
        update_ema(averaged, weights, 0.9999)

    if trainer is None:
        return Contestant(network, network, update)
    return Contestant(network, network, update, trainer.backward, autocast=False)


def run(
    quick: bool = False,
    guided: Path | None = None,
    compile: bool = False,
    rounds: int | None = None,
    save: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """By the size of the network, what `compare` finds. save: called with all that is found so far after each round."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = [Size(16, 32, 1, 2)] if quick else LARGE if device.type == "cuda" else [Size()]
    found: dict[str, Any] = {}
    for size in sizes:
        name = f"{size.channels} channels at {size.resolution}"
        rounds_of_size = rounds or (2 if quick else 5 if device.type == "cuda" else 12)
        try:

            def save_so_far(part: dict[str, Any], name: str = name) -> None:
                found[name] = part
                save(found)

            save_so_far(
                compare(size, device, quick, guided, compile, rounds_of_size, save_so_far, apart=device.type == "cuda")
            )
            found[name]["profile"] = profile(size, device, 1 if quick else 5)
        except torch.OutOfMemoryError as error:
            print(f"{name}, batch {size.batch}: {error}", flush=True)
        save(found)
    return found


def compare(
    size: Size,
    device: torch.device,
    quick: bool,
    guided: Path | None,
    compile: bool,
    rounds: int,
    save: Callable[[dict[str, Any]], None],
    apart: bool = False,
) -> dict[str, Any]:
    """Measure all networks in turn, in rounds. Reports medians, and ratios to ours within each round.

    apart: measure them one after another instead, ours first, since together they may not fit into a GPU's memory; a
    ratio is then of rounds some minutes apart. Of the others, one that does not fit by itself is left out. save: called
    with what is found so far after each round.
    """
    builders: dict[str, Callable[[], Contestant]] = {"ours": partial(ours, size, device)}
    builders["diffusers"] = partial(diffusers, size, device)
    if compile:
        builders["ours, compiled"] = partial(compiled, size, device)
    if guided is not None:
        builders["guided-diffusion"] = partial(guided_diffusion, size, device, guided)
    precision, dtype = "bf16" if device.type == "cuda" else "fp32", AUTOCAST[device.type]
    rates = measure_rates(device, dtype or torch.float32, 0.1 if quick else 1.0)
    part: dict[str, Any] = {
        "size": vars(size), "precision": precision, "matmul": rates.matmul, "convolution": rates.convolution,
        "parameters": {}, "kept": {},
    }  # fmt: skip
    times: Seconds = {}

    def measure(names: list[str]) -> None:
        contestants = {name: builders[name]() for name in names}
        for name, contestant in contestants.items():
            fill_zero_layers(contestant.network)
            part["parameters"][name] = sum(p.numel() for p in contestant.network.parameters())
            part["kept"][name] = saved_bytes(contestant, inputs(size, device), dtype) / size.batch
        if isinstance(network := contestants[names[0]].network, UNet):
            part["flops"] = forward_flops(network)
        for own in time_contestants(contestants, inputs(size, device), dtype, rounds, device):
            times.update(own)
            part["rounds"] = len(times["ours"]["step"])
            part["contestants"] = {name: figures(times, name, part["flops"] * size.batch) for name in times}
            save(part)

    for names in [[name] for name in builders] if apart else [list(builders)]:
        gc.collect()
        try:
            measure(names)
        except torch.OutOfMemoryError as error:
            if "ours" in names:
                raise
            print(f"{names[0]}, batch {size.batch}: {error}", flush=True)
            for kept in (times, part["parameters"], part["kept"], part["contestants"]):
                kept.pop(names[0], None)
    gc.collect()
    return part


def fill_zero_layers(network: nn.Module) -> None:
    """Initialise layers that are zero with small random weights: arithmetic on zeros and denormals differs in speed."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)


def inputs(size: Size, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random x (B, 3, R, R), t in (1, 1000) (B,) and labels (B,)."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(size.batch, 3, size.resolution, size.resolution, generator=g)
    t = torch.rand(size.batch, generator=g) * 999 + 1
    return x.to(device), t.to(device), (torch.arange(size.batch) % CLASSES).to(device)


def time_contestants(
    contestants: dict[str, Contestant], data: tuple[torch.Tensor, ...], dtype: Any, rounds: int, device: torch.device
) -> Iterator[Seconds]:
    """Seconds of `forward`, `gradients` (forward and backward) and `step` (with the update), per network and round.

    Yields all seconds so far after each round.
    """
    times: Seconds = {n: {"forward": [], "gradients": [], "step": []} for n in contestants}
    order = list(contestants.items())
    for number in range(rounds + 1):
        order = order[1:] + order[:1]
        for name, contestant in order:
            call = autocast(contestant, device, dtype)
            with torch.no_grad(), stopwatch(device) as forward:
                call(*data)
            with stopwatch(device) as step:
                with stopwatch(device) as gradients:
                    contestant.backward(call(*data).float().square().mean())
                contestant.update()
            if number:  # the first round warms up
                for what, clock in (("forward", forward), ("gradients", gradients), ("step", step)):
                    times[name][what].append(clock[0])
        if number:
            yield times


def autocast(contestant: Contestant, device: torch.device, dtype: Any) -> Callable[..., torch.Tensor]:
    """The contestant's call under autocast to `dtype`, where it takes that; None for no autocast."""

    def cast(*data: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype is not None and contestant.autocast):
            return contestant.call(*data)

    return cast


@contextmanager
def stopwatch(device: torch.device) -> Iterator[list[float]]:
    """A list to which the seconds of the block are appended at its end, when the device has finished."""
    seconds: list[float] = []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    yield seconds
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds.append(time.perf_counter() - start)


def figures(times: Seconds, name: str, flops: float) -> dict[str, Any]:
    """Median seconds, FLOP/s (a step counts as 3 forward passes), how many times longer than ours in rounds so far."""
    own = {}
    for what, seconds in times[name].items():
        rate = flops * (1 if what == "forward" else 3) / median(seconds)
        ratio = median(theirs / mine for theirs, mine in zip(seconds, times["ours"][what], strict=False))
        own[what] = {"seconds": median(seconds), "flops": rate, "ours_faster": ratio}
    return own


def saved_bytes(contestant: Contestant, data: tuple[torch.Tensor, ...], dtype: Any) -> int:
    """Bytes that a forward pass saves for the backward pass, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in contestant.network.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = autocast(contestant, data[0].device, dtype)(*data)
    del output
    return sum(sizes.values())


KINDS = {  # kinds of operations, by parts of torch's operation names; the first match counts
    "convolution, backward": ("convolution_backward", "dgrad", "wgrad"),
    "convolution, forward": ("convolution", "conv", "fprop"),
    "attention": ("attention", "flash", "fmha"),
    "linear layers": ("mm", "gemm"),
    "norm, modulation, activation": (
        *("modulatednorm", "group_norm", "silu", "addcmul", "mse_loss"),
        *("channel_s", "coefficients", "normalise", "input_gradient"),  # kernels of our own
    ),
    "copies": ("copy", "cat", "clone", "contiguous", "fill", "memcpy", "memset"),
    "optimizer and averages": ("adam", "lerp", "foreach"),
}


def profile(size: Size, device: torch.device, rounds: int = 5) -> dict[str, float]:
    """The share of each kind of operation in the time of our training step, from medians over rounds."""
    contestant, data = ours(size, device), inputs(size, device)
    fill_zero_layers(contestant.network)
    call = autocast(contestant, device, AUTOCAST[device.type])
    found: list[dict[str, float]] = []
    for _ in range(rounds + 1):
        with torch.profiler.profile() as profiler:
            call(*data).float().square().mean().backward()
            contestant.update()
        found.append({})
        for event in profiler.key_averages():
            taken = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
            kind = next(
                (k for k, names in KINDS.items() if any(n in event.key.lower() for n in names)), "everything else"
            )
            found[-1][kind] = found[-1].get(kind, 0.0) + taken
    times = {kind: median(one.get(kind, 0.0) for one in found[1:]) for kind in found[-1]}  # the first warms up
    return {kind: taken / sum(times.values()) for kind, taken in sorted(times.items(), key=lambda item: -item[1])}


def table(found: dict[str, Any]) -> str:
    """The results as Markdown tables."""
    lines = []
    for part in found.values():
        size = part["size"]
        lines += [
            f"network at {size['resolution']}x{size['resolution']}, {size['channels']} channels x "
            f"{size['multipliers']}, {size['blocks']} blocks, batch {size['batch']}, {part['precision']}, "
            f"{part['rounds']} rounds; measured here: matmul {part['matmul'] / 1e9:.0f} GFLOP/s, 3x3 convolution "
            f"{part['convolution'] / 1e9:.0f}",
            "",
            "| | forward GFLOP/s | gradients GFLOP/s | step GFLOP/s | step, share of convolution | ours is faster: "
            "forward | gradients | step | saved for backward, MiB per image |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name, own in part["contestants"].items():
            rates = " | ".join(f"{own[what]['flops'] / 1e9:.1f}" for what in ("forward", "gradients", "step"))
            ratios = " | ".join(f"{own[what]['ours_faster']:.2f}" for what in ("forward", "gradients", "step"))
            share = own["step"]["flops"] / part["convolution"]
            lines.append(f"| {name} | {rates} | {share:.0%} | {ratios} | {part['kept'][name] / 2**20:.1f} |")
        shares = ", ".join(f"{kind} {share:.1%}" for kind, share in part.get("profile", {}).items())
        lines += ["", f"where the time of our step goes: {shares}", ""] if shares else [""]
    return "\n".join(lines).rstrip()
