"""How a run says what it is doing: a bar on a terminal, plain lines in a log, or nothing.

    with open_reporter(args.quiet) as reporter:
        reporter.start("ternarising", total=48)
        reporter.step("block 3/12  q k v")

Everything goes to stderr, so that stdout stays free for results. The time left is the time so far
times what is to be done over what has been done, in the bar and in the lines alike.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TextIO

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from pt2_core.words import screen

# Between two plain lines that only differ in how much is done, unless that is a twentieth.
SAME_TEXT_S = 15.0
BAR_WIDTH, LEAST_BAR = 24, 8
_SEPARATOR = "  "


def clock(seconds: float | None) -> str:
    """``43.2 -> '0:43'``, ``3725 -> '1:02:05'``, ``None`` (not known) ``-> '-:--'``."""
    if seconds is None:
        return "-:--"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@dataclass
class Phase:
    """One phase of a run, and how far it is.

    Attributes:
        title: what is being done.
        total: steps; None where they are not known beforehand.
        unit: what the steps are, to show ``done/total unit``; "bytes" shows megabytes, and None
            shows no count (the text then says where the run is).
        every: seconds between two plain lines, at least.
        began, moved: when the phase began and when its last step was done, of the monotonic clock.
        done: steps that are done; text: what is being done now.
    """

    title: str
    total: float | None
    unit: str | None = None
    every: float = 1.0
    began: float = 0.0
    moved: float = 0.0
    done: float = 0.0
    text: str = ""

    def left(self, now: float) -> float | None:
        """Seconds that the rest will take, None while nothing is known of it."""
        if not self.total or self.done <= 0:
            return None
        rest = max(0.0, self.total - self.done) / self.done
        return max(0.0, (self.moved - self.began) * rest - (now - self.moved))

    def description(self) -> str:
        """What is being done, and where in it the run is."""
        return _SEPARATOR.join(p for p in (self.title, self.text) if p)

    def figures(self, now: float) -> str:
        """How much is done, the time so far and the time left."""
        parts = [] if self.unit is None else [self._count()]
        if self.total:
            parts.append(f"{min(100, int(100 * self.done / self.total + 1e-6))}%")
        parts.append(f"elapsed {clock(now - self.began)}")
        if self.total:
            parts.append(f"left {clock(self.left(now))}")
        return _SEPARATOR.join(parts)

    def _count(self) -> str:
        scale, unit = (1e6, "MB") if self.unit == "bytes" else (1, self.unit or "")
        shown = [f"{v / scale:.0f}" for v in (self.done, self.total) if v is not None]
        return f"{'/'.join(shown)} {unit}".rstrip()


def bar_line(phase: Phase, now: float, width: int, full: str = "━", empty: str = "─") -> str:
    """The line of a terminal: description, bar, figures, at most ``width`` columns wide.

    Where it is too long the bar shrinks first, then the description; the figures are never cut
    (below some 30 columns, where nothing else is left, only the times are shown).
    """
    figures = phase.figures(now)
    if cell_len(figures) > width:
        figures = f"{clock(now - phase.began)} {clock(phase.left(now))}"
    room = width - cell_len(figures) - len(_SEPARATOR)
    text = _one_line(phase.description())
    bar = min(BAR_WIDTH, max(LEAST_BAR, room - cell_len(text) - len(_SEPARATOR)))
    if not phase.total or room < 2 * LEAST_BAR + len(_SEPARATOR):
        bar = 0
    if bar:
        filled = min(bar, int(bar * phase.done / (phase.total or 1)))
        figures = full * filled + empty * (bar - filled) + _SEPARATOR + figures
        room -= bar + len(_SEPARATOR)
    if cell_len(text) > room:
        text = set_cell_size(text, room - 1) + "…" if room > 1 else ""
    return f"{text}{_SEPARATOR}{figures}" if text else figures


def plain_line(phase: Phase, now: float) -> str:
    """The line of a log, of any length."""
    return _one_line(f"{phase.description()}{_SEPARATOR}{phase.figures(now)}")


def _one_line(text: str) -> str:
    """Without line breaks and control characters: file names may hold them."""
    return "".join(c if c.isprintable() else "?" for c in text)


class Reporter:
    """What the work calls. This one is silent: it only keeps the warnings.

    Attributes:
        warnings: what :meth:`warn` was told, in its order.
    """

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self._phase: Phase | None = None
        self._stage: str | None = None

    def start(
        self, title: str, total: float | None = None, unit: str | None = None, every: float = 1.0
    ) -> None:
        """A new phase begins; one that was open is over. For the arguments see :class:`Phase`."""
        self.done()
        now = time.monotonic()
        self._phase = Phase(title, total, unit, every, now, now)
        self._began(self._phase)

    def step(self, text: str = "", amount: float = 1.0) -> None:
        """``amount`` more steps are done; ``text``, if given, is what is being done."""
        if self._phase is not None:
            self.reach(self._phase.done + amount, text)

    def reach(self, done: float, text: str = "", total: float | None = None) -> None:
        """``done`` steps are done in all; ``total``, if given, corrects their number."""
        phase = self._phase
        if phase is None:
            return
        if done != phase.done:
            phase.moved = time.monotonic()
        phase.done, phase.text = done, text or phase.text
        phase.total = phase.total if total is None else total
        self._moved(phase)

    def done(self, failed: bool = False) -> None:
        """The phase is over, or has failed."""
        phase, self._phase = self._phase, None
        if phase is not None:
            self._ended(phase, failed)

    @contextmanager
    def phase(
        self, title: str, total: float | None = None, unit: str | None = None, every: float = 1.0
    ) -> Iterator[Reporter]:
        """A phase that is over at the end of the block."""
        self.start(title, total, unit, every)
        try:
            yield self
        except BaseException:
            self.done(failed=True)
            raise
        self.done()

    def stage(self, title: str, done: int, total: int) -> None:
        """A phase by its title alone: it begins when the title changes, and ends when all is done.

        This is the callback ``progress(stage, done, total)`` of :func:`export.export_gguf`.
        """
        if title != self._stage:
            self.start(title, total, unit="")
            self._stage = title
        self.reach(done, total=total)
        if done >= total:
            self.done()

    def warn(self, message: str) -> None:
        """Something worth knowing that does not stop the run."""
        self.warnings.append(message)

    def note(self, message: str) -> None:
        """A line of information."""

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.done(failed=kind is not None)

    def _began(self, phase: Phase) -> None: ...

    def _moved(self, phase: Phase) -> None: ...

    def _ended(self, phase: Phase, failed: bool) -> None: ...


class QuietReporter(Reporter):
    """Shows the warnings and nothing else."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream

    def warn(self, message: str) -> None:
        super().warn(message)
        self._print(f"warning: {message}")

    def _print(self, line: str) -> None:
        """One line, without markup, wrapping or escape codes, and at once."""
        print(line, file=self._stream or sys.stderr, flush=True)


