"""How work is shared out: the strategy for so many processes and machines, and the end of them all by a signal."""

import os
import signal
import threading

import pytest
from lightning.pytorch.strategies import DDPStrategy

from cdm_lightning.sampling import shared_work
from cdm_lightning.sampling.shared_work import TIMEOUT, EndOnSigterm, join_processes, make_trainer


@pytest.fixture
def torchrun(monkeypatch):
    """As if torchrun had started this process."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    return monkeypatch


@pytest.fixture
def options_of(monkeypatch):
    """make_trainer with the options of the trainer in place of the trainer."""
    monkeypatch.setattr(shared_work.L, "Trainer", lambda **options: options)
    return make_trainer


def test_one_process_needs_no_strategy(monkeypatch, options_of):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")  # left by something else: torchrun did not start this process
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    alone = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
    assert options_of(1, "cpu").items() >= alone.items()
    assert os.environ[shared_work.FIRST_PROCESS] == str(os.getpid())


@pytest.mark.parametrize(("devices", "machines", "several"), [(1, 1, False), (2, 1, True), (1, 3, True)])
def test_several_processes_wait_for_the_slowest(torchrun, options_of, devices, machines, several):
    torchrun.setenv("GROUP_WORLD_SIZE", str(machines))
    options = options_of(devices, "cpu")
    assert (options["devices"], options["num_nodes"]) == (devices, machines)
    assert isinstance(options["strategy"], DDPStrategy) == several
    if several:
        assert options["strategy"].process_group_backend == "gloo"
        assert options["strategy"]._timeout == TIMEOUT and TIMEOUT.days >= 30


@pytest.mark.parametrize(("world", "joined", "connects"), [(2, False, True), (1, False, False), (2, True, False)])
def test_processes_of_torchrun_connect_once(torchrun, world, joined, connects):
    calls = []
    torchrun.setenv("WORLD_SIZE", str(world))
    torchrun.setattr("torch.distributed.is_initialized", lambda: joined)
    torchrun.setattr("torch.distributed.init_process_group", lambda *a, **k: calls.append((a, k)))
    join_processes()
    assert calls == ([(("gloo",), {"timeout": TIMEOUT})] if connects else [])
    torchrun.delenv("TORCHELASTIC_RUN_ID")
    calls.clear()
    join_processes()
    assert calls == []


def test_a_prediction_ends_at_sigterm_with_the_code_of_the_signal():
    before = signal.getsignal(signal.SIGTERM)
    try:
        EndOnSigterm().on_predict_start(None, None)
        with pytest.raises(SystemExit) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(10)
        assert stop.value.code == 143
        signal.signal(signal.SIGTERM, before)
        other = threading.Thread(target=EndOnSigterm().on_predict_start, args=(None, None))
        other.start()  # only the main thread may set a handler
        other.join()
        assert signal.getsignal(signal.SIGTERM) == before
    finally:
        signal.signal(signal.SIGTERM, before)
