"""The processes of one run: which is the first, waiting for all, and ending together when one of them fails.

When one process finds an input error, one message is printed and all processes exit with code 2, even those that wait
in a collective operation. This module does not import torch, because every command imports it.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path
from typing import Any, Literal

from cdm_lightning.foundation.errors import InputError, error_sentence
from cdm_lightning.foundation.stopping import GOES_ON

Accelerator = Literal["auto", "cpu", "gpu"]  # of our own commands
LEADER = "CDM_LEADER"  # environment variable: process id of the first process, which started the others
REFUSAL = "CDM_REFUSAL"  # environment variable: a file that exists once a process of the run has refused its input
GRACE = 3.0  # seconds for a process to end by itself after another has refused its input
ENDED = f"another process of this run ended before its time: {GOES_ON}"
refused_here = ""  # the refusal file, if this process wrote it
followers: list[Any] = []  # the processes (Popen) that this one started, as far as it watches over them
limit: Limit | None = None  # of the present wait


@dataclass
class Limit:
    """Of a wait: when it must be over (time.monotonic), and what to do if it is not."""

    end: float
    give_up: Callable[[], None]


def torch_distributed() -> Any:
    """torch.distributed if its process group is initialised, else None. Does not import torch."""
    torch = sys.modules.get("torch")
    return torch.distributed if torch is not None and torch.distributed.is_initialized() else None


def first_process() -> bool:
    """Whether this process is the one that writes and prints: rank 0, which Lightning sets when processes start."""
    lightning = sys.modules.get("lightning.pytorch.utilities")
    return lightning is None or not getattr(lightning.rank_zero_only, "rank", 0)


def wait_for_all() -> None:
    """Wait for the other processes, if any. Raises InputError if one of them has died."""
    if (connection := torch_distributed()) is None:
        return
    try:
        connection.barrier()
    except RuntimeError as error:  # gloo: the connection closed
        raise InputError(ENDED) from error


def connection_error(error: BaseException) -> InputError | None:
    """What to say of an error that the end or the silence of another process has caused; None for other errors."""
    if (connection := torch_distributed()) is None or not isinstance(error, RuntimeError):
        return None
    reason = str(error)
    if "Timed out waiting" in reason:  # gloo
        return InputError(f"another process of this run does not answer ({reason.splitlines()[0]}): {GOES_ON}")
    return InputError(ENDED) if "gloo" in reason or isinstance(error, connection.DistError) else None


def watch_over(launcher: Any) -> None:
    """End this process with a sentence if one dies that Lightning's launcher has started.

    Lightning's own observer would kill this process without a word. Call it after the launch; it does nothing outside
    of a command of `cdm`.
    """
    started = getattr(launcher, "procs", [])
    if LEADER in os.environ and not is_follower():
        followers.extend(started)
        started.clear()  # the observer sees that there is nothing to observe


def exit_with_sentence(error: Exception) -> int:
    """Print the message of an error, and return the exit code.

    Only the first process of a run that fails prints; the others end silently. Where it has left before another one
    fails at the same step, that one prints the sentence again.
    """
    if claim_refusal():
        print(f"cdm: error: {error_sentence(error)}", file=sys.stderr, flush=True)
    if is_follower():
        wait_until(leader_is_gone, 2 * GRACE)  # Lightning would kill the leader if this process ended first
    return 2


@contextmanager
def ending_together() -> Iterator[None]:
    """End this process when another one of its run refuses its input, or when the process that started it is gone.

    Without this, a process that waits in a collective operation would notice after many minutes, or never.
    """
    if not is_follower():
        name = f"cdm-{os.getpid()}-{secrets.token_hex(8)}"
        os.environ |= {LEADER: str(os.getpid()), REFUSAL: str(Path(tempfile.gettempdir()) / name)}
    stop, others = threading.Event(), set(active_children())
    followers.clear()
    threading.Thread(target=watch, args=(stop,), daemon=True).start()
    try:
        yield
    finally:
        stop.set()
        for reader in set(active_children()) - others:  # else Python waits for them at its exit
            with suppress(RuntimeError):  # torch reports that it was killed
                reader.kill()
                reader.join(GRACE)
        if not is_follower():
            with suppress(OSError):
                Path(os.environ[REFUSAL]).unlink()
            for name in (LEADER, REFUSAL):
                os.environ.pop(name)


@contextmanager
def time_limit(seconds: float, give_up: Callable[[], None]) -> Iterator[None]:
    """Call `give_up` in another thread if what is done within takes longer, and again every GRACE seconds.

    For waits that nothing else can end. Acts while a command of `cdm` runs.
    """
    global limit
    limit = Limit(time.monotonic() + seconds, give_up)
    try:
        yield
    finally:
        limit = None


def exit_now(sentence: str) -> None:
    """End this process with a message and exit code 2, whatever its main thread waits for."""
    if claim_refusal():  # which ends the other processes of the run
        print(f"cdm: error: {sentence}", file=sys.stderr, flush=True)
    os._exit(2)


def watch(stop: threading.Event) -> None:
    """Until `stop` is set: give up a wait whose time is over, and exit where another process has died.

    Also exit if another process has refused its input, after GRACE seconds to end by itself.
    """
    while not stop.wait(0.5):
        if (present := limit) is not None and time.monotonic() > present.end:
            present.end = time.monotonic() + GRACE
            present.give_up()
        if any(follower.poll() in (1, -signal.SIGKILL, -signal.SIGABRT, -signal.SIGSEGV) for follower in followers):
            if not stop.wait(GRACE):  # its connection is closed, which ends most waits
                exit_now(ENDED)
            return
        if another_refused():
            # A leader that is gone may have ended normally, while this process still has work to do.
            if not stop.wait(10 * GRACE if is_follower() and leader_is_gone() else GRACE):
                os._exit(2)
            return


def is_follower() -> bool:
    """Whether this process was started by the first process of a run, through Lightning."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and LEADER in os.environ


def leader_is_gone() -> bool:
    """Whether the process that started this one has ended."""
    return str(os.getppid()) != os.environ[LEADER]


def claim_refusal() -> bool:
    """Tell the other processes that this one has refused its input. False if another one did so first."""
    global refused_here
    try:
        os.close(os.open(os.environ[REFUSAL], os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    except (KeyError, OSError):
        return True  # there are no other processes
    refused_here = os.environ[REFUSAL]
    return True


def another_refused(patience: float = 0) -> bool:
    """Whether another process has refused its input, or the leader is gone; waits up to `patience` seconds for it."""
    file = os.environ.get(REFUSAL, "")
    return wait_until(
        lambda: (file != refused_here and os.path.exists(file)) or (is_follower() and leader_is_gone()), patience
    )


def follows_a_refusal() -> bool:
    """Whether an error of this process only follows from the refusal of another one, which closed the connection."""
    return torch_distributed() is not None and another_refused(GRACE)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until the condition is true, for at most `seconds`; returns whether it is."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(0.05)
    return True
