"""What the commands print: one stream for people, with progress and time left."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_console = Console(stderr=True, soft_wrap=True, highlight=False)


def say(text: str) -> None:
    """One line for people, on stderr."""
    _console.print(text, markup=False)


def out(text: str) -> None:
    """One line of result, on stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def figures(values: Mapping[str, float]) -> str:
    """``name value`` pairs on a line."""
    parts = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    return "  ".join(parts)


class Update(Protocol):
    """Sets how much is done, with a note."""

    def __call__(self, done: int, note: str = "") -> None: ...


@contextmanager
def progress(name: str, total: int, completed: int = 0) -> Iterator[Update]:
    """A progress bar with time left. Yields ``update(completed, note)``."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=_console, disable=not _console.is_terminal) as bar:
        task = bar.add_task(name, total=total, completed=completed, note="")
        begin, said = time.monotonic(), completed * 10 // max(total, 1)

        def update(done: int, note: str = "") -> None:
            nonlocal said
            bar.update(task, completed=done, note=note)
            tenth = done * 10 // max(total, 1)
            if not _console.is_terminal and tenth > said:  # a log gets a line at each tenth
                said = tenth
                left = (time.monotonic() - begin) / max(done - completed, 1) * (total - done)
                say(f"{name}: {done} of {total}, {left:.0f} s left  {note}")

        yield update
