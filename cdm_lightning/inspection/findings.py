"""What is said about one thing: a title, lines, a table, and the damage that was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cdm_lightning.data.shards import Folder
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.terminal import folding_table, printable, table_console

SHOWN = 8  # names in a line


@dataclass
class Findings:
    """What a path holds. damage: a sentence per damaged file or image. pictures: folders of shards, to draw from."""

    kind: str
    headings: Sequence[str] = ()
    rows: list[Sequence[str]] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)
    pictures: list[Folder] = field(default_factory=list)
    unfinished: bool = False

    def note(self, **facts: Any) -> None:
        """Add the facts that are known: None and "" are not."""
        self.facts |= {name.replace("_", " "): str(value) for name, value in facts.items() if value not in (None, "")}

    def try_to(self, read: Callable[..., Any], *arguments: Any) -> Any:
        """The result of `read` of the arguments; if it refuses, its sentence is damage and the result None."""
        try:
            return read(*arguments)
        except InputError as error:
            self.damage.append(str(error))
            return None

    def print(self, path: str) -> None:
        """Print the title, the table and the lines, with control characters escaped."""
        console = table_console()
        console.print(f"{printable(path)}: {printable(self.kind)}", highlight=False)
        if self.rows:
            table = folding_table(*self.headings)
            for row in self.rows:
                table.add_row(*map(printable, row))
            console.print(table)
        width = max(map(len, self.facts), default=0)
        for name, text in self.facts.items():
            console.print(f"{printable(name):{width}s}  {printable(text)}", highlight=False, soft_wrap=True)


def size_of(number: int) -> str:
    """Bytes with a unit, such as 7.5 MB."""
    size = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def written(path: Path) -> str:
    """When a file was last written, in UTC."""
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")


def some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def about_classes(names: Sequence[str] | None, counts: Sequence[int] | None = None) -> str:
    """Number and names of classes, and their images each."""
    if not names:
        return "none"
    each = ""
    if counts:
        low, high = min(counts), max(counts)
        each = f"; {low:,} images each" if low == high else f"; {low:,} to {high:,} images each"
    return f"{len(names)}: {some(names)}{each}"


def settings(table: dict[str, Any]) -> str:
    """A table of settings in one line, without what is null."""
    return ", ".join(f"{name} {value}" for name, value in table.items() if value is not None)
