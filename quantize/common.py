"""What every command of the project shares: one error type, atomic files, and the CLI guard.

Kept free of torch and numpy so that each command starts quickly.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


class PT2Error(Exception):
    """Something the user can mend. The message is one line: what, where, what to do."""


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
    """Write ``value`` as sorted, indented JSON through :func:`atomic_path`."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as tmp:
        tmp.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        PT2Error: the file is missing, unreadable, or not JSON; the line and column are named.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise PT2Error(f"{path} is not valid JSON (line {e.lineno}, column {e.colno})") from e
    except UnicodeDecodeError as e:
        raise PT2Error(f"{path} is not UTF-8 text (byte {e.start})") from e
    except OSError as e:
        raise PT2Error(f"cannot read {path}: {_reason(e)}") from e


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
