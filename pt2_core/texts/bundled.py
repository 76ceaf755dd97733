"""The example texts by name, wherever this is installed: ``bundled:calibration`` and the others.

They are the files of examples/text, which are installed with this package.
"""

from __future__ import annotations

from pathlib import Path

from pt2_core.errors import PT2Error

PREFIX = "bundled:"
FOLDER = Path(__file__).parent / "text"


def bundled_names() -> list[str]:
    """Every name that :func:`bundled_file` knows."""
    return sorted(PREFIX + file.stem for file in FOLDER.glob("*.txt"))


def bundled_file(source: str) -> str:
    """The file of a bundled text's name; every other source of texts as it is.

    Raises:
        PT2Error: there is no bundled text of this name.
    """
    if not source.startswith(PREFIX):
        return source
    if source not in bundled_names():
        raise PT2Error(f"there is no text {source!r}; bundled are {', '.join(bundled_names())}")
    return str(FOLDER / f"{source.removeprefix(PREFIX)}.txt")
