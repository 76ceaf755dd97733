"""``pt2-llama bindings``: llama-cpp-python's Python part, to be used with our libraries.

The archive that a build is made from holds the bindings as well. They are packed into a wheel as
they are, without the library that the package compiles otherwise: ``LLAMA_CPP_LIB_PATH`` (set by
``pt2-llama env``, and by pt2-eval for itself) names ours.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

from pt2_core.commands import command
from pt2_core.errors import PT2Error
from pt2_core.process import children
from pt2_core.process.temporary import temporary_folder
from pt2_core.progress import say
from pt2_llama import builds, pinned, source
from pt2_llama.cache import Places, lock
from pt2_llama.wheel import WHEEL, make_wheel


def install(where: Places, given: Path | None = None, force: bool = False) -> None:
    """Install the bindings into the Python that runs this, unless they are there.

    Args:
        given: archive or unpacked package to take them from, instead of a download.
        force: replace another version of the package, or install this one anew.

    Raises:
        PT2Error: another version is installed, the archive cannot be had, pip fails, or the
            bindings do not load our library.
    """
    version = installed_version()
    if version == pinned.VERSION and not force:
        say(f"nothing to do: {pinned.PACKAGE} {version} is installed in {sys.prefix}")
        return check(where)
    if version is not None and not force:
        again = command("pt2-llama", "bindings", "--force")
        raise PT2Error(
            f"{pinned.PACKAGE} {version} is installed in {sys.prefix}, our llama.cpp needs "
            f"{pinned.VERSION}: use another environment, or replace it with: {again}"
        )
    wheel = ensure_wheel(where, given)
    options = ["--force-reinstall", "--no-deps"] if version == pinned.VERSION else []
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    done = children.run([*pip, *options, str(wheel)], tree=True)
    if done.returncode != 0:
        raise PT2Error(source.explain_pip(done.stdout + done.stderr, "install", ""))
    importlib.invalidate_caches()
    say(f"{pinned.PACKAGE} {pinned.VERSION} (the bindings alone) is installed in {sys.prefix}")
    check(where)


def install_if_possible(where: Places) -> None:
    """Install the bindings beside a build, from the wheel that came with its source.

    A build is of use without them, so what stops this is said and no error: another version is
    installed, there is no such wheel, or pip may not write here.
    """
    version = installed_version()
    if version == pinned.VERSION:
        return
    why = ""
    if version is not None:
        why = f"{version} is installed in {sys.prefix}"
    elif not (where.root / WHEEL).is_file():
        why = "the source was given as a folder, which has none"
    else:
        try:
            return install(where)
        except PT2Error as e:
            why = str(e)
    say(f"note: {pinned.PACKAGE}'s bindings are left as they are ({why})")


def installed_version() -> str | None:
    """The version of llama-cpp-python in this environment, None where there is none."""
    try:
        return importlib.metadata.version(pinned.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def check(where: Places) -> None:
    """Load our library through the bindings, in a process of its own.

    Raises:
        PT2Error: it does not load; a build that is not there yet is only said.
    """
    build = builds.find_build(where, "cpu")
    if build is None:
        return say(f"they need our library: {builds.build_command('cpu')}")
    asked = children.run(
        [sys.executable, "-c", "import llama_cpp; llama_cpp.llama_print_system_info()"],
        env=build.env(), cwd=build.bin_dir,
    )  # fmt: skip
    if asked.returncode != 0:
        last = (asked.stderr.strip().splitlines() or ["no message"])[-1]
        again = command("pt2-llama", "bindings", "--force")
        raise PT2Error(f"the bindings do not load our library ({last}); install anew: {again}")
    return None


def ensure_wheel(where: Places, given: Path | None = None) -> Path:
    """The wheel in the cache; made of the archive, which is fetched if it is not given.

    Raises:
        PT2Error: the archive cannot be had, or has no bindings in it.
    """
    wheel = where.root / WHEEL
    if wheel.is_file() and given is None:
        return wheel
    with lock(where, "making the bindings' wheel"):
        if given is not None:
            if given.is_dir():
                raise PT2Error(f"--source {given}: the bindings are taken from an archive only")
            source.check_archive(given)
            made = make_wheel(given, where.root)
        else:
            with temporary_folder(where.root, source.TEMPORARY) as folder:
                made = make_wheel(source.download(folder), where.root)
    if made is None:
        raise PT2Error(f"{given or pinned.SDIST_NAME} has no bindings in it")
    return made
