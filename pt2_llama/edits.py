"""Anchored edits: small changes of existing files, loud when a file is not as expected.

An edit names a file, a piece of its text (the anchor) and what to do there. All anchors are looked
up in the *unmodified* file, so the order of a list does not matter and one edit cannot hide or
duplicate the anchor of another. Everything here is a pure function of strings.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pt2_core.errors import PT2Error
from pt2_llama import pinned
from pt2_llama.c_source import bodies, line_of

Action = Literal["replace", "before", "after"]
ACTIONS: tuple[Action, ...] = ("replace", "before", "after")
NEAR_LINES, NEAR_RATIO = 2, 0.6


@dataclass(frozen=True)
class Edit:
    """One change of one file.

    Attributes:
        file: path relative to the source tree, with forward slashes.
        anchor: text that the unmodified file contains once.
        action: "replace" puts ``text`` in the anchor's place; "before" and "after" insert ``text``
            as whole lines before the line where the anchor starts or after that where it ends.
        text: the new text.
        inside: the head of the function, switch or table that the anchor is looked up in, and
            where alone it must occur once; None: the whole file.
        why: the reason, one line.
        where: the list and the number of the edit, for messages.
    """

    file: str
    anchor: str
    action: Action
    text: str
    inside: str | None = None
    why: str = ""
    where: str = ""


@dataclass(frozen=True)
class Misfit:
    """An edit that does not fit its file.

    Attributes:
        edit: the edit.
        what: what is wrong.
        elsewhere: numbers of the lines where the anchor stands, but may not.
        near: lines of the file that resemble the anchor, with their numbers.
    """

    edit: Edit
    what: str
    elsewhere: tuple[int, ...] = ()
    near: tuple[tuple[int, str], ...] = ()

    def __str__(self) -> str:
        where = f"{self.edit.where}: " if self.edit.where else ""
        text = f"{where}{self.edit.file}: {self.what}"
        if self.elsewhere:
            text += f"; it stands in line {', '.join(map(str, self.elsewhere[:5]))}"
        for number, line in self.near:
            text += f"; nearest: line {number}, {short(line)}"
        return text


class EditsDoNotFit(PT2Error):
    """Some edits do not fit the source; ``misfits`` has them all."""

    def __init__(self, misfits: Sequence[Misfit]) -> None:
        self.misfits = tuple(misfits)
        count = f"{len(misfits)} edits do not fit: " if len(misfits) > 1 else ""
        listed = " | ".join(map(str, misfits))
        super().__init__(f"{count}{listed}; expected the files of llama.cpp {pinned.LLAMA_COMMIT}")


def find_anchor(text: str, edit: Edit) -> int | Misfit:
    """Offset of the edit's anchor in ``text``, or why there is none."""
    everywhere = _occurrences(text, edit.anchor)
    name = f"anchor {short(edit.anchor)}"
    if not everywhere:
        return Misfit(edit, f"{name} not found", near=nearest_lines(text, edit.anchor))
    lines = tuple(line_of(text, at) for at in everywhere)
    if edit.inside is None:
        if len(everywhere) > 1:
            what = f"{name} occurs {len(everywhere)} times; make it longer or say inside what"
            return Misfit(edit, what, lines)
        return everywhere[0]
    found = bodies(text, edit.inside)
    if len(found) != 1:
        what = f"{short(edit.inside)} begins {len(found)} bodies and not one"
        return Misfit(edit, what, near=() if found else nearest_lines(text, edit.inside))
    start, end = found[0]
    within = [at for at in everywhere if start <= at and at + len(edit.anchor) <= end]
    if len(within) != 1:
        what = f"{name} occurs {len(within)} times inside {short(edit.inside)}"
        return Misfit(edit, what, lines if not within else tuple(line_of(text, x) for x in within))
    return within[0]


def _occurrences(text: str, anchor: str) -> list[int]:
    """Offsets of ``anchor``, overlapping ones as well."""
    found = []
    at = text.find(anchor)
    while at >= 0:
        found.append(at)
        at = text.find(anchor, at + 1)
    return found


def nearest_lines(text: str, wanted: str) -> tuple[tuple[int, str], ...]:
    """The lines that most resemble the first line of ``wanted`` that ``text`` does not have.

    Returns:
        (1-based number, line without its indentation), the nearest first; () where nothing is near.
    """
    numbers: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        numbers.setdefault(line.strip(), number)
    lines = [line.strip() for line in wanted.splitlines() if line.strip()]
    missing = [line for line in lines if line not in numbers]
    if not missing:  # all of them are there, but not one after another
        return tuple((numbers[line], line) for line in lines[:NEAR_LINES])
    near = difflib.get_close_matches(missing[0], numbers, NEAR_LINES, NEAR_RATIO)
    return tuple((numbers[line], line) for line in near)


def _span(text: str, edit: Edit, at: int) -> tuple[int, int, str]:
    """What an edit with its anchor at ``at`` does: (start, end, new) replaces text[start:end]."""
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


def try_edits(text: str, edits: Iterable[Edit]) -> tuple[str, list[Misfit]]:
    """The edits of one file applied to its unmodified text, and those that do not fit.

    Insertions at one place keep the order of the list. What does not fit is left out of the text.
    """
    spans = []
    misfits = []
    for edit in edits:
        at = find_anchor(text, edit)
        if isinstance(at, Misfit):
            misfits.append(at)
        else:
            spans.append((*_span(text, edit, at), edit))
    spans.sort(key=lambda s: (s[0], s[1]))
    out = []
    done = 0
    previous: Edit | None = None
    for start, end, new, edit in spans:
        if start < done and previous is not None:
            what = f"the edits at {short(previous.anchor)} and {short(edit.anchor)} overlap"
            misfits.append(Misfit(edit, f"{what}; merge them"))
            continue
        out += [text[done:start], new]
        done = end
        previous = edit
    return "".join(out) + text[done:], misfits


def apply_edits(text: str, edits: Iterable[Edit]) -> str:
    """Apply all edits of one file to its unmodified text, as :func:`try_edits`.

    Raises:
        EditsDoNotFit: with every anchor that is missing or ambiguous, and every overlap.
    """
    new, misfits = try_edits(text, edits)
    if misfits:
        raise EditsDoNotFit(misfits)
    return new


def short(anchor: str, limit: int = 60) -> str:
    """An anchor's first line that is not blank, quoted; dots for what else it has."""
    lines = [line.strip() for line in anchor.splitlines() if line.strip()]
    line = lines[0] if lines else ""
    cut = line[:limit]
    return repr(cut + "..." if len(lines) > 1 or cut != line else line)
