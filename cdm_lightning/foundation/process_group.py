"""One sentence and exit code 2 for bad input, from every process of a run, whatever the others are waiting for."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import active_children
from pathlib import Path

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from cdm_lightning.foundation.errors import InputError

LEADER, WORD = "CDM_LEADER", "CDM_REFUSAL"  # process that starts the others, and file that says that one has refused
GRACE = 3.0  # seconds for a process to end by itself when another has refused


def understood(error: BaseException | None) -> Exception | None:
    """The error that has a sentence for people, among `error` and its causes; jsonargparse wraps what it catches."""
    while error is not None:
        if isinstance(error, InputError) or (isinstance(error, OSError) and error.errno is not None):
            return error
        if isinstance(error, MisconfigurationException):
            return InputError(" ".join(str(error).split()))
        if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid"):
            return InputError(
                f"a process that reads images was ended from outside, as happens when memory runs out "
                f"({str(error).split('. ')[0]}): the same command goes on, with fewer data.num_workers if need be"
            )
        error = error.__cause__
    return None


def fail(error: Exception) -> int:
    """Print the sentence of an error, which a worker process wraps in its own traceback, and give the exit code.

    The process of a run that is the first to refuse is the one that prints; the others end without a word.
    """
    sentence = str(error).strip().splitlines()[-1].removeprefix("cdm_lightning.InputError: ")
    if leave_word():
        print(f"cdm: error: {sentence}", file=sys.stderr, flush=True)
    if follows():
        wait_for(led_no_more, 2 * GRACE)  # Lightning kills the leader where it sees this process end first
    return 2


@contextmanager
def together() -> Iterator[None]:
    """End this process when another of its run refuses something, or when the one that started it is gone.

    A process waiting for others in a collective operation hears of neither by itself, or after many minutes.
    """
    if not follows():
        name = f"cdm-{os.getpid()}-{secrets.token_hex(8)}"
        os.environ |= {LEADER: str(os.getpid()), WORD: str(Path(tempfile.gettempdir()) / name)}
    over, others = threading.Event(), set(active_children())
    threading.Thread(target=watch, args=(over,), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        for reader in set(active_children()) - others:  # Python waits at its exit for those that are left
            with suppress(RuntimeError):  # torch says that it was killed
                reader.kill()
                reader.join()
        if not follows():
            with suppress(OSError):
                Path(os.environ[WORD]).unlink()
            for name in (LEADER, WORD):
                os.environ.pop(name)


def watch(over: threading.Event) -> None:
    while not over.wait(0.5):
        if another_refused():
            # A leader that is gone may have ended as it should, and this process have something left to do.
            if not over.wait(10 * GRACE if follows() and led_no_more() else GRACE):
                os._exit(2)
            return


def follows() -> bool:
    """Whether this is a process that Lightning started beside the first one of a run."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and LEADER in os.environ


def led_no_more() -> bool:
    return str(os.getppid()) != os.environ[LEADER]


def leave_word() -> bool:
    """Tell the other processes that this one has refused something; False where another was first."""
    try:
        os.close(os.open(os.environ[WORD], os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    except (KeyError, OSError):
        return True  # there is nobody to tell
    global mine
    mine = os.environ[WORD]
    return True


mine = ""  # the word this process has left itself


def another_refused(patience: float = 0) -> bool:
    """Whether another process of the run has refused something, or is gone; waits for that up to `patience` seconds."""
    word = os.environ.get(WORD, "")
    return wait_for(lambda: (word != mine and os.path.exists(word)) or (follows() and led_no_more()), patience)


def broken_off() -> bool:
    """Whether an error of this process is only the echo of what another one refused: a connection that closed."""
    return torch.distributed.is_initialized() and another_refused(GRACE)


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(0.05)
    return True
