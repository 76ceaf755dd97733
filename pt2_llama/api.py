"""What the rest of the project uses of the llama.cpp build.

from pt2_llama import api
build = api.require_build()                      # PT2Error with the command to run, if none
subprocess.run([build.tool("llama-bench"), "-m", model], env=build.env(), check=True)
"""

from __future__ import annotations

from pathlib import Path

from pt2_llama import builds
from pt2_llama.builds import VARIANTS, Build
from pt2_llama.cache import cache_root, places

__all__ = ["VARIANTS", "Build", "cache_root", "find_build", "require_build", "source_dir"]


def source_dir() -> Path:
    """The patched llama.cpp source tree; fetched and patched on first use, not built.

    Raises:
        PT2Error: it cannot be fetched, or the overlay does not fit.
    """
    from pt2_llama.build import source_dir as prepare  # pulls in numpy, gguf

    return prepare(places())


def find_build(variant: str = "cpu") -> Build | None:
    """The newest complete build of ``variant`` that matches the current overlay, or None.

    Args:
        variant: ``cpu``, ``cuda`` or ``stock`` (unmodified llama.cpp, for the CPU).

    Raises:
        PT2Error: unknown variant.
    """
    return builds.find_build(places(), variant)


def require_build(variant: str = "cpu") -> Build:
    """As :func:`find_build`.

    Raises:
        PT2Error: there is no such build; the message has the command to run.
    """
    return builds.require_build(places(), variant)
