"""The processes of one run: which is the first, waiting for all, and ending together when one of them refuses.

Bad input is one sentence and exit code 2 from every process, whatever the others are waiting for. Nothing heavy is
imported here: every command passes through this file, with or without torch.
"""

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
from typing import Any

from cdm_lightning.foundation.errors import InputError, sentence_of

LEADER = "CDM_LEADER"  # the process id of the first process, in the environment of those that it starts
REFUSAL = "CDM_REFUSAL"  # the file whose existence says that a process of the run has refused something
GRACE = 3.0  # seconds for a process to end by itself when another has refused
refused_here = ""  # the refusal file where this process itself wrote it


def distributed() -> Any:
    """torch.distributed where processes are connected, else None; torch is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch.distributed if torch is not None and torch.distributed.is_initialized() else None


def first_process() -> bool:
    """Whether this process is the one that writes and prints; Lightning sets the rank when processes start."""
    lightning = sys.modules.get("lightning.pytorch.utilities")
    return lightning is None or not getattr(lightning.rank_zero_only, "rank", 0)


def wait_for_all() -> None:
    """Wait for the other processes, where there are any; refuses to wait for one that died."""
    if (connection := distributed()) is None:
        return
    try:
        connection.barrier()
    except RuntimeError as error:  # a connection that closed, in the words of gloo
        raise InputError(
            "another process of this run ended before its time: what is written stays, and the same command goes on"
        ) from error


def exit_with_sentence(error: Exception) -> int:
    """Print the sentence of an error and give the exit code.

    The first process of a run to refuse is the one that prints; the others end silently.
    """
    if claim_refusal():
        print(f"cdm: error: {sentence_of(error)}", file=sys.stderr, flush=True)
    if is_follower():
        wait_until(leader_is_gone, 2 * GRACE)  # Lightning kills the leader where it sees this process end first
    return 2


@contextmanager
def ending_together() -> Iterator[None]:
    """End this process when another of its run refuses something, or when the one that started it is gone.

    A process that waits for others in a collective operation hears of neither by itself, or after many minutes.
    """
    if not is_follower():
        name = f"cdm-{os.getpid()}-{secrets.token_hex(8)}"
        os.environ |= {LEADER: str(os.getpid()), REFUSAL: str(Path(tempfile.gettempdir()) / name)}
    over, others = threading.Event(), set(active_children())
    threading.Thread(target=watch, args=(over,), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        for reader in set(active_children()) - others:  # Python waits at its exit for those that are left
            with suppress(RuntimeError):  # torch reports that it was killed
                reader.kill()
                reader.join()
        if not is_follower():
            with suppress(OSError):
                Path(os.environ[REFUSAL]).unlink()
            for name in (LEADER, REFUSAL):
                os.environ.pop(name)


def watch(over: threading.Event) -> None:
    """Twice a second until `over`: exit if another process of the run has refused, after some time to end by itself."""
    while not over.wait(0.5):
        if another_refused():
            # A leader that is gone may have ended as it should, and this process have something left to do.
            if not over.wait(10 * GRACE if is_follower() and leader_is_gone() else GRACE):
                os._exit(2)
            return


def is_follower() -> bool:
    """Whether this is a process that Lightning started beside the first one of a run."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and LEADER in os.environ


def leader_is_gone() -> bool:
    return str(os.getppid()) != os.environ[LEADER]


def claim_refusal() -> bool:
    """Tell the other processes that this one has refused something; False where another was first."""
    global refused_here
    try:
        os.close(os.open(os.environ[REFUSAL], os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    except (KeyError, OSError):
        return True  # there is nobody to tell
    refused_here = os.environ[REFUSAL]
    return True


def another_refused(patience: float = 0) -> bool:
    """Whether another process of the run has refused something, or is gone; waits for that up to `patience` seconds."""
    file = os.environ.get(REFUSAL, "")
    return wait_until(
        lambda: (file != refused_here and os.path.exists(file)) or (is_follower() and leader_is_gone()), patience
    )


def follows_a_refusal() -> bool:
    """Whether an error of this process only follows from what another one refused: a connection that closed."""
    return distributed() is not None and another_refused(GRACE)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition came true within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(0.05)
    return True
