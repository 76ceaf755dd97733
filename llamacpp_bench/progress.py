"""Progress on stderr: a bar for what is counted, a line for what is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from quantize.words import screen


class Display:
    """Shows what is going on; `quiet` shows nothing but warnings."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = screen(stderr=True, soft_wrap=True)

    def say(self, text: str) -> None:
        """One line about a step."""
        if not self.quiet:
            self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """One line that is shown in any case."""
        self.console.print(f"warning: {text}", style="yellow", markup=False)

    @contextmanager
    def bar(self, label: str, total: float) -> Iterator[Callable[..., None]]:
        """A bar over `total` units; call what is yielded as ``step(units, label=None)``."""
        if self.quiet:
            yield lambda units=1, label=None: None
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(label, total=total)

            def step(units: float = 1, label: str | None = None) -> None:
                if label is not None:
                    progress.update(task, description=label)
                progress.advance(task, units)

            yield step
