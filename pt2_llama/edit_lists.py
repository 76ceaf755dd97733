"""The lists of edits as YAML: ``edits.yaml`` and its neighbours. docs/design.md has the format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import yaml

from pt2_core import formats
from pt2_core.errors import PT2Error
from pt2_llama.edits import ACTIONS, Edit

KEYS = {"file", "anchor", "for", "inside", "why", *ACTIONS}
FOR = ("types", "activations", "once")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


def parse_edits(text: str, name: str = "edits.yaml") -> list[Edit]:
    """Parse a list of edits; ``name`` is for messages.

    An item with several names under ``inside`` gives one edit for each. The text of one with
    ``for`` is written for our types, see :func:`expand`.

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
    edits: list[Edit] = []
    for i, item in enumerate(items, 1):
        edits += _parse_one(item, f"{name}, edit {i}")
    return edits


def _parse_one(item: Any, where: str) -> list[Edit]:
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
    path = PurePosixPath(item["file"])
    if path.is_absolute() or ".." in path.parts or path.as_posix() != item["file"]:
        raise PT2Error(f"{where}: {item['file']!r} must be a plain path inside the source tree")
    if not item["anchor"]:
        raise PT2Error(f"{where}: the anchor is empty")
    text = item[actions[0]]
    if "for" in item:
        try:
            text = expand(text, item["for"])
        except ValueError as e:
            raise PT2Error(f"{where}: {e}") from e
    why = str(item.get("why", "")).strip()
    return [
        Edit(item["file"], item["anchor"], actions[0], text, inside, why, where)
        for inside in _insides(item, where)
    ]


def expand(text: str, what: object) -> str:
    """A text with placeholders, written for our types.

    Args:
        text: placeholders are ``{count}``, one more than the largest id, and of a type what
            :func:`placeholders` has. Other words in braces are refused: a C initialiser of one
            word is written with blanks, ``{ word }``.
        what: ``types``: once per type of weights, one after another; ``activations``: once per type
            that is never in a file; ``once``: as it is, with ``{count}`` alone.

    Raises:
        ValueError: an unknown placeholder, or another ``what``.
    """
    weights = list(formats.TYPES.values())
    if what == "types":
        return "".join(_fill(text, placeholders(t)) for t in weights)
    if what == "activations":
        return "".join(_fill(text, placeholders(t)) for t in formats.ALL if t not in weights)
    if what == "once":
        return _fill(text, _COMMON)
    raise ValueError(f"for: is one of {', '.join(FOR)}, not {what!r}")


_COMMON = {"count": str(1 + max(t.id for t in formats.ALL))}


def placeholders(kind: type[formats.BlockType]) -> dict[str, str]:
    """What ``{NAME}``, ``{name}`` and others stand for in the text of an edit."""
    values: dict[str, object] = {
        "NAME": kind.name,
        "name": kind.ggml_name,
        "id": kind.id,
        "block": kind.block,
        "bytes": kind.nbytes,
        "sizes": " + ".join(map(str, kind.fields.values())),
        "bpw": f"{kind.bpw():g}",
        "comment": kind.comment,
    }
    if issubclass(kind, formats.TernaryType):
        values["file_type"] = kind.file_type
        values["layout"] = kind.layout
    return _COMMON | {name: str(value) for name, value in values.items()}


def _fill(text: str, values: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise ValueError(f"unknown placeholder {match[0]}; known are {', '.join(values)}")
        return values[match[1]]

    return _PLACEHOLDER.sub(value, text)


def _insides(item: dict[str, Any], where: str) -> list[str] | list[None]:
    """The bodies that an item names; [None] for the whole file."""
    if "inside" not in item:
        return [None]
    named = item["inside"]
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list) or not named or not all(isinstance(n, str) for n in named):
        raise PT2Error(f"{where}: inside must be a text, or a list of texts")
    if not all(n.strip() for n in named):
        raise PT2Error(f"{where}: a text of inside is empty")
    return named
