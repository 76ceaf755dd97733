"""Finished builds: their stamp, their key, how they are found and published."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pt2_core.errors import PT2Error
from pt2_core.files import read_json, write_json
from pt2_core.process.temporary import remove_dead
from pt2_core.schema import of, validate
from pt2_llama import kernel_path, pinned, source
from pt2_llama.cache import Places, cache_root, lock
from pt2_llama.overlay import load_overlay
from pt2_llama.perplexity import TOOL as PERPLEXITY
from pt2_llama.perplexity import Told, run_perplexity
from pt2_llama.toolchain import cpu_signature

VARIANTS = ("cpu", "cuda", "stock")
STAMP = "stamp.json"
STAMP_VERSION = 1
KEEP_PER_VARIANT = 5


@dataclass(frozen=True)
class Stamp:
    """What is known of a build; written after its smoke test, so its presence means complete.

    Attributes:
        variant: "cpu", "cuda" or "stock".
        key: see :func:`build_key`.
        source: SHA-256 of the source archive.
        overlay: digest of the variant's part of the overlay and edits; None for stock.
        cpu: signature of the CPU that a native build is for.
        amx: "on", "off" (the compiler does not see it) or "faults" (seen, crashed, left out).
        tools: programs in ``bin``.
        flags: CMake options.
        compiler: first line of the C++ compiler's version.
        smoke: perplexity of the tiny model per type.
        notes: what the user should know.
        created: seconds since 1970.
        library_path: folders of libraries that the programs need besides their own (cuBLAS).
        version: of the stamp; one of another version is not read.
    """

    variant: str
    key: str
    source: str
    overlay: str | None
    cpu: str
    amx: str
    tools: tuple[str, ...]
    flags: tuple[str, ...]
    compiler: str
    smoke: dict[str, float]
    notes: tuple[str, ...] = ()
    created: float = 0.0
    library_path: tuple[str, ...] = ()
    version: int = STAMP_VERSION


@dataclass(frozen=True)
class Build:
    """A complete build in the cache."""

    folder: Path
    stamp: Stamp = field(repr=False)

    @property
    def variant(self) -> str:
        """ "cpu", "cuda" or "stock"."""
        return self.stamp.variant

    @property
    def bin_dir(self) -> Path:
        """Folder of the programs."""
        return self.folder / "bin"

    @property
    def lib_dir(self) -> Path:
        """Folder of libllama.so, libggml-base.so, ..."""
        return self.folder / "bin"

    def tool(self, name: str) -> Path:
        """Path of a program such as ``llama-bench``.

        Raises:
            PT2Error: this build has no such program; those it has are listed.
        """
        path = self.bin_dir / name
        if name in self.stamp.tools and os.access(path, os.X_OK):
            return path
        if name in self.stamp.tools:
            raise PT2Error(f"{path} is gone; run: {build_command(self.variant)} --force")
        raise PT2Error(
            f"the {self.variant} build has no {name!r}; it has {', '.join(self.stamp.tools)}"
        )

    def exports(self) -> dict[str, str]:
        """The variables that differ from the current environment."""
        exports = {"PATH": _prepend("PATH", [str(self.bin_dir)])}
        exports["LLAMA_CPP_LIB_PATH"] = str(self.lib_dir)
        extra = list(self.stamp.library_path)
        # LD_LIBRARY_PATH beats the programs' own search path: where somebody has set it, another
        # libllama.so in it would be taken.
        if extra or os.environ.get("LD_LIBRARY_PATH"):
            exports["LD_LIBRARY_PATH"] = _prepend("LD_LIBRARY_PATH", [str(self.lib_dir), *extra])
        return exports

    def env(self) -> dict[str, str]:
        """The whole environment in which the programs run."""
        return dict(os.environ) | self.exports()

    def perplexity(
        self,
        model: Path,
        *options: str | Path,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Told:
        """Run llama-perplexity on a file, again where it loses its last lines.

        Args:
            options: the text (``-f``) and others, as llama-perplexity takes them.
            env: variables beside those of :meth:`env`.
            timeout: seconds for each run (None: as long as it takes).

        Raises:
            PT2Error: this build has no llama-perplexity, or as :func:`run_perplexity`.
        """
        command = [self.tool(PERPLEXITY), "-m", model, *options]
        return run_perplexity(command, {**self.env(), **(env or {})}, timeout)

    def kernel_path(self) -> kernel_path.KernelPath | None:
        """Which code path the CPU backend takes for our types here; None of a build without them.

        Raises:
            PT2Error: the library cannot be asked.
        """
        return kernel_path.kernel_path(self.lib_dir, self.env())

    def describe(self) -> str:
        """One line: variant, key, age, compiler, AMX."""
        age = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.stamp.created))
        amx = {"faults": ", without AMX (it faults here)", "on": ", AMX"}.get(self.stamp.amx, "")
        patch = "unmodified" if self.stamp.overlay is None else f"overlay {self.stamp.overlay[:8]}"
        return f"{self.variant} {self.stamp.key} of {age}: {patch}, {self.stamp.compiler}{amx}"


def _prepend(variable: str, folders: Sequence[str]) -> str:
    old = [p for p in os.environ.get(variable, "").split(os.pathsep) if p and p not in folders]
    return os.pathsep.join([*folders, *old])


def build_key(
    overlay: str | None, flags: Sequence[str], tools: Sequence[str], compiler: str, cpu: str
) -> str:
    """Sixteen hex digits over everything that a build's content depends on."""
    parts = [pinned.SDIST_SHA256, overlay, list(flags), sorted(tools), compiler, cpu]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def build_command(variant: str) -> str:
    """The command that makes a variant."""
    return {"cpu": "pt2-llama build"}.get(variant, f"pt2-llama build --{variant}")


