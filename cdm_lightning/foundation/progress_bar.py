"""Progress of long work: tqdm's bar on a terminal, and now and then a printed line in a file or a pipe."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

LINE_FORMAT = "{desc}: {percentage:.0f}%, {n_fmt} of {total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
SHORTEST_PAUSE = 30.0  # seconds between two lines, at least
LONGEST_PAUSE = 600.0  # seconds after which a line is printed before a tenth of the work is done


class ProgressBar(tqdm):
    """tqdm's bar on a terminal. In a file or a pipe it prints lines instead.

    A line is printed for every tenth of the work, but at most two a minute and at least one every ten minutes, and at
    the end. On a terminal there is one bar at a time: a bar inside another one is a count behind the outer bar. In a
    file it prints a last line only if it has printed one before.

    Args:
        status: Returns the text after the counts; called each time the bar is shown.
        line_format: tqdm's bar_format for a printed line.
        kwargs: Further arguments of tqdm.
    """

    def __init__(
        self,
        *args: Any,
        status: Callable[[], str] | None = None,
        line_format: str = LINE_FORMAT,
        file: Any = None,
        **kwargs: Any,
    ) -> None:
        self.status, self.stream = status, sys.stderr if file is None else file
        self.prints_lines, self.has_printed = not self.stream.isatty(), False
        self.last_time, self.last_count = time.monotonic(), kwargs.get("initial", 0)  # of the last line
        if self.prints_lines:
            kwargs["bar_format"] = line_format
        open_bars = [bar for bar in tqdm._instances if isinstance(bar, ProgressBar) and getattr(bar, "pos", 1) == 0]
        self.outer = next((bar for bar in open_bars if bar is not self), None)
        super().__init__(*args, **{"leave": None, **kwargs}, file=io.StringIO() if self.prints_lines else self.stream)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
        """Draw the bar, count behind the outer bar, or print a line if one is due."""
        if not self.prints_lines and self.outer is not None:
            count = f"{self.n:,}" if self.total is None else f"{self.n:,} of {self.total:,}"
            self.outer.set_postfix_str("" if msg == "" else f"{self.desc} {count}")  # "" when this bar closes
            return True
        if not self.prints_lines:
            self.update_status()
            return super().display(msg, pos)
        pause, advance = time.monotonic() - self.last_time, self.n - self.last_count
        is_tenth = advance >= (self.total or 0) / 10
        if advance and (pause >= LONGEST_PAUSE or (is_tenth and pause >= SHORTEST_PAUSE)):
            self.print_line()
        return True

    def update_status(self) -> None:
        if self.status is not None:
            self.set_postfix_str(self.status(), refresh=False)

    def print_line(self) -> None:
        self.update_status()
        self.last_time, self.last_count, self.has_printed = time.monotonic(), self.n, True
        print(str(self), file=self.stream, flush=True)

    def close(self) -> None:
        if not self.disable and self.prints_lines and self.n != self.last_count:
            is_outermost = self.pos == 0 if self.leave is None else self.leave
            if is_outermost or self.has_printed:
                self.print_line()
        super().close()
