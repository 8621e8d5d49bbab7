"""Signals, and outputs that nobody reads: a command ends with one sentence, whatever it waits for."""

import os
import signal
import subprocess
import sys
import time

import pytest
from commands import ENVIRONMENT

from cdm_lightning import __main__ as commands
from cdm_lightning.__main__ import main
from cdm_lightning.foundation.stopping import Stopped

COMMAND = """
import sys, time
from cdm_lightning.foundation.stopping import ending_with_a_sentence

with ending_with_a_sentence():
    {body}
"""


def start(body, **options):
    """A process that does something as a command of `cdm` does."""
    program = [sys.executable, "-c", COMMAND.format(body=body)]
    return subprocess.Popen(program, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("number, name", [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_signal_ends_a_command_with_a_sentence_and_its_code(monkeypatch, capsys, number, name):
    before = signal.getsignal(number)
    monkeypatch.setattr(commands, "run", lambda arguments: os.kill(os.getpid(), number) or time.sleep(60))
    with pytest.raises(Stopped) as stop:
        main(["plan"])
    assert stop.value.code == 128 + number
    assert capsys.readouterr().err == f"{name}: what is written stays, and the same command goes on\n"
    assert signal.getsignal(number) == before


def test_a_signal_that_is_ignored_stays_so():
    """As a shell sets it for a command that runs behind it."""
    ignoring = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    process = start("print('begun', flush=True); time.sleep(0.5)", stdout=subprocess.PIPE, preexec_fn=ignoring)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0


def test_a_full_pipe_does_not_keep_a_signal_from_being_heard():
    process = start("while True: print('a line', flush=True)", stdout=subprocess.PIPE)
    try:
        time.sleep(1.5)  # nobody reads, and the pipe is soon full
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
        assert process.stderr.read() == "SIGTERM: what is written stays, and the same command goes on\n"
    finally:
        process.kill()


@pytest.mark.parametrize("body", ["while True: print('a line', flush=True)", "print('a line'); time.sleep(0.5)"])
def test_a_closed_pipe_ends_a_command_quietly(body):
    reading, writing = os.pipe()
    os.close(reading)
    process = start(body, stdout=writing)
    os.close(writing)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 128 + signal.SIGPIPE


def test_a_broken_pipe_of_another_kind_is_an_error():
    process = start("raise BrokenPipeError(32, 'Broken pipe')", stdout=subprocess.DEVNULL)
    assert "BrokenPipeError" in process.communicate(timeout=60)[1] and process.returncode == 1
