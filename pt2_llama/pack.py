"""``pt2-llama pack``: a build as one archive, for machines that then need not compile.

::

    pt2-llama.json     first: the stamp, what a machine must have, every file with size and SHA-256
    bin/               programs and libraries, which find each other wherever they lie
    source/            the patched source: llama.cpp's converter, which pt2-export runs
    wheel/             the Python bindings
"""

from __future__ import annotations

import gzip
import io
import json
import os
import platform
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pt2_core.errors import PT2Error
from pt2_core.files import atomic_path, human_bytes, sha256_file
from pt2_core.progress import open_reporter, say
from pt2_llama import builds, portable
from pt2_llama.build import source_dir
from pt2_llama.builds import Build
from pt2_llama.cache import Places, lock
from pt2_llama.overlay import load_overlay
from pt2_llama.wheel import WHEEL

FORMAT, VERSION = "pt2-llama-pack", 1
MANIFEST = "pt2-llama.json"
COMPRESSION = 6


@dataclass(frozen=True)
class Entry:
    """A file of an archive: where it comes from, and what the manifest says of it."""

    path: Path
    record: dict[str, Any]


def default_name(build: Build) -> str:
    """``pt2-llama-cpu-5e507cad-linux-x86_64.tar.gz``."""
    system = f"{platform.system().lower()}-{platform.machine()}"
    return f"pt2-llama-{build.variant}-{build.stamp.key[:8]}-{system}.tar.gz"


def pack(where: Places, variant: str, out: Path | None = None) -> Path:
    """Write the current build of a variant as an archive; the same build gives the same bytes.

    Args:
        out: the file (None: :func:`default_name` in the working folder).

    Raises:
        PT2Error: there is no such build, or the file cannot be written.
    """
    build = builds.require_build(where, variant)
    out = Path(default_name(build)) if out is None else out
    if out.is_dir():
        raise PT2Error(f"--out {out} is a folder: give the archive's name")
    source = source_dir(where)
    with lock(where, "pack"):
        entries = {**_entries(build.bin_dir, "bin"), **_entries(source, "source")}
        wheel = where.root / WHEEL
        if wheel.is_file():
            entries[f"wheel/{WHEEL}"] = Entry(wheel, _record(wheel))
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "stamp": asdict(build.stamp),
            "needs": asdict(portable.needs_of(build.stamp, build.bin_dir)),
            "overlay": load_overlay(where.overlay).digest(),
            "files": {name: entry.record for name, entry in entries.items()},
        }
        _write(out, manifest, entries, int(build.stamp.created))
    say(f"packed {build.describe()}")
    say(f"{out}: {human_bytes(out.stat().st_size)}, SHA-256 {sha256_file(out)}")
    return out


def _entries(folder: Path, inside: str) -> dict[str, Entry]:
    """The files below a folder, by their names in the archive, sorted."""
    found = {}
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f != "__pycache__")
        for name in sorted(names):
            path = Path(base) / name
            found[f"{inside}/{path.relative_to(folder).as_posix()}"] = Entry(path, _record(path))
    return found


def _record(path: Path) -> dict[str, Any]:
    if path.is_symlink():
        target = os.readlink(path)
        if "/" in target:
            raise PT2Error(f"{path} is a link to {target}, outside of its folder: build again")
        return {"link": target}
    size = path.stat().st_size
    return {"sha256": sha256_file(path), "size": size, "program": os.access(path, os.X_OK)}


def _write(out: Path, manifest: dict[str, Any], entries: dict[str, Entry], created: int) -> None:
    text = json.dumps(manifest, indent=1, sort_keys=True).encode()
    with (
        atomic_path(out) as tmp,
        tmp.open("wb") as raw,
        # No name and no time in its head, so that the bytes depend on the content alone.
        gzip.GzipFile("", "wb", COMPRESSION, raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w|") as tar,
        open_reporter().phase("packing", len(entries), "files", every=5) as bar,
    ):
        head = tarfile.TarInfo(MANIFEST)
        head.size, head.mtime = len(text), created
        tar.addfile(head, io.BytesIO(text))
        for done, (name, entry) in enumerate(entries.items(), 1):
            _add(tar, name, entry, created)
            bar.reach(done)


def _add(tar: tarfile.TarFile, name: str, entry: Entry, created: int) -> None:
    info = tarfile.TarInfo(name)
    info.mtime = created
    if "link" in entry.record:
        info.type, info.linkname = tarfile.SYMTYPE, entry.record["link"]
        return tar.addfile(info)
    info.size = entry.record["size"]
    info.mode = 0o755 if entry.record["program"] else 0o644
    with entry.path.open("rb") as f:
        tar.addfile(info, f)
    return None
