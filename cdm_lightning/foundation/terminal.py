"""The terminal: tables whose names stay whole, and libraries kept from talking about themselves."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDE = 1000  # columns; a table takes what it needs of them
HARMLESS = (  # warnings of libraries about each other, or about what is so on purpose
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
# Modules of Lightning whose notes are about its own settings, or are said better by the first lines of a command.
CHATTER = (
    *("setup", "seed", "trainer", "fit_loop", "cuda", "distributed"),
    *("accelerator_connector", "callback_connector", "checkpoint_connector", "logger_connector"),
    "weight_averaging",
)
NOTES = (  # where Lightning logs them
    *("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"),
    *("lightning.fabric.utilities.seed", "lightning.fabric.utilities.distributed"),
    *("lightning.pytorch.accelerators.cuda", "lightning.pytorch.trainer.connectors.checkpoint_connector"),
)


def whole_console() -> Console:
    """A console for tables: as wide as its terminal, and where output is none, wide enough to cut and wrap nothing.

    rich takes 80 columns for a file or a pipe, and shortens names to fit.
    """
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=WIDE)


def whole_table(*heads: str) -> Table:
    """A table that folds what does not fit into a narrow terminal, where rich would cut it."""
    from rich.table import Column, Table

    return Table(*(Column(head, overflow="fold") for head in heads))


def quiet_libraries() -> None:
    """Leave out what libraries print about themselves and each other."""
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message=message)
    for name in NOTES:
        logging.getLogger(name).addFilter(of_interest)


def of_interest(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO or record.module not in CHATTER
