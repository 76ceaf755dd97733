"""Put measured tables into a Markdown file, so that no figure in it is typed by hand.

A file says where a table belongs, and what it has there is replaced:

    <!-- pt2-bench: speed -->
    (the table)
    <!-- end -->

`speed`, `ratios`, `batch`, `depth`, `conditions` and `commands` are known.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from llamacpp_bench.report import (
    batch_rows,
    depth_rows,
    markdown_table,
    write_text,
)
from llamacpp_bench.results import Results
from llamacpp_bench.speedup import Published, conditions, ratio_rows, shape_rows
from pt2_core.errors import PT2Error

_PLACE = re.compile(r"(<!-- pt2-bench: ([a-z]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def texts(results: Results, published: Published | None) -> dict[str, Callable[[], str]]:
    """What can be asked for, by name."""

    def table(rows: list[list[str]]) -> str:
        return "\n".join(markdown_table(rows)) if len(rows) > 1 else "(not measured)"

    return {
        "speed": lambda: table(shape_rows(results)),
        "ratios": lambda: table(ratio_rows(results, published)),
        "batch": lambda: table(batch_rows(results)),
        "depth": lambda: table(depth_rows(results)),
        "conditions": lambda: conditions(results),
        "commands": lambda: "\n".join(["```", *results.commands, "```"]),
    }


def fill(text: str, results: Results, published: Published | None = None) -> str:
    """`text` with its places filled.

    Raises:
        PT2Error: no place, or one with an unknown name.
    """
    known = texts(results, published)

    def put(match: re.Match[str]) -> str:
        if match[2] not in known:
            raise PT2Error(f"unknown table {match[2]!r}: known are {', '.join(known)}")
        return f"{match[1]}\n{known[match[2]]()}\n\n{match[3]}"

    filled, count = _PLACE.subn(put, text)
    if not count:
        raise PT2Error(
            "no place for a table; write <!-- pt2-bench: speed --> and <!-- end --> on lines of "
            "their own"
        )
    return filled


def fill_file(path: Path, results: Results, published: Published | None = None) -> None:
    """:func:`fill` for a file, in place (atomic)."""
    try:
        text = path.read_text("utf-8")
    except OSError as e:
        raise PT2Error(f"{path}: {e.strerror}; --fill needs a Markdown file that exists") from e
    try:
        write_text(path, fill(text, results, published))
    except PT2Error as e:
        raise PT2Error(f"{path}: {e}") from e
