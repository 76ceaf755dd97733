"""What every command of the project shares: one error type, atomic files, and the CLI guard.

Kept free of torch and numpy so that each command starts quickly.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import math
import os
import re
import resource
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from quantize import memory, stop, words
from quantize.temporary import temporary_file

EXIT_ERROR = 2
MAX_MESSAGE = 4000
# Limits of JSON files, far above any that is right: 1M tokens of a tokenizer take half of them.
MAX_JSON_BYTES = 1 << 28
MAX_JSON_VALUES = 1 << 23
MAX_JSON_DEPTH = 100
THREADS_PER_CPU, LEAST_THREADS = 4, 32


class PT2Error(Exception):
    """Something the user can mend. The message is one line: what, where, what to do.

    Names out of files come into messages, so line breaks and control characters are made harmless
    here, and a name of a megabyte is cut.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """``text`` on one line of printable characters and tabs, its middle left out if it is long."""
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE // 2]} ... {text[-MAX_MESSAGE // 2 :]}"
    # Blanks and tabs within a path stay as they are, for a command in a message is pasted.
    line = re.sub(r"\s*[^\S \t]\s*", " ", text).strip()
    return "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in line)


@contextmanager
def atomic_path(final: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``final`` and rename it to ``final`` on success.

    The file is flushed to disk before the rename, so a crash leaves either the old file or the
    new one, never a part. On any exception the temporary file is removed.

    Raises:
        PT2Error: the folder does not exist or cannot be written, or the disk is full.
    """
    final = Path(final)
    try:
        with temporary_file(final) as tmp:
            yield tmp
            with tmp.open("rb") as f:
                os.fsync(f.fileno())
            umask = os.umask(0)
            os.umask(umask)
            tmp.chmod(0o666 & ~umask)
            os.replace(tmp, final)
    except BrokenPipeError:
        raise  # of what is printed meanwhile
    except OSError as e:
        raise PT2Error(f"cannot write {final}: {reason(e)}") from e


def make_folder(path: Path) -> list[Path]:
    """Make a folder and those above it; returns the ones that were missing, the topmost first.

    Raises:
        PT2Error: it cannot be made, or something else has its name.
    """
    missing = []
    at = path
    while not at.exists() and at != at.parent:
        if at.is_symlink():
            raise PT2Error(
                f"cannot make the folder {path}: {at} is a link to {os.readlink(at)}, which is not "
                "there; remove the link, or make its target"
            )
        missing.append(at)
        at = at.parent
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as e:
        raise PT2Error(f"cannot make the folder {path}: a file has this name") from e
    except OSError as e:
        raise PT2Error(f"cannot make the folder {path}: {reason(e)}") from e
    return missing[::-1]


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as sorted, indented JSON through :func:`atomic_path`.

    A path with bytes that are not UTF-8 is written as JSON's own escapes, and read back as it was.
    """
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as tmp:
        tmp.write_bytes((text + "\n").encode("utf-8", "backslashreplace"))


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """The content of a regular file of at most ``most`` bytes.

    Raises:
        PT2Error: it is missing, unreadable, larger, or no regular file.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a pipe would be waited for
            raise PT2Error(f"cannot read {os.fspath(path)}: it is no regular file")
        with open(path, "rb") as f:
            raw = f.read(most + 1)
    except OSError as e:
        raise PT2Error(f"cannot read {os.fspath(path)}: {reason(e)}") from e
    if len(raw) > most:
        raise PT2Error(f"{os.fspath(path)} is larger than {human_bytes(most)}: not such a file")
    return raw


def read_json(path: str | os.PathLike[str], *, unique: bool = False) -> Any:
    """Read a JSON file.

    Args:
        unique: refuse a name that an object holds twice (the last one counts otherwise).

    Raises:
        PT2Error: the file is missing, unreadable, or not JSON; the line and column are named.
    """
    return parse_json(read_bytes(path, MAX_JSON_BYTES), os.fspath(path), unique=unique)


def parse_json(raw: bytes | str, where: str, *, unique: bool = False) -> Any:
    """As :func:`read_json`, of bytes or text that come from ``where``.

    NaN and infinite numbers are refused: JSON has none, and no setting of ours may be one.
    """
    raw = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
    if sum(raw.count(mark) for mark in (b",", b"[", b"{")) > MAX_JSON_VALUES:
        raise PT2Error(f"{where} holds more than {MAX_JSON_VALUES} values: not such a file")
    try:
        value = json.loads(
            raw.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite,
            object_pairs_hook=_unique if unique else None,
        )  # fmt: skip
    except json.JSONDecodeError as e:
        raise PT2Error(f"{where} is not valid JSON (line {e.lineno}, column {e.colno})") from e
    except UnicodeDecodeError as e:
        raise PT2Error(f"{where} is not UTF-8 text (byte {e.start})") from e
    except RecursionError as e:
        raise PT2Error(f"{where} is nested too deeply to be one of ours") from e
    except ValueError as e:  # an int of thousands of digits, or one of the functions below
        raise PT2Error(f"{where} is not valid JSON: {e}") from e
    if not _shallow(value):
        raise PT2Error(f"{where} is nested more than {MAX_JSON_DEPTH} deep")
    return value


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _finite(word: str) -> float:
    value = float(word)
    if math.isinf(value):
        raise ValueError(f"the number {word[:40]} is too large")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(n for n in value if names.count(n) > 1)
        raise ValueError(f"{double[:80]!r} is given twice")
    return value


def _shallow(value: Any) -> bool:
    """Whether a JSON value is nested at most MAX_JSON_DEPTH deep (level by level, no recursion)."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        inner: list[Any] = []
        for v in level:
            if isinstance(v, dict | list):
                inner += v.values() if isinstance(v, dict) else v
        if not inner:
            return True
        level = [v for v in inner if isinstance(v, dict | list)]
    return not level


def sha256_file(path: str | os.PathLike[str], chunk: int = 1 << 22) -> str:
    """Hex SHA-256 of a file, read in ``chunk``-byte pieces."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as f:
            while piece := f.read(chunk):
                digest.update(piece)
    except OSError as e:
        raise PT2Error(f"cannot read {path}: {reason(e)}") from e
    return digest.hexdigest()


def human_bytes(n: float) -> str:
    """``1536 -> '1.50 KiB'``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} B" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1024
    return f"{n:.2f} TiB"


