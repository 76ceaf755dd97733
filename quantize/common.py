"""What every command of the project shares: one error type, atomic files, and the CLI guard.

Kept free of torch and numpy so that each command starts quickly.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import json
import math
import os
import re
import signal
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
MAX_MESSAGE = 4000
# Limits of JSON files, far above any that is right: 1M tokens of a tokenizer take half of them.
MAX_JSON_BYTES = 1 << 28
MAX_JSON_VALUES = 1 << 23
MAX_JSON_DEPTH = 100


class PT2Error(Exception):
    """Something the user can mend. The message is one line: what, where, what to do.

    Names out of files come into messages, so line breaks and control characters are made harmless
    here, and a name of a megabyte is cut.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """``text`` on one line of printable characters, its middle left out if it is very long."""
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE // 2]} ... {text[-MAX_MESSAGE // 2 :]}"
    line = re.sub(r"\s*[^\S ]\s*", " ", text).strip()  # blanks within a path stay as they are
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


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
        fd, name = tempfile.mkstemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent)
        os.close(fd)
    except OSError as e:
        raise PT2Error(f"cannot write {final}: {_reason(e)}") from e
    tmp = Path(name)
    try:
        yield tmp
        with tmp.open("rb") as f:
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        tmp.chmod(0o666 & ~umask)
        os.replace(tmp, final)
    except OSError as e:
        raise PT2Error(f"cannot write {final}: {_reason(e)}") from e
    finally:
        tmp.unlink(missing_ok=True)


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
        raise PT2Error(f"cannot read {os.fspath(path)}: {_reason(e)}") from e
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
    if (double := first_double(name for name, _ in pairs)) is not None:
        raise ValueError(f"{double[:80]!r} is given twice")
    return dict(pairs)


def first_double(names: Iterable[str]) -> str | None:
    """The first name that has been there before, or None."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


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
        raise PT2Error(f"cannot read {path}: {_reason(e)}") from e
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


def run_cli(
    name: str, body: Callable[[], int | None], *, resume: Callable[[], str | None] | None = None
) -> int:
    """Run a command's body; turn what a user can mend into one line on stderr and an exit code.

    ``PT2_DEBUG=1`` in the environment shows the traceback as well.

    Args:
        resume: gives the command that goes on where an interrupted run stopped, None where there
            is none.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_DFL) if hasattr(signal, "SIGPIPE") else None
    for stream in (sys.stdout, sys.stderr):
        # A sign that the terminal's encoding lacks, or a file's name in another one, ends nothing.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return body() or 0
    except PT2Error as e:
        message = str(e)
        error: BaseException = e
    except KeyboardInterrupt:
        again = resume() if resume is not None else None
        then = f"; go on with: {again}" if again else ""
        print(f"{name}: interrupted{then}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as e:
        message = f"{e.filename or 'operating system'}: {_reason(e)}"
        error = e
    except MemoryError as e:
        message = "out of memory: use fewer --samples or a machine with more"
        error = e
    if os.environ.get("PT2_DEBUG"):
        raise error
    # One line; blanks inside of it stay, for it may hold a command with a quoted path.
    line = " ".join(part.strip() for part in message.splitlines() if part.strip())
    print(f"{name}: error: {line}", file=sys.stderr)
    return EXIT_ERROR


def _reason(e: OSError) -> str:
    hints = {
        errno.ENOSPC: "the disk is full; free some space or choose another output",
        errno.EACCES: "permission denied; choose a place you may write to",
        errno.EPERM: "permission denied; choose a place you may write to",
        errno.EROFS: "the file system is read-only; choose another output",
        errno.ENOENT: "no such file or folder",
        errno.EISDIR: "it is a folder",
        errno.ENOTDIR: "a part of the path is not a folder",
    }
    return hints.get(e.errno or 0, e.strerror or str(e))