def read_build(folder: Path) -> Build | None:
    """The build in a folder, or None when it is incomplete, damaged or of another version."""
    try:
        data = read_json(folder / STAMP)
        if data.get("version") != STAMP_VERSION:
            return None
        validate(data, of(Stamp), folder / STAMP, "build again")
        for name in ("tools", "flags", "notes", "library_path"):
            data[name] = tuple(data[name])
        return Build(folder, Stamp(**data))
    except (PT2Error, AttributeError, KeyError, TypeError):
        return None


def all_builds(where: Places) -> list[Build]:
    """Every complete build in the cache, the newest first."""
    folders = where.builds.iterdir() if where.builds.is_dir() else []
    found = [build for folder in sorted(folders) if (build := read_build(folder))]
    return sorted(found, key=lambda b: b.stamp.created, reverse=True)


def matches(build: Build, variant: str, overlay: str | None) -> bool:
    """Whether a build is of this source, overlay, variant and CPU."""
    stamp = build.stamp
    return (
        stamp.variant == variant
        and stamp.source == pinned.SDIST_SHA256
        and stamp.overlay == (None if variant == "stock" else overlay)
        and stamp.cpu == cpu_signature()
    )


def find_build(where: Places, variant: str) -> Build | None:
    """The newest complete build that matches the current overlay, else None."""
    check_variant(variant)
    overlay = load_overlay(where.overlay).for_variant(variant).digest()
    return next((b for b in all_builds(where) if matches(b, variant, overlay)), None)


def require_build(where: Places, variant: str) -> Build:
    """As :func:`find_build`.

    Raises:
        PT2Error: there is none, with the reason and the command to run.
    """
    if build := find_build(where, variant):
        return build
    older = [b for b in all_builds(where) if b.variant == variant]
    run = f"run: {build_command(variant)}"
    if not older:
        raise PT2Error(f"there is no {variant} build of llama.cpp in {where.root}; {run}")
    if all(b.stamp.cpu != cpu_signature() for b in older):
        raise PT2Error(f"the {variant} builds in {where.root} are for another CPU; {run}")
    raise PT2Error(f"the {variant} build of llama.cpp is of an older overlay; {run} again")


def check_variant(variant: str) -> None:
    """Raise PT2Error unless ``variant`` is one we know."""
    if variant not in VARIANTS:
        raise PT2Error(f"unknown build variant {variant!r}; there are {', '.join(VARIANTS)}")


def stage(objects_bin: Path, dest: Path, tools: Sequence[str]) -> None:
    """Copy the programs and shared libraries of an object folder to the new folder ``dest``.

    Raises:
        PT2Error: a program is missing.
    """
    if dest.exists():
        shutil.rmtree(dest)
    dest.mkdir(parents=True)
    for tool in tools:
        if not (objects_bin / tool).is_file():
            raise PT2Error(f"the build made no {tool} in {objects_bin}; try --force")
    for path in sorted(objects_bin.iterdir()):
        library = ".so" in path.suffixes or path.suffix == ".dylib"
        if path.name in tools or library:
            shutil.copy2(path, dest / path.name, follow_symlinks=False)


def publish(where: Places, staged: Path, stamp: Stamp) -> Build:
    """Stamp a staged folder and give it its final name, replacing a build of the same key."""
    write_json(staged / STAMP, asdict(stamp))
    final = where.builds / f"{stamp.variant}-{stamp.key}"
    if final.exists():
        shutil.rmtree(final)
    os.replace(staged, final)
    return Build(final, stamp)


def prune(where: Places, keep: Build) -> list[Path]:
    """Remove incomplete folders and all but the newest few builds of ``keep``'s variant.

    Call it with the lock held. Returns what was removed.
    """
    complete = all_builds(where)
    same = [b.folder for b in complete if b.variant == keep.variant and b.folder != keep.folder]
    old = same[KEEP_PER_VARIANT - 1 :]
    known = {b.folder for b in complete}
    broken = [f for f in where.builds.iterdir() if f.is_dir() and f not in known]
    for folder in (*old, *broken):
        shutil.rmtree(folder)
    return [*old, *broken]


def amx_faults(where: Places) -> bool:
    """Whether an earlier build on this CPU found that its AMX faults."""
    return any(
        b.stamp.amx == "faults" and b.stamp.cpu == cpu_signature() for b in all_builds(where)
    )


def clean(where: Places, everything: bool) -> list[Path]:
    """Remove object folders and builds that do not match; with ``everything`` the whole cache.

    What a killed build or a killed pt2-bench has left goes in any case.

    Returns what was removed.
    """
    with lock(where, "clean"):
        current = {b.folder for v in VARIANTS if (b := find_build(where, v))}
        folders = [where.objects]
        if where.builds.is_dir() and not everything:
            folders += [f for f in sorted(where.builds.iterdir()) if f not in current]
        folders += sorted(where.root.glob(f"{source.TEMPORARY}*"))
        if everything:
            folders += [where.builds, where.pristine, where.patched, where.programs]
        removed = [f for f in folders if f.exists()]
        for folder in removed:
            shutil.rmtree(folder)
    return [*removed, *remove_dead(cache_root() / "bench")]
