"""The guard of every command: options, exit codes, and one line for what a user can mend."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from pt2_core import words
from pt2_core.errors import PT2Error, reason
from pt2_core.process import memory, stop

EXIT_ERROR = 2
THREADS_PER_CPU, LEAST_THREADS = 4, 32


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but a wrong option gives one line, not the whole usage, and nothing is guessed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def check_threads(threads: int | None, option: str = "--threads") -> None:
    """Refuse a number of threads that is below 0 or far beyond the CPUs.

    Thousands of them take minutes to start, or end the process in the library that starts them.

    Raises:
        PT2Error: too many, or negative.
    """
    most = max(LEAST_THREADS, THREADS_PER_CPU * (os.cpu_count() or 1))
    if threads is not None and not 0 <= threads <= most:
        raise PT2Error(
            f"{option} {threads}: this machine has {os.cpu_count()} CPUs; give 0 to {most}"
        )


_command: list[str] = []  # the names of the commands that run, the innermost last


def command_name() -> str | None:
    """The command that runs in this process, as the user calls it; None in a library's use."""
    return _command[-1] if _command else None


def tell(message: str) -> None:
    """One line on stderr, if there is one to write to."""
    # Blanks inside of it stay, for it may hold a command with a quoted path.
    line = " ".join(part.strip() for part in message.splitlines() if part.strip())
    with suppress(OSError, ValueError):
        print(f"{command_name() or 'pt2'}: {line}", file=sys.stderr, flush=True)


def run_cli(
    name: str,
    body: Callable[[], int | None],
    *,
    lower: str = "",
    resume: Callable[[], str | None] | None = None,
) -> int:
    """Run a command's body; turn what a user can mend into one line on stderr and an exit code.

    Exit codes: 2 for what the user can mend, 130, 143 and 129 for SIGINT, SIGTERM and SIGHUP, all
    of which unwind the body (:mod:`pt2_core.process.stop`).
    ``PT2_DEBUG=1`` in the environment shows the traceback as well.

    Args:
        lower: the options to lower when memory runs out, such as ``--batch-size or --samples``.
        resume: gives the command that takes a stopped run up again, None where nothing is kept.
    """
    words.make_printable()
    _command.append(name)
    try:
        with stop.signals_stop():
            try:
                code = body() or 0
                _finish_output()
                return code
            except BrokenPipeError:
                stop.give_up_output()  # the reader of our output has left, as head does
                return stop.exit_code(signal.SIGPIPE) if hasattr(signal, "SIGPIPE") else EXIT_ERROR
            except (Exception, KeyboardInterrupt) as e:
                if (number := stop.signal_of(e)) is not None:
                    tell(_stopped(number, resume))
                    stop.give_up_output()
                    return stop.exit_code(number)
                message = _explain(e, lower)
                if message is None or os.environ.get("PT2_DEBUG"):
                    raise
                tell(f"error: {message}")
                return EXIT_ERROR
    finally:
        _command.pop()


def _stopped(number: int, resume: Callable[[], str | None] | None) -> str:
    again = None
    if resume is not None:
        with suppress(OSError, PT2Error):
            again = resume()
    return stop.words(number) + (f"; go on with: {again}" if again else "")


def _explain(e: BaseException, lower: str) -> str | None:
    """The line for an exception; None for those that are a fault of the program."""
    if (where := memory.out_of_memory(e)) is not None:
        advice = f"use a smaller {lower}" if lower else "close other programs"
        other = "or --device cpu" if where == "gpu" else "or a machine with more"
        return f"out of memory{' on the GPU' if where == 'gpu' else ''}: {advice}, {other}"
    if isinstance(e, PT2Error):
        return str(e)
    if isinstance(e, UnicodeError) and (name := words.foreign_name(e)) is not None:
        return f"the name {name} is not UTF-8, which this step needs: rename the file or folder"
    if isinstance(e, _StandardOutput):
        stop.give_up_output()
        return str(e)
    if isinstance(e, OSError):
        if e.filename is None and e.errno in _FULL and (broken := _broken_output()) is not None:
            return broken
        return f"{os.fsdecode(e.filename) if e.filename else 'operating system'}: {reason(e)}"
    return None


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


class _StandardOutput(Exception):
    """What was printed cannot be written."""


def _finish_output() -> None:
    """Write what is still buffered for stdout, while a failure can still be told."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as e:
        why = reason(e, "what it goes to is full") if isinstance(e, OSError) else "it is closed"
        raise _StandardOutput(f"the work is done, but stdout cannot be written: {why}") from e


def _broken_output() -> str | None:
    """Whether an error without a file's name came from stdout: then it still cannot be written."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
            os.write(sys.stdout.fileno(), b"\n")  # where it is not buffered, there is no more
    except (OSError, ValueError) as e:
        stop.give_up_output()
        full = reason(e, "what it goes to is full") if isinstance(e, OSError) else "it is closed"
        return f"stdout cannot be written: {full}"
    return None
