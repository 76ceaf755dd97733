"""Where llama.cpp's programs come from: a build of pt2-llama, or any folder of the user's.

The one seam between the bench and the builds, so that everything else only knows names of tools.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pt2_core.errors import PT2Error
from pt2_core.files import make_folder
from pt2_core.process.temporary import remove_dead
from pt2_llama.kernel_path import kernel_path


@dataclass(frozen=True)
class ToolBox:
    """A set of llama.cpp programs of one build.

    `knows_pt2` is False for a build which is known not to read our types.
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
            raise PT2Error(
                f"there is no {name} in {self.folder}; make a build that has it "
                f"({self._build_command()}) or choose another --variant"
            )
        return path

    def ternary_path(self) -> str | None:
        """Which code path this build's CPU backend takes for our types on this machine.

        None where the library has none of them; the environment variable GGML_TQ_CPU is honoured
        as in the tools.

        Raises:
            PT2Error: the library cannot be asked.
        """
        path = kernel_path(self.folder, self.env)
        return path.active if path is not None else None

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
    from pt2_llama.api import require_build

    build = require_build(variant)
    knows_pt2 = variant != "stock"
    return ToolBox(build.bin_dir, build.env(), build.describe(), variant, knows_pt2)


def cache_dir() -> Path:
    """The bench's folder in the cache of pt2-llama; what a killed run left in it is removed.

    Raises:
        PT2Error: it cannot be made.
    """
    from pt2_llama.api import cache_root

    folder = cache_root() / "bench"
    try:
        make_folder(folder)
    except PT2Error as e:
        raise PT2Error(f"{e}; set PT2_CACHE") from e
    remove_dead(folder)
    return folder
