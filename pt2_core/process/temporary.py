"""Temporary files and folders that can be told from those which a kill -9 has left behind.

Each one is locked by the process that uses it, and the kernel drops the lock when that process
ends, however it ends. One that nobody holds is dead, and the next run into the same place removes
it. On a file system without locks nothing is removed.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pt2_core.process.stop import held

SUFFIX = ".tmp"
FOLDER_LOCK = "lock"
_RANDOM = "[a-z0-9_]+"  # what tempfile puts in
# A folder is made a moment before its lock is.
_MAKING_SECONDS = 60.0


@contextmanager
def temporary_file(final: Path) -> Iterator[Path]:
    """An empty file ``.NAME.*.tmp`` beside ``final``, removed at the end unless it was renamed.

    Raises:
        OSError: the folder cannot be written.
    """
    remove_dead(final.parent, re.escape(final.name))
    made: tuple[int, Path] | None = None
    try:
        with held():
            made = _locked_file(final)
        yield made[1]
    finally:
        if made is not None:
            made[1].unlink(missing_ok=True)
            os.close(made[0])


@contextmanager
def temporary_folder(parent: Path, prefix: str, suffix: str = "") -> Iterator[Path]:
    """A folder ``parent/PREFIX*SUFFIX``, removed at the end; dead ones of this name go first.

    Its file ``lock`` tells that it is alive.

    Raises:
        OSError: ``parent`` cannot be written.
    """
    _remove_dead(parent, re.escape(prefix) + _RANDOM + re.escape(suffix))
    work: Path | None = None
    fd = -1
    try:
        with held():
            work = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=parent))
            fd = os.open(work / FOLDER_LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            try_lock(fd)
        yield work
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        if fd >= 0:
            os.close(fd)


def remove_dead(folder: Path, names: str = ".+") -> list[Path]:
    """Remove the temporary files of :func:`temporary_file` that no process holds.

    Args:
        names: regular expression of the final names whose temporary files are meant.

    Returns:
        what was removed
    """
    return _remove_dead(folder, rf"\.({names})\.{_RANDOM}{re.escape(SUFFIX)}")


def _remove_dead(folder: Path, pattern: str) -> list[Path]:
    name = re.compile(pattern)
    removed = []
    try:
        found = [Path(e.path) for e in os.scandir(folder) if name.fullmatch(e.name)]
    except OSError:
        return []
    for path in sorted(found):
        with suppress(OSError):
            folder_like = path.is_dir() and not path.is_symlink()
            if _remove_folder(path) if folder_like else _remove_file(path):
                removed.append(path)
    return removed


def _locked_file(final: Path) -> tuple[int, Path]:
    while True:
        fd, name = tempfile.mkstemp(prefix=f".{final.name}.", suffix=SUFFIX, dir=final.parent)
        if try_lock(fd) is not False and same_file(fd, name):
            return fd, Path(name)
        os.close(fd)  # another process took it for a dead one in the moment before the lock


def _remove_file(path: Path) -> bool:
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if try_lock(fd) is not True or not same_file(fd, path):
            return False
        path.unlink()
        return True
    finally:
        os.close(fd)


def _remove_folder(path: Path) -> bool:
    try:
        fd = os.open(path / FOLDER_LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        # Killed between the folder and its lock, or while it was being removed.
        if time.time() - path.stat().st_mtime < _MAKING_SECONDS:
            return False
        shutil.rmtree(path)
        return True
    try:
        if try_lock(fd) is not True:
            return False
        # The lock's file goes last: killed half way, the folder is still known to be dead.
        for entry in list(path.iterdir()):
            if entry.name != FOLDER_LOCK:
                shutil.rmtree(entry) if _is_folder(entry) else entry.unlink()
        shutil.rmtree(path)
        return True
    finally:
        os.close(fd)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def try_lock(fd: int) -> bool | None:
    """Take a file's lock: True, False where another process has it, None where there are none."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def same_file(fd: int, path: str | os.PathLike[str]) -> bool:
    """Whether a path still names an open file."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except OSError:
        return False
