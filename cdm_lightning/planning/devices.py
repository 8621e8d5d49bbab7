"""Devices: their rates and memory, from data sheets or measured on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml

from cdm_lightning.foundation.errors import InputError


@dataclass(frozen=True)
class DataSheet:
    """A GPU's data sheet: dense FLOP/s, memory in bytes (1 GB = 10^9), bandwidth in bytes per second."""

    name: str
    bf16: float  # on tensor cores; the same for fp16
    tf32: float  # on tensor cores; torch's default for float32 convolutions
    fp32: float
    memory: float
    bandwidth: float
    source: str

    def rate(self, precision: str) -> float:
        """FLOP/s of convolutions and matrix products in a Lightning precision."""
        return self.tf32 if precision.startswith("32") else self.bf16


# The sheets state the tensor-core rates with sparsity: twice these.
DATA_SHEETS = {
    sheet.name: sheet
    for sheet in (
        DataSheet("H100", 989.4e12, 494.7e12, 66.9e12, 80e9, 3.35e12, "NVIDIA H100 data sheet, SXM5 80 GB"),
        DataSheet("H200", 989.4e12, 494.7e12, 66.9e12, 141e9, 4.8e12, "NVIDIA H200 data sheet, SXM 141 GB"),
        DataSheet("B200", 2250e12, 1125e12, 75e12, 180e9, 8e12, "NVIDIA HGX B200 data sheet, one of 8 GPUs, 180 GB"),
        DataSheet("A100", 312e12, 156e12, 19.5e12, 80e9, 2.039e12, "NVIDIA A100 data sheet, SXM4 80 GB"),
    )
}


def data_sheet(name: str) -> DataSheet:
    """The data sheet of a device by name; upper or lower case."""
    if name.upper() not in DATA_SHEETS:
        raise InputError(f"device {name!r} is none of {', '.join(DATA_SHEETS)}; without a name, it is the one at hand")
    return DATA_SHEETS[name.upper()]


ASSUMED_SHARE = 0.4  # of a rate that a training reaches, where nothing was measured


def measured_share(device: str, recipe: str) -> float | None:
    """The share of its data sheet's rate that a device reached with a recipe, such as imagenet/sr256, if known."""
    table = Path("experiments/gpu/shares.yaml")
    known = yaml.safe_load(table.read_text()) if table.is_file() else None
    return ((known or {}).get(device) or {}).get(recipe)


def duration(days: float) -> str:
    """A time in the unit that people would use for it: seconds, minutes, hours or days."""
    for unit, length in (("days", 1.0), ("hours", 24.0), ("minutes", 1440.0)):
        if days * length >= 2:
            return f"{days * length:,.3g} {unit}" if days < 1000 else f"{days:,.0f} days"
    return f"{days * 86400:,.3g} seconds"


def current_device() -> torch.device:
    """The device that a training on this machine would use."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """The name of a GPU, or "CPU" with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def available_memory(device: torch.device) -> float:
    """Bytes that a training could use: all memory of a GPU, or this machine's free memory within its cgroup limit."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    free = float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():  # counts the file cache as available
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = 1024.0 * int(lines["MemAvailable"].split()[0])
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return free if limit == "max" else min(free, float(int(limit) - int(used)))
    except (OSError, ValueError):  # no cgroup v2
        return free


@dataclass(frozen=True)
class Rates:
    """Measured FLOP/s; a multiply-add counts as 2."""

    matmul: float
    convolution: float  # 3x3, forward


def measure_rates(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> Rates:
    """Median rates of a large matrix product and of a 3x3 convolution, each run for at least `seconds`.

    On a CPU: 1024^3, and 16 images of 128 channels at 16x16. On a GPU: 8192^3, and 32 images of 256 channels at 64x64.
    The convolution uses channels_last. At these sizes both run at their full rate.
    """
    from torch.utils.benchmark import Timer  # loads setuptools, which no help needs

    large = device.type == "cuda"
    n, batch, channels, size = (8192, 32, 256, 64) if large else (1024, 16, 128, 16)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(batch, channels, size, size, device=device, dtype=dtype)
    w = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
    x, w = (tensor.to(memory_format=torch.channels_last) for tensor in (x, w))

    def rate(statement: str, flops: float, **names: object) -> float:
        timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
        return flops / timer.blocked_autorange(min_run_time=seconds).median

    with torch.no_grad():
        matmul = rate("a @ b", 2 * n**3, a=a, b=b)
        flops = 2 * batch * size**2 * channels**2 * 9
        return Rates(matmul, rate("convolve(x, w, padding=1)", flops, convolve=F.conv2d, x=x, w=w))
