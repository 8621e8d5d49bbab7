"""Progress of long work: a bar on a terminal, and whole lines now and then where output is none."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

LINE = "{desc}: {percentage:.0f}%, {n_fmt} of {total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
BETWEEN = (30.0, 600.0)  # seconds between two lines: at least, and at most where a tenth of the way takes longer


class ProgressBar(tqdm):
    """tqdm's bar; in a file or a pipe a line every tenth of the way, no more than two a minute, and the last one.

    A bar within another goes when it is full, and prints no line if it was quick.

    Args:
        words: What follows the counts, asked for when they are shown.
        line: Format of a line.
        kwargs: What tqdm takes.
    """

    def __init__(
        self, *args: Any, words: Callable[[], str] | None = None, line: str = LINE, file: Any = None, **kwargs: Any
    ) -> None:
        self.words, self.stream = words, sys.stderr if file is None else file
        self.in_lines, self.printed = not self.stream.isatty(), False
        self.last_line = time.monotonic(), kwargs.get("initial", 0)  # when, and what was done
        if self.in_lines:
            kwargs["bar_format"] = line
        super().__init__(*args, **{"leave": None, **kwargs}, file=io.StringIO() if self.in_lines else self.stream)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
        if not self.in_lines:
            self.ask()
            return super().display(msg, pos)
        waited, went = time.monotonic() - self.last_line[0], self.n - self.last_line[1]
        far = went >= (self.total or 0) / 10
        if went and (waited >= BETWEEN[1] or (far and waited >= BETWEEN[0])):
            self.print_line()
        return True

    def ask(self) -> None:
        if self.words is not None:
            self.set_postfix_str(self.words(), refresh=False)

    def print_line(self) -> None:
        self.ask()
        self.last_line, self.printed = (time.monotonic(), self.n), True
        print(str(self), file=self.stream, flush=True)

    def close(self) -> None:
        if not self.disable and self.in_lines and self.n != self.last_line[1]:
            stays = self.pos == 0 if self.leave is None else self.leave
            if stays or self.printed:
                self.print_line()
        super().close()
