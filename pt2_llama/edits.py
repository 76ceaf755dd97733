"""Anchored edits: small changes of existing files, loud when a file is not as expected.

An edit names a file, a piece of its text (the anchor) and what to do there. All anchors are looked
up in the *unmodified* file, so the order of a list does not matter and one edit cannot hide or
duplicate the anchor of another. Everything here is a pure function of strings.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import yaml

from pt2_core.errors import PT2Error
from pt2_llama import pinned

Action = Literal["replace", "before", "after"]
ACTIONS: tuple[Action, ...] = ("replace", "before", "after")
KEYS = {"file", "anchor", "occurrence", "why", *ACTIONS}


@dataclass(frozen=True)
class Edit:
    """One change of one file.

    Attributes:
        file: path relative to the source tree, with forward slashes.
        anchor: text that the unmodified file contains.
        action: "replace" puts ``text`` in the anchor's place; "before" and "after" insert ``text``
            as whole lines before the line where the anchor starts or after that where it ends.
        text: the new text.
        occurrence: 1-based number of the anchor's occurrence; None: it must be the only one.
        why: the reason, one line.
    """

    file: str
    anchor: str
    action: Action
    text: str
    occurrence: int | None = None
    why: str = ""


def parse_edits(text: str, name: str = "edits.yaml") -> list[Edit]:
    """Parse a list of edits; ``name`` is for messages.

    Raises:
        PT2Error: not YAML, not a list of mappings, an unknown or missing key, a wrong type, or a
            path that leaves the tree. The number of the edit is named.
    """
    try:
        items = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise PT2Error(f"{name} is not valid YAML: {' '.join(str(e).split())}") from e
    if items is None:
        return []
    if not isinstance(items, list):
        raise PT2Error(f"{name} must be a list of edits, not a {type(items).__name__}")
    return [_parse_one(item, f"{name}, edit {i}") for i, item in enumerate(items, 1)]


def _parse_one(item: Any, where: str) -> Edit:
    if not isinstance(item, dict):
        raise PT2Error(f"{where}: expected a mapping with file, anchor and an action")
    if unknown := sorted(map(str, set(item) - KEYS)):
        raise PT2Error(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(KEYS))}")
    actions = [a for a in ACTIONS if a in item]
    if len(actions) != 1:
        raise PT2Error(f"{where}: exactly one of replace, before and after is needed")
    for key in ("file", "anchor", actions[0]):
        if not isinstance(item.get(key), str):
            raise PT2Error(f"{where}: {key} must be a text")
    occurrence = item.get("occurrence")
    if occurrence is not None and (type(occurrence) is not int or occurrence < 1):
        raise PT2Error(f"{where}: occurrence must be a whole number from 1")
    path = PurePosixPath(item["file"])
    if path.is_absolute() or ".." in path.parts or path.as_posix() != item["file"]:
        raise PT2Error(f"{where}: {item['file']!r} must be a plain path inside the source tree")
    if not item["anchor"]:
        raise PT2Error(f"{where}: the anchor is empty")
    why = item.get("why", "")
    return Edit(
        item["file"], item["anchor"], actions[0], item[actions[0]], occurrence, str(why).strip()
    )


def find_anchor(text: str, edit: Edit) -> int:
    """Offset of the edit's anchor in ``text``.

    Raises:
        PT2Error: the anchor is missing, or occurs more often than the edit allows for.
    """
    found = []
    start = text.find(edit.anchor)
    while start >= 0:
        found.append(start)
        start = text.find(edit.anchor, start + 1)
    expected = f"expected the file of llama.cpp {pinned.LLAMA_COMMIT}"
    if not found:
        raise PT2Error(f"{edit.file}: anchor {_short(edit.anchor)} not found; {expected}")
    if edit.occurrence is None:
        if len(found) > 1:
            raise PT2Error(
                f"{edit.file}: anchor {_short(edit.anchor)} occurs {len(found)} times; make it "
                f"longer or give occurrence; {expected}"
            )
        return found[0]
    if edit.occurrence > len(found):
        raise PT2Error(
            f"{edit.file}: anchor {_short(edit.anchor)} occurs {len(found)} times, the edit wants "
            f"number {edit.occurrence}; {expected}"
        )
    return found[edit.occurrence - 1]


def _span(text: str, edit: Edit) -> tuple[int, int, str]:
    """Where an edit acts: (start, end, new text) replaces ``text[start:end]``."""
    at = find_anchor(text, edit)
    end = at + len(edit.anchor)
    if edit.action == "replace":
        return at, end, edit.text
    lines = edit.text if edit.text.endswith("\n") else edit.text + "\n"
    if edit.action == "before":
        line = text.rfind("\n", 0, at) + 1
        return line, line, lines
    # An anchor that ends with a newline ends on the line which that newline closes.
    newline = text.find("\n", end - 1)
    if newline < 0:
        return len(text), len(text), "\n" + lines
    return newline + 1, newline + 1, lines


def apply_edits(text: str, edits: Iterable[Edit]) -> str:
    """Apply all edits of one file to its unmodified text.

    Insertions at one place keep the order of the list.

    Raises:
        PT2Error: as :func:`find_anchor`, or two edits touch the same text.
    """
    spans = [(*_span(text, edit), edit) for edit in edits]
    spans.sort(key=lambda s: (s[0], s[1]))
    out = []
    done = 0
    previous: Edit | None = None
    for start, end, new, edit in spans:
        if start < done and previous is not None:
            raise PT2Error(
                f"{edit.file}: the edits at {_short(previous.anchor)} and {_short(edit.anchor)} "
                "overlap; merge them"
            )
        out += [text[done:start], new]
        done = end
        previous = edit
    return "".join(out) + text[done:]


def _short(anchor: str, limit: int = 60) -> str:
    line = " ".join(anchor.split())
    return repr(line if len(line) <= limit else line[: limit - 3] + "...")
