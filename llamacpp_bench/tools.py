"""Where llama.cpp's programs come from: a build of pt2-llama, or any folder of the user's.

The one seam between the bench and the builds, so that everything else only knows names of tools.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantize.common import PT2Error

VARIANTS = ("cpu", "cuda", "stock")


@dataclass(frozen=True)
class ToolBox:
    """A set of llama.cpp programs of one build.

    `knows_pt2` is False for a build which is known not to read types 120 and 121.
    """

    folder: Path
    env: Mapping[str, str]
    description: str
    variant: str
    knows_pt2: bool = True

    def tool(self, name: str) -> Path:
        """Path of a program.

        Raises:
            PT2Error: the build lacks it.
        """
        path = self.folder / name
        if not (path.is_file() and os.access(path, os.X_OK)):
            raise PT2Error(f"there is no {name} in {self.folder}; run: {self._build_command()}")
        return path

    def has(self, name: str) -> bool:
        return os.access(self.folder / name, os.X_OK)

    def _build_command(self) -> str:
        flag = {"cuda": " --cuda", "stock": " --stock"}.get(self.variant, "")
        return f"pt2-llama build{flag}"


def open_toolbox(variant: str = "cpu", bin_dir: str | os.PathLike[str] | None = None) -> ToolBox:
    """Find a build: the folder `bin_dir` if given, else the build that pt2-llama made.

    Raises:
        PT2Error: there is none; the message says which command makes it.
    """
    if bin_dir is not None:
        folder = Path(bin_dir).resolve()
        if not (folder / "llama-bench").is_file():
            raise PT2Error(f"there is no llama-bench in {folder}; give the bin folder of a build")
        return ToolBox(folder, dict(os.environ), f"llama.cpp in {folder.name}", variant)
    from third_party.pt2_llama.api import require_build

    build = require_build(variant)
    folder = build.tool("llama-bench").parent
    description = str(getattr(build, "description", "") or f"pt2-llama {variant} build")
    return ToolBox(folder, build.env(), description, variant, knows_pt2=variant != "stock")


def cache_dir() -> Path:
    """`$PT2_CACHE`, else `$XDG_CACHE_HOME/pt2`, else `~/.cache/pt2`; the bench's own folder in it.

    Raises:
        PT2Error: it cannot be made.
    """
    env = os.environ
    xdg = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pt2"
    root = Path(env["PT2_CACHE"]) if env.get("PT2_CACHE") else xdg
    folder = root / "bench"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise PT2Error(f"cannot make the cache folder {folder}: {e.strerror}; set PT2_CACHE") from e
    return folder
