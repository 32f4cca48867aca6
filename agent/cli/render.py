"""Numbers, tables and progress, as people read them. Nothing here decides anything."""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: int) -> str:
    """`1.4 GiB`: three digits at most, and whole bytes below a KiB."""
    value, unit = float(count), 0
    while value >= 1023.95 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{count} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be, as kubectl prints them; the last one is never cut."""
    lines = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def error_text(event: Mapping[str, Any]) -> str:
    """An `error` event for stderr: what happened, then what to do."""
    text = f"{_red('error')}: {event['message']} ({event['reason']})"
    return f"{text}\n  {event['advice']}" if event.get("advice") else text


def _red(text: str) -> str:
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    return f"\033[31m{text}\033[0m" if colour else text


class Bar:
    """A live bar on stderr; silent where stderr is not a terminal."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def show(self, event: Mapping[str, Any]) -> None:
        """One `progress` event."""
        self._progress.update(
            self._task,
            description=event["stage"],
            total=event["total_bytes"],
            completed=event["done_bytes"],
        )


@contextmanager
def bar() -> Iterator[Bar]:
    """Rate and time left are those of the last seconds, not of a resume's first jump."""
    console = Console(stderr=True, no_color=bool(os.environ.get("NO_COLOR")) or None)
    progress = Progress(
        TextColumn("{task.description:>9}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not sys.stderr.isatty(),  # FORCE_COLOR makes a terminal of a log, for rich
    )
    with progress:
        yield Bar(progress, progress.add_task("waiting", total=None))
