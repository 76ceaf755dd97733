"""One run at a time in a folder: the second is refused, with the first one's process number."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pt2_core import cli
from pt2_core.errors import PT2Error, reason
from pt2_core.files import make_folder
from pt2_core.process.stop import held
from pt2_core.process.temporary import same_file, try_lock

LOCK = ".pt2.lock"  # no part of an artifact; it goes when the run ends
_mine: dict[tuple[int, int, str], int] = {}


@contextmanager
def folder_lock(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder for writing, making it if it is missing; nested calls of one process are fine.

    The lock is the kernel's (flock) and ends with the process, however it ends. A folder that was
    made here and is still empty at the end is removed again.

    Raises:
        PT2Error: another process holds it, or it cannot be made or written.
    """
    path = Path(folder)
    key = (os.getpid(), threading.get_ident(), os.path.realpath(path))
    if key in _mine:
        yield
        return
    made: list[Path] = []
    fd = -1
    try:
        with held():
            made = make_folder(path)
            fd = _take(path)
            _mine[key] = fd
        yield
    finally:
        _mine.pop(key, None)
        if fd >= 0:
            (path / LOCK).unlink(missing_ok=True)
            os.close(fd)
        for folder_made in reversed(made):
            with suppress(OSError):
                folder_made.rmdir()


def _take(path: Path) -> int:
    """Open and lock the folder's lock file; returns the file descriptor."""
    while True:
        try:
            fd = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as e:
            raise PT2Error(f"cannot write into {path}: {reason(e)}") from e
        got = try_lock(fd)
        if got is False:
            with os.fdopen(fd) as file:
                holder = file.read(200).strip() or "another process"
            raise PT2Error(
                f"{path} is in use by {holder}: wait until it has ended, or name another folder"
            )
        if got is None:
            cli.tell(f"{path} is on a file system without locks: start no second run into it")
        elif not same_file(fd, path / LOCK):
            os.close(fd)  # its last holder has just removed it
            continue
        os.ftruncate(fd, 0)
        os.write(fd, f"process {os.getpid()} ({_name()})\n".encode())
        return fd


def _name() -> str:
    return cli.command_name() or Path(sys.argv[0] or "python").name
