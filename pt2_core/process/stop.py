"""How a command is stopped from outside: SIGINT, SIGTERM and SIGHUP all unwind it in the same way.

The first signal raises :class:`Stopped` in the main thread, so that every ``finally`` runs:
children are ended, temporary files go. Those that follow are ignored while that is under way.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
# A clean-up that takes longer than this is taken to hang: the next signal breaks into it.
CLEAN_UP_SECONDS = 15.0


class Stopped(KeyboardInterrupt):
    """A signal asked the command to end; ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class _State:
    began: float | None = None  # when the clean-up began
    pending: int | None = None  # a signal that came while signals were held
    held = 0  # depth of held()
    at_exit = False


def exit_code(number: int) -> int:
    """What a shell reports of a program that a signal ended: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + number


def signal_of(error: BaseException) -> int | None:
    """The signal behind an exception, or None.

    What was raised while the clean-up ran (a terminal that is gone, a child that was ended) counts
    as the signal that began it.
    """
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        if isinstance(at, KeyboardInterrupt):
            return at.number if isinstance(at, Stopped) else int(signal.SIGINT)
        at = at.__cause__ or at.__context__
    return None


@contextmanager
def signals_stop() -> Iterator[None]:
    """While inside, the signals raise :class:`Stopped`. One that is ignored (nohup) stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, and it has them
        return
    _State.began = _State.pending = None
    before = {n: signal.getsignal(n) for n in SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, _raise)
    if not _State.at_exit:
        _State.at_exit = True
        atexit.register(_ignore_all)
    try:
        yield
    finally:
        for number, handler in before.items():
            with suppress(TypeError):  # a handler that Python did not set
                signal.signal(number, handler)


@contextmanager
def held() -> Iterator[None]:
    """Put off the signals: what is made inside is known to who must undo it before one is raised.

    ::

        thing = None
        try:
            with held():
                thing = make()
            ...
        finally:
            if thing is not None: undo(thing)
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are raised in the main thread only
        return
    _State.held += 1
    try:
        yield
    finally:
        _State.held -= 1
        if not _State.held and _State.pending is not None:
            number, _State.pending = _State.pending, None
            raise Stopped(number)


def until_run_cli(name: str) -> None:
    """Until :func:`pt2_core.cli.run_cli` takes over, a signal ends the program with its line.

    For programs that import torch before they have parsed their arguments: there is nothing to
    clean up yet, and an exception in the midst of an import would be shown at length.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        with suppress(OSError, ValueError):
            os.write(2, f"{name}: {words(number)}\n".encode())
        os._exit(exit_code(number))

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, leave)


def words(number: int) -> str:
    """What is said of a signal: ``interrupted by SIGTERM (exit code 143)``."""
    return f"interrupted by {signal.Signals(number).name} (exit code {exit_code(number)})"


def _raise(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _State.began is not None and now - _State.began < CLEAN_UP_SECONDS:
        return
    _State.began = now
    if _State.held:
        _State.pending = number
        return
    raise Stopped(number)


def _ignore_all() -> None:
    """While the interpreter shuts down there is nothing left to stop."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def give_up_output() -> None:
    """Send nowhere what is still buffered for a closed or full stdout, for a quiet exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)
