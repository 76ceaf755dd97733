"""The checksum that tells models apart, computed once per model and remembered.

Every command asks whether an artifact was made from the model at hand. A SHA-256 over a 7B model
takes half a minute, so the cache keeps it together with what the files' entries in the file system
said: as long as names, sizes, times and inodes are the same, the files are.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pt2_core.cache import cache_root
from pt2_core.errors import PT2Error
from pt2_core.files import read_json, write_json

CACHE = "fingerprints.json"
MOST = 100  # models remembered
# A file can change twice within one tick of the clock that stamps it. What was touched so recently
# is not remembered, so that a later change is sure to leave another time.
SETTLED_NS = 2_000_000_000
_SHA256 = re.compile(r"[0-9a-f]{64}")

State = list[list[Any]]


def fingerprint(
    folder: Path,
    files: Sequence[str],
    known: dict[str, Any] | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[str, dict[str, Any]]:
    """SHA-256 over names, sizes and contents of some files of a folder.

    Args:
        files: their names, relative to the folder, in the order in which they count.
        known: what an earlier call returned; used when the files are unchanged.
        progress: called with the number of bytes after each piece that is read.

    Returns:
        (hex digest, a record to hand in as ``known`` next time)
    """
    now, state = time.time_ns(), files_state(folder, files)
    for record in (known, _records().get(str(folder.resolve()))):
        if (sha256 := _of_this_state(record, state)) is not None:
            return sha256, {"state": state, "sha256": sha256}
    digest = hashlib.sha256()
    for name in files:
        digest.update(f"{name}\0{(folder / name).stat().st_size}\0".encode())
        with (folder / name).open("rb") as f:
            while piece := f.read(1 << 24):
                digest.update(piece)
                progress(len(piece))
    record = {"state": state, "sha256": digest.hexdigest()}
    if all(now - max(entry[2], entry[3]) > SETTLED_NS for entry in state):
        _remember(folder, record)
    return digest.hexdigest(), record


def files_state(folder: Path, files: Sequence[str]) -> State:
    """What changes when a file does: name, size, times of content and of entry, inode."""
    stats = [(folder / name).stat() for name in files]
    return [
        [name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]
        for name, s in zip(files, stats, strict=True)
    ]


def _of_this_state(record: Any, state: State) -> str | None:
    """The checksum that a record has for files in this state; None where it has none."""
    if not isinstance(record, dict) or record.get("state") != state:
        return None
    found = record.get("sha256")
    return found if isinstance(found, str) and _SHA256.fullmatch(found) else None


def _records() -> dict[str, Any]:
    """The cache; empty where there is none or it cannot be read, for it can be made again."""
    with suppress(PT2Error, OSError):
        found = read_json(cache_root() / CACHE)
        if isinstance(found, dict):
            return found
    return {}


def _remember(folder: Path, record: dict[str, Any]) -> None:
    """Enter a record, and drop those of folders that are gone and the oldest beyond a number."""
    kept = {
        key: value
        for key, value in _records().items()
        if isinstance(value, dict) and isinstance(value.get("made"), int) and Path(key).is_dir()
    }
    kept[str(folder.resolve())] = {**record, "made": time.time_ns()}
    for key in sorted(kept, key=lambda k: kept[k]["made"])[:-MOST]:
        del kept[key]
    with suppress(PT2Error, OSError):  # a full or read-only cache only costs the time
        cache_root().mkdir(parents=True, exist_ok=True)
        write_json(cache_root() / CACHE, kept)
