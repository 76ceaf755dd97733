"""``pt2-llama unpack``: put a packed build into this machine's cache, checked and whole, or not."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from pt2_core.errors import PT2Error, reason
from pt2_core.files import parse_json, sha256_file
from pt2_core.process.temporary import temporary_folder
from pt2_core.progress import open_reporter, say
from pt2_core.schema import integer, mapping, of, record, text, validate
from pt2_llama import builds, pinned, portable, smoke, toolchain
from pt2_llama.builds import Build, Stamp
from pt2_llama.cache import Places, check_disk, lock
from pt2_llama.overlay import load_overlay, stamp_digest
from pt2_llama.pack import FORMAT, MANIFEST, VERSION
from pt2_llama.portable import Needs
from pt2_llama.wheel import WHEEL

_FILE = record({}, {"sha256": text("[0-9a-f]{64}"), "size": integer(0), "link": text("[^/]+")})
_MANIFEST = record(
    {"stamp": of(Stamp), "needs": of(Needs), "overlay": text(), "files": mapping(_FILE)}
)
MAX_MANIFEST = 1 << 24


@dataclass(frozen=True)
class Manifest:
    """What an archive says of itself; see :mod:`pt2_llama.pack`."""

    stamp: Stamp
    needs: Needs
    overlay: str
    files: dict[str, dict[str, Any]]


def unpack(archive: Path, where: Places, sha256: str | None = None) -> Build:
    """Check an archive of :func:`pt2_llama.pack.pack` and install the build that it holds.

    Nothing is kept of an archive that fails a check, or whose programs fail the smoke test here.

    Args:
        sha256: what the archive's own SHA-256 must be.

    Raises:
        PT2Error: it is no such archive, damaged, of another version of this package, or not for
            this machine.
    """
    if sha256 is not None and (actual := sha256_file(archive)) != sha256.lower():
        raise PT2Error(f"{archive} has the SHA-256 {actual}, not {sha256}: copy it again")
    with lock(where, "unpack"):
        where.builds.mkdir(parents=True, exist_ok=True)
        with temporary_folder(where.builds, ".staged-") as work:
            manifest = _extract(archive, work, where)
            stamp = _stamp_for_here(manifest.stamp)
            staged = work / "build"
            staged.mkdir()
            os.replace(work / "bin", staged / "bin")
            _check_runs(archive, Build(staged, stamp))
            _install_source(work, where, manifest.overlay)
            made = builds.publish(where, staged, stamp)
        builds.prune(where, keep=made)
    say(f"unpacked {made.describe()}")
    say(f"programs and libraries: {made.bin_dir}")
    return made


def _extract(archive: Path, work: Path, where: Places) -> Manifest:
    """Unpack everything into ``work``; the manifest's checks come before any file is written."""
    try:
        with (
            tarfile.open(archive, "r|gz") as tar,
            open_reporter().phase("unpacking", unit="files", every=5) as bar,
        ):
            manifest = _read_manifest(archive, tar)
            _check_fits(archive, manifest, where)
            total = sum(entry.get("size", 0) for entry in manifest.files.values())
            check_disk(where.root, 2 * total + 100_000_000, "unpacking")
            left = dict(manifest.files)
            while member := tar.next():  # an iterator would begin with the manifest again
                if (entry := left.pop(member.name, None)) is None:
                    raise _damaged(archive, f"{member.name!r} is not in its list, or twice")
                _extract_member(archive, tar, member, entry, work)
                bar.reach(len(manifest.files) - len(left), total=len(manifest.files))
    except (tarfile.TarError, EOFError, zlib.error, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise PT2Error(f"cannot unpack {archive}: {reason(e)}") from e
        raise _damaged(archive, str(e)) from e
    if left:
        raise _damaged(archive, f"{next(iter(left))} is missing")
    return manifest


def _damaged(archive: Path, why: str) -> PT2Error:
    return PT2Error(f"{archive} is damaged, or no archive of pt2-llama pack ({why}): copy it again")


def _read_manifest(archive: Path, tar: tarfile.TarFile) -> Manifest:
    head = tar.next()
    if head is None or head.name != MANIFEST or not head.isreg() or head.size > MAX_MANIFEST:
        raise PT2Error(f"{archive} is no archive of pt2-llama pack: its first file is another")
    content = tar.extractfile(head)
    assert content is not None, "a regular file can always be opened"
    data = parse_json(content.read(), f"{archive}: {MANIFEST}", unique=True)
    kind = (data.get("format"), data.get("version")) if isinstance(data, dict) else None
    if kind != (FORMAT, VERSION):
        raise PT2Error(f"{archive} is of another format {kind}: pack it with this version")
    validate(data, _MANIFEST, archive, "pack it again")
    stamp, needs = Stamp(**_tuples(data["stamp"])), Needs(**_tuples(data["needs"]))
    return Manifest(stamp, needs, data["overlay"], data["files"])


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists only, and the fields of our records are tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def _check_fits(archive: Path, manifest: Manifest, where: Places) -> None:
    """Refuse a build that this package would not find, or that this machine cannot run."""
    stamp = manifest.stamp
    builds.check_variant(stamp.variant)
    overlay = load_overlay(where.overlay)
    ours = None if stamp.variant == "stock" else overlay.for_variant(stamp.variant).digest()
    same = stamp.overlay == ours and manifest.overlay == overlay.digest()
    if stamp.source != pinned.SDIST_SHA256 or not same:
        raise PT2Error(
            f"{archive} was packed by another version of this package (overlay "
            f"{manifest.overlay[:8]}, here {overlay.digest()[:8]}): use the same one on both"
        )
    portable.check(manifest.needs, str(archive))


def _extract_member(
    archive: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, entry: dict[str, Any], work: Path
) -> None:
    """Write a file or a link, which must be as the manifest says."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or name.parts[0] not in ("bin", "source", "wheel"):
        raise _damaged(archive, f"the name {member.name!r} leads out of it")
    path = work / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if "link" in entry:
        if not member.issym() or member.linkname != entry["link"] or "/" in member.linkname:
            raise _damaged(archive, f"{member.name} is not the link that its list has")
        path.symlink_to(member.linkname)
        return
    content = tar.extractfile(member) if member.isreg() else None
    if content is None or member.size != entry.get("size"):
        raise _damaged(archive, f"{member.name} is not the file that its list has")
    digest = hashlib.sha256()
    with path.open("wb") as f:
        while piece := content.read(1 << 20):
            digest.update(piece)
            f.write(piece)
    if digest.hexdigest() != entry.get("sha256"):
        raise _damaged(archive, f"the SHA-256 of {member.name} is another")
    path.chmod(0o755 if entry.get("program") else 0o644)


def _stamp_for_here(stamp: Stamp) -> Stamp:
    """The stamp as this machine finds it again: its CPU runs the build, so it counts as its own."""
    cpu = toolchain.cpu_signature()
    key = builds.build_key(stamp.overlay, stamp.flags, stamp.tools, stamp.compiler, cpu)
    folders = tuple(f for f in stamp.library_path if Path(f).is_dir())
    if len(folders) < len(stamp.library_path) and (nvcc := toolchain.find_nvcc()):
        library = toolchain.find_cublas(nvcc).library
        folders += (str(library.parent),) if library is not None else ()
    return replace(stamp, cpu=cpu, key=key, library_path=folders)


def _check_runs(archive: Path, build: Build) -> None:
    types = smoke.STOCK_TYPES + (() if build.variant == "stock" else smoke.OUR_TYPES)
    _, failure = smoke.smoke_test(build.bin_dir, build.env(), types)
    if failure is not None:
        last = (failure.output.strip().splitlines() or ["it said nothing"])[-1]
        raise PT2Error(
            f"the programs of {archive} do not run here: {failure.what}: {failure.reason} ({last})"
        )


def _install_source(work: Path, where: Places, overlay: str) -> None:
    """Give the patched source and the wheel their places, unless the same are there already."""
    if stamp_digest(work / "source") != overlay:
        raise PT2Error("the source in the archive is not of its own overlay: pack it again")
    if stamp_digest(where.patched) != overlay:
        if where.patched.exists():
            shutil.rmtree(where.patched)
        os.replace(work / "source", where.patched)
    wheel = work / "wheel" / WHEEL
    if wheel.is_file() and not (where.root / WHEEL).exists():
        os.replace(wheel, where.root / WHEEL)
