"""Progress and messages: a live bar on a terminal, sparse plain lines elsewhere (logs, CI)."""

from __future__ import annotations

import time
from types import TracebackType

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from quantize.words import screen

PLAIN_INTERVAL_S = 20.0

console = screen(stderr=True)


def say(text: str) -> None:
    """One line for the user, on stderr, so that stdout stays free for results."""
    console.print(text, markup=False, soft_wrap=True)


class Bar:
    """A progress bar over a known or unknown total.

    Args:
        title: what is being done.
        total: in ``unit``, or None when it is not known beforehand.
        unit: "bytes" shows sizes, anything else counts.
    """

    def __init__(self, title: str, total: int | None, unit: str = "steps") -> None:
        self.title, self.total, self.unit = title, total, unit
        self.start = self.last_line = time.monotonic()
        self.live: Progress | None = None
        if console.is_terminal:
            amount: ProgressColumn = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
            self.live = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                amount,
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self.task = self.live.add_task(title, total=total)

    def __enter__(self) -> Bar:
        if self.live:
            self.live.start()
        else:
            say(f"{self.title} ...")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self.live:
            self.live.stop()
        if kind is None:
            say(f"{self.title}: done in {time.monotonic() - self.start:.1f} s")

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """Set how much is done; ``total`` may correct the total, ``note`` follows the title."""
        self.total = total if total is not None else self.total
        if self.live:
            text = f"{self.title} {note}".strip()
            self.live.update(self.task, completed=done, total=self.total, description=text)
        elif time.monotonic() - self.last_line >= PLAIN_INTERVAL_S:
            self.last_line = time.monotonic()
            of = f"/{self.total}" if self.total else ""
            say(f"  {self.title}: {done}{of} {self.unit}, {self.last_line - self.start:.0f} s")
