"""CMake and Ninja: found on PATH, beside this Python, or fetched from the package index.

A C++ compiler is all that a machine must have. What is fetched lies in the cache, one folder a
program, with the versions and checksums of ``pinned.py``; no environment is changed.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from pt2_core.errors import PT2Error
from pt2_core.process import children
from pt2_core.process.temporary import temporary_folder
from pt2_core.progress import open_reporter, say
from pt2_llama import pinned, source, toolchain
from pt2_llama.cache import Places, check_disk, lock

FETCHED_BYTES = 150_000_000
BY_HAND = "; or install it yourself: apt install cmake ninja-build"
# Where pip's --target leaves the program. CMake's own bin/cmake there is a Python script that does
# not find its package.
_INSIDE = {"cmake": "cmake/data/bin/cmake", "ninja": "bin/ninja"}


def fetched(where: Places) -> dict[str, Path]:
    """Name -> path of the programs in the cache, also of those that are not there yet."""
    return {
        name: where.programs / f"{name}-{version}" / _INSIDE[name]
        for name, (version, _) in pinned.BUILD_PROGRAMS.items()
    }


def ensure(where: Places, wait: bool = True) -> None:
    """Fetch CMake and Ninja into the cache, where this machine has none that will do.

    Raises:
        PT2Error: there is no compiler, so that they would be of no use; or they cannot be had.
    """
    toolchain.find_compilers()
    if missing(where):
        with lock(where, "fetching CMake", wait):
            for name in missing(where):
                _fetch(where, name)


def missing(where: Places) -> list[str]:
    """The programs to fetch, of "cmake" and "ninja".

    make does in the place of ninja. So ninja is fetched where there is no make, and together with
    CMake, for it makes small rebuilds quicker.
    """
    own = fetched(where)
    cmake = toolchain.find_cmake(own["cmake"])
    needed = [] if cmake is not None and toolchain.new_enough(cmake) else ["cmake"]
    no_make = bool(needed) or shutil.which("make") is None
    if no_make and toolchain.find_ninja(own["ninja"]) is None:
        needed.append("ninja")
    return needed


def _fetch(where: Places, name: str) -> None:
    """Let pip unpack the pinned wheel of a program. Needs the lock."""
    check_disk(where.root, FETCHED_BYTES, f"fetching {name}")
    version, digests = pinned.BUILD_PROGRAMS[name]
    say(f"this machine has no {name} that will do: fetching {name} {version} into the cache")
    with (
        temporary_folder(where.root, source.TEMPORARY) as work,
        open_reporter().phase(f"fetching {name}"),
    ):
        hashes = " ".join(f"--hash=sha256:{digest}" for digest in digests)
        (work / "requirements.txt").write_text(f"{name}=={version} {hashes}\n")
        target = work / "program"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        options = ["--only-binary", ":all:", "--no-deps", "--no-compile", "--target", str(target)]
        done = children.run([*pip, *options, "-r", str(work / "requirements.txt")], tree=True)
        if done.returncode != 0:
            log = done.stdout + done.stderr
            raise PT2Error(source.explain_pip(log, by_hand=BY_HAND, what=f"{name}=={version}"))
        program = target / _INSIDE[name]
        if not toolchain.first_line([str(program), "--version"]):
            raise PT2Error(f"{name} {version} of the package index does not run here{BY_HAND}")
        final = where.programs / f"{name}-{version}"
        final.parent.mkdir(exist_ok=True)
        if final.exists():
            shutil.rmtree(final)
        os.replace(target, final)
