"""The table: one row a class, in the order of their names, and its place in README.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.zoo.expected import REASONS
from tests.zoo.whole import TYPES

BEGIN, END = "<!-- zoo: begin -->", "<!-- zoo: end -->"
Result = Mapping[str, Any]


def is_green(result: Result) -> bool:
    """Whether a class went through the whole path."""
    return "error" not in result


def header() -> str:
    """The table's first two lines."""
    names = " | ".join(t.upper() for t in TYPES)
    return f"| class | ternary | {names} | |\n|---|---|{'---|' * len(TYPES)}---|"


def row(name: str, result: Result) -> str:
    """A class's row: matrices that became ternary, KL of each type, or why there is none."""
    if not is_green(result):
        reason = REASONS.get(name) or result["error"]
        return f"| {name} | | {'| ' * len(TYPES)}{reason.replace('|', chr(92) + '|')} |"
    counts = str(result["ternary"]) + (f" of {result['ternary'] + result['kept']}"
                                       if result["kept"] else "")  # fmt: skip
    figures = " | ".join(f"{result[t]['kl']:.4f}" for t in TYPES)
    fallbacks = max(result[t]["fallbacks"] for t in TYPES)
    note = f"{fallbacks} in another type" if fallbacks else ""
    return f"| {name} | {counts} | {figures} | {note} |"


def text(results: Mapping[str, Result]) -> str:
    """The whole table with a sentence above it; classes without a result are in it by reason."""
    green = sum(map(is_green, results.values()))
    count = len({*results, *REASONS})
    told = (
        f"{green} of the {count} classes of causal language models that transformers and "
        "the pinned llama.cpp both know go through the whole path: a tiny random model of each is "
        "quantised, exported and run. The table, written by `python -m tests.zoo --write`, has the "
        "matrices that became ternary, and the KL divergence (nats per token) of our llama.cpp's "
        "predictions from those of transformers with the same dequantised weights."
    )
    waiting = {name: {"error": reason} for name, reason in REASONS.items()}
    rows = [row(name, value) for name, value in sorted({**waiting, **results}.items())]
    return "\n".join([told, "", "<details><summary>The table</summary>", "", header(), *rows, "",
                      "</details>"])  # fmt: skip


def put(readme: Path, results: Mapping[str, Result]) -> None:
    """Write the table between its markers in a file.

    Raises:
        ValueError: the file has no such markers.
    """
    whole = readme.read_text(encoding="utf-8")
    before, _, rest = whole.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{readme} has no place for the table: {BEGIN} ... {END}")
    readme.write_text(f"{before}{BEGIN}\n{text(results)}\n{END}{after}", encoding="utf-8")


def problems(results: Mapping[str, Result]) -> list[str]:
    """Where the outcomes are not those of the committed list, one line each."""
    found = []
    for name, result in sorted(results.items()):
        if is_green(result) and name in REASONS:
            found.append(f"{name} is green now: take it out of tests/zoo/expected.py")
        elif not is_green(result) and name not in REASONS:
            found.append(f"{name}: {result['error']}")
    return found
