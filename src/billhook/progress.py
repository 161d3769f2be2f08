"""Progress bars, on stderr, for people only."""

from __future__ import annotations

from collections.abc import Iterator
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

_enabled = False


def enable(on: bool) -> None:
    """Show bars from now on, or not (the default for the library; the command line turns them on)."""
    global _enabled
    _enabled = on


class Bar(Protocol):
    def __call__(self, note: str = "", *, advance: int = 1) -> None: ...


@contextmanager
def bar(label: str, total: int) -> Iterator[Bar]:
    """A bar of `total` steps; call what it yields once per step."""
    if not _enabled:
        yield lambda note="", *, advance=1: None
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=False) as progress:
        task = progress.add_task(label, total=total, note="")

        def step(note: str = "", *, advance: int = 1) -> None:
            progress.update(task, advance=advance, note=note)

        yield step
