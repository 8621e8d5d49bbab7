"""Printing to the terminal: tables that never cut a name, and a filter for the messages of libraries."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FILE_WIDTH = 1000  # columns of a file or a pipe; a table takes only what it needs
HARMLESS_WARNINGS = (  # warnings of libraries about each other, or about something that is intended here
    ".*`IterableDataset` has `__len__` defined.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*there is no last checkpoint available.*",
    ".*does not have many workers.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*predict returned None if it was on purpose.*",
    ".*Couldn't infer the batch indices.*",
    ".*(Kernel Inception Distance|InceptionScore). will save all extracted features.*",
    ".*__array__ implementation doesn't accept a copy keyword.*",
    ".*is smaller than the logging interval.*",
    ".*loading a checkpoint outside the 'fit' stage.*",
)
# Lightning modules whose info messages are not shown: they list its settings, or repeat what a command prints first.
SILENCED_MODULES = (
    *("setup", "seed", "trainer", "fit_loop", "cuda", "distributed"),
    *("accelerator_connector", "callback_connector", "checkpoint_connector", "logger_connector"),
    "weight_averaging",
)
FILTERED_LOGGERS = (  # the loggers that those modules write to
    *("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"),
    *("lightning.fabric.utilities.seed", "lightning.fabric.utilities.distributed"),
    *("lightning.pytorch.accelerators.cuda", "lightning.pytorch.trainer.connectors.checkpoint_connector"),
)


def table_console() -> Console:
    """A console for tables: as wide as the terminal; in a file or a pipe so wide that nothing is cut or wrapped.

    rich assumes 80 columns for a file or a pipe, and shortens names to fit.
    """
    from rich.console import Console

    console = Console(markup=False)  # a [bracket] in a name or value is text
    return console if console.is_terminal else Console(width=FILE_WIDTH, markup=False)


def folding_table(*headings: str) -> Table:
    """A table that folds long cells in a narrow terminal; rich would cut them."""
    from rich.table import Column, Table

    return Table(*(Column(heading, overflow="fold") for heading in headings))


def quiet_libraries() -> None:
    """Hide the warnings and info messages of libraries that tell the user nothing."""
    for message in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in FILTERED_LOGGERS:
        logging.getLogger(name).addFilter(is_shown)


def is_shown(record: logging.LogRecord) -> bool:
    """Whether a log record is printed: everything but info messages of SILENCED_MODULES."""
    return record.levelno > logging.INFO or record.module not in SILENCED_MODULES


def printable(name: str) -> str:
    """A name from outside, such as a file's, as it may be printed: control characters and odd bytes are escaped."""
    return name if name.isprintable() else name.encode("unicode_escape").decode()
