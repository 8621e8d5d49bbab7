"""Ending a command by a signal: SIGTERM and Ctrl-C become one sentence, whatever the command waits for."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

GOES_ON = "what is written stays, and the same command goes on"
pending = 0  # the signal that a training has noted, and will leave for at the next batch; 0: none
waiting = False  # whether the process is in an interruptible wait


class Stopped(SystemExit):
    """A signal ends the command, with exit code 128 + its number.

    sentence: what stays and how to go on, for the command line to print; empty if that is said already.
    """

    def __init__(self, number: int, sentence: str = GOES_ON) -> None:
        super().__init__(128 + number)
        self.number, self.sentence = number, sentence


class StoppedWaiting(Stopped):
    """A signal ends a training that waits for a batch: between two batches, so that it can be saved."""


def stop(number: int, frame: Any = None) -> None:
    """A signal's handler: raise Stopped, whatever the process does."""
    discard_blocked_output()
    raise Stopped(number)


@contextmanager
def ending_with_a_sentence() -> Iterator[None]:
    """Print the sentence of Stopped, and end quietly where nobody reads the output any more (`cdm ... | head`).

    Within, SIGTERM and SIGINT raise Stopped.
    """
    handlers = handle(stop, signal.SIGTERM, signal.SIGINT)
    try:
        yield
        sys.stdout.flush()
    except (Stopped, KeyboardInterrupt) as error:
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        if stopped.sentence and os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{signal_name(stopped.number)}: {stopped.sentence}", file=sys.stderr, flush=True)
        raise stopped from None
    except BrokenPipeError:
        if not (closed := closed_outputs()):
            raise
        for output in closed:
            discard(output)  # else Python tries once more to write what is left
        raise SystemExit(128 + signal.SIGPIPE) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def handle(handler: Callable[[int, Any], None], *numbers: int) -> dict[int, Any]:
    """Set the handler of signals, except those that are ignored, as a shell's background process ignores Ctrl-C.

    Returns the handlers before. Does nothing in another thread than the main one, which hears no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


@contextmanager
def interruptible_wait() -> Iterator[None]:
    """A wait of a training between two batches: a signal that is noted before or during it raises StoppedWaiting."""
    global waiting
    waiting = True
    try:
        if pending:
            raise StoppedWaiting(pending)
        yield
    finally:
        waiting = False


def note_signal(number: int, frame: Any = None) -> None:
    """A signal's handler in a training: leave at the next batch, at once in a wait for it, or at a second Ctrl-C."""
    global pending
    discard_blocked_output()
    again, pending = pending, number
    if waiting:
        raise StoppedWaiting(number)
    if number == signal.SIGINT and again:
        raise Stopped(number, "the steps since the newest checkpoint are not saved; the same command goes on from it")
    if number == signal.SIGINT and os.environ.get("LOCAL_RANK", "0") == "0" and sys.stderr.isatty():
        os.write(2, b"\nCtrl-C: saving after the batch in hand; press it again to stop at once\n")


def signal_name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def discard_blocked_output() -> None:
    """Send stdout and stderr to nowhere if nobody reads them: a write that is blocked by a full pipe then ends."""
    for output in (1, 2):
        with suppress(OSError, ValueError):
            if not select.select([], [output], [], 0)[1]:
                discard(output)


def closed_outputs() -> list[int]:
    """Which of stdout and stderr have lost their reader."""
    poll = select.poll()
    for output in (1, 2):
        poll.register(output, select.POLLOUT)
    return [output for output, event in poll.poll(0) if event & (select.POLLERR | select.POLLHUP)]


def discard(output: int) -> None:
    """Let a file descriptor lead to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, output)
    os.close(nowhere)
