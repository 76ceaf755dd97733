"""Texts to measure on: files, and the test sets that GPTQ, PT2-LLM and their rivals report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantize.calibration import read_text
from quantize.common import PT2Error

# As GPTQ's scripts cut them: path, rows at most, column, what joins the rows, windows of 2048 used.
TEST_SETS: dict[str, dict[str, Any]] = {
    "wikitext2": {
        "load": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"},
        "rows": None, "column": "text", "join": "\n\n", "windows": None,
    },
    "c4": {
        "load": {
            "path": "allenai/c4", "split": "validation",
            "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
        },
        "rows": 1100, "column": "text", "join": " ", "windows": 256,
    },
}  # fmt: skip


def load_text(source: str) -> tuple[str, str, int | None]:
    """Read a text file, a folder of them, or a test set.

    Returns:
        (short name, text, windows of 2048 that the papers use of it, None for all)

    Raises:
        PT2Error: there is no such text, or the data set cannot be loaded.
    """
    if source in TEST_SETS and not Path(source).exists():
        entry = TEST_SETS[source]
        return source, _test_set(source), entry["windows"]
    if not Path(source).exists():
        raise PT2Error(f"no text {source!r}: give a text file, a folder, {', '.join(TEST_SETS)}")
    return Path(source).stem, read_text(source, 1 << 62)[0], None


def _test_set(name: str) -> str:
    entry = TEST_SETS[name]
    try:
        from datasets import load_dataset
    except ImportError as e:
        raise PT2Error(f"data set {name} needs: pip install 'pt2-llm[data]'") from e
    try:
        rows = load_dataset(**entry["load"], streaming=entry["rows"] is not None)
        if entry["rows"] is not None:
            rows = rows.take(entry["rows"])
        return entry["join"].join(row[entry["column"]] for row in rows)
    except Exception as e:  # offline, gone, or changed: datasets has many exceptions
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise PT2Error(
            f"data set {name} cannot be loaded ({first}); give a text file instead"
        ) from e
