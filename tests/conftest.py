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


class Measured:
    """`pytest -m gpu` prints a line as each test ends, so that a run that is cut short has told what it found: outcome,
    seconds, the numbers that the test measured, and what a failure says first."""

    def __init__(self, reporter):
        self.reporter = reporter

    @pytest.hookimpl(trylast=True)  # pytest's own letter comes first, in a line of its own
    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:  # of what surrounds a test only what failed or was skipped
            numbers = " ".join(f"{name}={value}" for name, value in report.user_properties)
            self.tell(report, f"{report.duration:.1f}s {report.nodeid.split('/')[-1]} {numbers}")

    def pytest_collectreport(self, report):
        if report.failed:  # a module that cannot be imported
            self.tell(report, report.nodeid)

    def tell(self, report, about):
        said = [line[2:].strip() for line in report.longreprtext.splitlines() if line.startswith("E ")]
        why = f": {said[0][:300]}" if report.failed and said else ""
        self.reporter.write(f"\n{report.outcome} {about.rstrip()}{why}\n", flush=True)


@pytest.hookimpl(trylast=True)  # the terminal's reporter is there
def pytest_configure(config):
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if "gpu" in config.option.markexpr.split() and reporter and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Measured(reporter))