def human_seconds(s: float) -> str:
    """``3725 -> '1:02:05'``, ``12.3 -> '12.3 s'``."""
    if s < 60:
        return f"{s:.1f} s"
    minutes, seconds = divmod(round(s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


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
    of which unwind the body (:mod:`quantize.stop`).
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


def reason(e: OSError, full: str = "") -> str:
    """An error of the system in words: what is wrong, and what to do.

    Args:
        full: what to say of a full disk instead.
    """
    full = full or "the disk is full; free some space or choose another output"
    hints = {
        errno.ENOSPC: full,
        errno.EDQUOT: "the disk quota is used up; free some space or choose another output",
        errno.EFBIG: "the file is larger than files may be here (see ulimit -f)",
        errno.EACCES: "permission denied; choose a place you may write to",
        errno.EPERM: "permission denied; choose a place you may write to",
        errno.EROFS: "the file system is read-only; choose another output",
        errno.ENOENT: "no such file or folder",
        errno.EISDIR: "it is a folder",
        errno.ENOTDIR: "a part of the path is not a folder",
        errno.ELOOP: "its links lead in a circle",
        errno.EIO: "the device fails (input/output error)",
    }
    if e.errno is None and str(e).endswith("written"):  # NumPy's words for a short write
        limited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
        return f"{hints[errno.EFBIG]}, or the disk is full" if limited else full
    return hints.get(e.errno or 0, e.strerror or str(e))
