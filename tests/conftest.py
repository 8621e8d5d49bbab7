"""What many tests are given: a cascade of small stages, and a few real images."""

import signal
from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from folders import FASHION
from small_models import SMALL, randomise_weights

from cdm_lightning.data.shards import read_manifest, read_shard, write_manifest, write_shard
from cdm_lightning.stages import BaseStage, SuperResolutionStage

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background process, where Ctrl-C is not heard
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the networks here are too small to share, and threads that wait for a busy core crawl


@pytest.fixture
def stages():
    """The paper's kinds of stage in its clocks: 4000-cosine, 4000-cosine with Gaussian s, 2000-linear with blur."""
    torch.manual_seed(0)
    return [
        randomise_weights(BaseStage(resolution=8, **SMALL)),
        randomise_weights(
            SuperResolutionStage(
                resolution=16, low_resolution=8, low_res_timesteps=4000, low_res_schedule="cosine", **SMALL
            )
        ),
        randomise_weights(
            SuperResolutionStage(
                resolution=32,
                low_resolution=16,
                augmentation="blur",
                timesteps=2000,
                schedule="linear",
                variance="fixed_small",
                continuous=True,
                **SMALL,
            )
        ),
    ]


@pytest.fixture(scope="session")
def few_real(tmp_path_factory):
    """Root of the first 60 training images of Fashion in two shards, of the first 200 validation images in three."""
    root = tmp_path_factory.mktemp("few_real")
    for split, ends in (("train", [0, 40, 60]), ("val", [0, 120, 180, 200])):
        source = FASHION / split / "32"
        samples = [(s["__key__"], s["png"], int(s["cls"])) for s in islice(read_shard(source / "000.tar.gz"), ends[-1])]
        folder = root / split / "32"
        shards = [write_shard(folder / f"{a}.tar", samples[a:b]) for a, b in pairwise(ends)]
        counts = np.bincount([label for _, _, label in samples], minlength=10).tolist()
        write_manifest(folder, replace(read_manifest(source), shards=shards, counts=counts))
    return root


def pytest_terminal_summary(terminalreporter, config):
    """`pytest -m gpu` ends with a line per test: outcome, seconds, and the numbers that it measured."""
    if "gpu" not in config.option.markexpr.split():
        return
    terminalreporter.section("measured")
    for outcome in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            numbers = " ".join(f"{name}={value}" for name, value in getattr(report, "user_properties", []))
            seconds = f"{getattr(report, 'duration', 0):.1f}s"  # a module that cannot be imported has none
            terminalreporter.line(f"{outcome} {seconds} {report.nodeid.split('/')[-1]} {numbers}".rstrip())