class LineReporter(QuietReporter):
    """Plain lines, for a log or a pipe: one when a phase begins, one for every step that says
    something new (one a second at most), and one when it is over."""

    def _began(self, phase: Phase) -> None:
        self._printed, self._text, self._done = phase.began - phase.every, "", 0.0
        self._lines = 0
        self._print(f"{_one_line(phase.title)} ...")

    def _moved(self, phase: Phase) -> None:
        now = time.monotonic()
        far = phase.total is not None and phase.done - self._done >= phase.total / 20
        news = phase.text != self._text or far
        if now - self._printed >= (phase.every if news else max(phase.every, SAME_TEXT_S)):
            self._print(plain_line(phase, now))
            self._printed, self._text, self._done = now, phase.text, phase.done
            self._lines += 1

    def _ended(self, phase: Phase, failed: bool) -> None:
        spent = time.monotonic() - phase.began
        if not failed and spent >= 1:
            self._print(f"{_one_line(phase.title)}  done  elapsed {clock(spent)}")

    def note(self, message: str) -> None:
        self._print(message)


class TerminalReporter(QuietReporter):
    """A live bar that goes when its phase is over; warnings and notes stay above it."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self._live: Live | None = None

    def _began(self, phase: Phase) -> None:
        self._live = Live(_Bar(phase), console=self.console, transient=True, refresh_per_second=4)
        self._live.start()

    def _ended(self, phase: Phase, failed: bool) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, message: str) -> None:
        self._print(message)

    def _print(self, line: str) -> None:
        style = "yellow" if line.startswith("warning: ") else None
        # Names may hold [b] or :smile:, and are shown as they are.
        self.console.print(
            line, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True
        )


class _Bar:
    """The line of a phase, laid out anew for the terminal's width each time it is drawn."""

    def __init__(self, phase: Phase) -> None:
        self.phase = phase

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        signs = ("#", "-") if options.ascii_only else ("━", "─")
        line = bar_line(self.phase, time.monotonic(), options.max_width, *signs)
        yield Text(line, no_wrap=True, overflow="crop")


def open_reporter(quiet: bool = False) -> Reporter:
    """The reporter that fits stderr: a bar on a terminal, plain lines elsewhere.

    Args:
        quiet: nothing but warnings.
    """
    if quiet:
        return QuietReporter()
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return TerminalReporter(screen(stderr=True, force_terminal=True))
    return LineReporter()


def say(message: str) -> None:
    """One line for the user on stderr, whatever it is connected to."""
    print(message, file=sys.stderr, flush=True)
