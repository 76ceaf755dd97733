"""The example texts by name, wherever this is installed: ``bundled:calibration`` and the others.

They are the files of examples/text, which are installed with this package.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from quantize.common import PT2Error

PREFIX = "bundled:"
FOLDER = Path(__file__).parent / "text"


def bundled_names() -> list[str]:
    """Every name that :func:`text_source` knows."""
    return sorted(PREFIX + file.stem for file in FOLDER.glob("*.txt"))


def text_source(source: str) -> str:
    """The source of a text with the bundled names in it replaced by their files.

    Args:
        source: what an option for texts takes; several sources have commas between them.

    Raises:
        PT2Error: there is no bundled text of a name.
    """
    if PREFIX not in source:
        return source
    return ",".join(_file(s) if s.startswith(PREFIX) else s for s in source.split(","))


def _file(source: str) -> str:
    file = FOLDER / f"{source.removeprefix(PREFIX)}.txt"
    if source not in bundled_names():
        raise PT2Error(f"there is no text {source!r}; bundled are {', '.join(bundled_names())}")
    return str(file)


def resolve_texts(args: argparse.Namespace, *options: str) -> None:
    """Put files in the place of bundled names in these options of a command, where given.

    Raises:
        PT2Error: as :func:`text_source`.
    """
    for name in options:
        value = getattr(args, name)
        if value is not None:
            setattr(args, name, text_source(value))
