"""The cache folder: where it is, who may work in it, how large it is.

::

    <cache>/llama.cpp/<source>/pristine   unmodified source, checked
                              /patched    the same with the current overlay and edits
                              /objects/   one object folder per variant and set of options, reused
                              /builds/    finished builds: bin/, stamp.json, build.log
                              /programs/  CMake and Ninja, where the machine has none
                              /lock
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pt2_core.cache import cache_root
from pt2_core.errors import PT2Error
from pt2_core.progress import say
from pt2_llama import pinned


@dataclass(frozen=True)
class Places:
    """The folders one set of commands works with.

    Attributes:
        root: ``<cache>/llama.cpp/<source>``; everything below may be deleted at any time.
        overlay: the folder with ``overlay/`` and ``edits*.yaml`` (may be read-only).
    """

    root: Path
    overlay: Path

    @property
    def pristine(self) -> Path:
        return self.root / "pristine"

    @property
    def patched(self) -> Path:
        return self.root / "patched"

    @property
    def objects(self) -> Path:
        return self.root / "objects"

    @property
    def builds(self) -> Path:
        return self.root / "builds"

    @property
    def programs(self) -> Path:
        return self.root / "programs"


def places() -> Places:
    """The places for this checkout or installation and the current environment."""
    root = cache_root() / "llama.cpp" / f"{pinned.VERSION}-{pinned.SDIST_SHA256[:12]}"
    return Places(root=root, overlay=Path(__file__).parent.resolve() / "llama.cpp")


@contextmanager
def lock(where: Places, doing: str, wait: bool = True) -> Iterator[None]:
    """Hold the cache's lock: one process at a time changes the sources, objects and builds.

    The kernel releases it when the process ends, however it ends.

    Args:
        doing: what this process does; another one that has to wait shows it.
        wait: wait for the other process instead of raising.

    Raises:
        PT2Error: the cache cannot be written, or it is held and ``wait`` is False.
    """
    try:
        where.root.mkdir(parents=True, exist_ok=True)
        handle = (where.root / "lock").open("a+")
    except OSError as e:
        raise PT2Error(
            f"cannot write the cache {where.root}: {e.strerror}; set PT2_CACHE to another folder"
        ) from e
    with handle:
        told = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                handle.seek(0)
                holder = handle.read().strip() or "another pt2-llama"
                if not wait:
                    raise PT2Error(f"{where.root} is in use by {holder}; try again later") from None
                if not told:
                    say(f"waiting for {holder}")
                    told = True
                time.sleep(0.2)
        handle.truncate(0)
        handle.write(f"pt2-llama {doing}, process {os.getpid()}")
        handle.flush()
        try:
            yield
        finally:
            handle.truncate(0)


def folder_bytes(folder: Path) -> int:
    """Bytes of the regular files below ``folder`` (0 when it is missing)."""
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(base, name)
            if not os.path.islink(path):
                total += os.path.getsize(path)
    return total


def check_disk(folder: Path, needed: int, what: str) -> None:
    """Raise PT2Error when the file system of ``folder`` has less than ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PT2Error(
            f"{folder} has {free / 1e9:.1f} GB free, {what} needs about {needed / 1e9:.1f} GB; "
            "free some space or set PT2_CACHE to a larger disk"
        )
