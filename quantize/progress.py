"""How a run tells what it is doing: nothing by default, a rich progress bar on a terminal."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from quantize.words import screen


class Reporter:
    """What the pipeline calls. This one only keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def start(self, title: str, steps: int) -> None:
        """A new phase of ``steps`` steps begins."""

    def step(self, text: str = "", amount: float = 1.0) -> None:
        """``amount`` steps are done; ``text``, if given, is what is being done now."""

    def done(self) -> None:
        """The phase is over."""

    def warn(self, message: str) -> None:
        """Something worth knowing that does not stop the run."""
        self.warnings.append(message)

    def note(self, message: str) -> None:
        """A line of information."""


class RichReporter(Reporter):
    """A progress bar on stderr; lines in a log where stderr is no terminal."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or screen(file=sys.stderr)
        self._progress: Progress | None = None
        self._task: Any = None

    def start(self, title: str, steps: int) -> None:
        self.done()
        if not self.console.is_terminal:
            self.console.print(title)
            return
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            console=self.console,
            transient=True,
        )
        self._progress.start()
        self._task = self._progress.add_task(title, total=steps, text="")

    def step(self, text: str = "", amount: float = 1.0) -> None:
        if self._progress is not None:
            self._progress.advance(self._task, amount)
            if text:
                self._progress.update(self._task, text=text)

    def done(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def warn(self, message: str) -> None:
        super().warn(message)
        line = Text.assemble(("warning:", "yellow"), f" {message}")
        self.console.print(line, soft_wrap=True)

    def note(self, message: str) -> None:
        self.console.print(message)
