"""Files that are whole or not there, and JSON that is checked while it is read.

Kept free of torch and numpy so that each command starts quickly.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from pt2_core.errors import PT2Error, reason
from pt2_core.process.temporary import temporary_file

# Limits of JSON files, far above any that is right: 1M tokens of a tokenizer take half of them.
MAX_JSON_BYTES = 1 << 28
MAX_JSON_VALUES = 1 << 23
MAX_JSON_DEPTH = 100


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
