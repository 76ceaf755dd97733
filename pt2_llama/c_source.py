"""Where a function, switch or table of a C or C++ source ends.

Not a parser: comments, literals and preprocessor lines are blanked, and braces are counted in what
is left. That is enough to say which text lies in the body of ``ggml_compute_forward_add(``, and
where it is not enough the answer is "no such body", never another one's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

_TOKEN = re.compile(
    r"""
      //(?:\\\n|[^\n])*
    | /\*.*?\*/
    | (?:\b(?:u8|[uUL]))?R"(?P<raw>[^()\\\s]{0,16})\(.*?\)(?P=raw)"
    | "(?:\\.|[^"\\\n])*"
    | (?<![0-9A-Za-z_])'(?:\\.|[^'\\\n])+'   # not the ' in 1'000
    | ^[ \t]*\#(?P<directive>(?:\\\n|/\*.*?\*/|[^\n])*)
    """,
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
_FIRST_COLUMN = re.compile(r"^(?:[A-Za-z_][^\n]*|\})", re.MULTILINE)
_WORDS = re.compile(r"\s*(\w+)\s*(\w*)")


@lru_cache(maxsize=8)
def blanked(text: str) -> str:
    """``text`` with blanks for all that is no code; its length and its line breaks stay.

    Of ``#if`` and ``#else`` the first branch counts (of ``#if 0`` the second), for the braces of
    both together do not balance.
    """
    out: list[str] = []
    done = 0
    branches: list[_Branches] = []
    for match in _TOKEN.finditer(text):
        out.append(_hide(text[done : match.start()], any(b.hidden for b in branches)))
        out.append(_hide(match[0]))
        done = match.end()
        if (directive := match["directive"]) is not None:
            _follow(directive, branches)
    out.append(_hide(text[done:], any(b.hidden for b in branches)))
    return "".join(out)


@dataclass
class _Branches:
    """An open ``#if``: whether its current branch is left out, and whether one has been shown."""

    hidden: bool
    shown: bool


def _hide(text: str, hide: bool = True) -> str:
    return re.sub(r"[^\n]", " ", text) if hide else text


def _follow(directive: str, branches: list[_Branches]) -> None:
    """Keep the open branches in step with one preprocessor line (without its ``#``)."""
    match = _WORDS.match(directive)
    name, argument = match.groups() if match else ("", "")
    if name in ("if", "ifdef", "ifndef"):
        never = name == "if" and argument == "0"
        branches.append(_Branches(hidden=never, shown=not never))
    elif name in ("else", "elif", "elifdef", "elifndef") and branches:
        branches[-1] = _Branches(hidden=branches[-1].shown, shown=True)
    elif name == "endif" and branches:
        branches.pop()


def bodies(text: str, head: str) -> list[tuple[int, int]]:
    """Spans ``text[start:end]``, braces included, of the bodies that begin with ``head``.

    One does where ``head`` is code and an opening brace comes before what ends a statement:
    so in a definition, not in a prototype or a call.

    Args:
        head: text of the source, such as ``ggml_compute_forward_add(`` or ``case GGML_OP_SUM: {``.
            It may end before the brace, with it, or in the middle of the parameters.
    """
    code = blanked(text)
    found = []
    at = text.find(head)
    first = len(head) - len(head.lstrip())
    while at >= 0:
        is_code = not code[at + first].isspace()
        if is_code and (start := _opening(code, at)) is not None:
            found.append((start, _closing(code, start)))
        at = text.find(head, at + 1)
    return found


def _opening(code: str, at: int) -> int | None:
    """Offset of the brace that opens the body of what begins at ``at``."""
    depth = 0
    for match in re.compile(r"[(){};\[\]]").finditer(code, at):
        c = match[0]
        if c in "([":
            depth += 1
        elif c in ")]":
            depth -= 1
        elif depth == 0:
            return match.start() if c == "{" else None
        if depth < 0:
            return None  # ``at`` lies within the parentheses of a call
    return None


def _closing(code: str, start: int) -> int:
    """Offset behind the brace that closes the one at ``start``; the end of a text without one."""
    depth = 0
    for match in re.compile(r"[{}]").finditer(code, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.end()
    return len(code)


def line_of(text: str, at: int) -> int:
    """1-based number of the line that offset ``at`` is in."""
    return text.count("\n", 0, at) + 1


def outermost(text: str, at: int) -> str:
    """The line with which the function or table around offset ``at`` begins; "" outside of all.

    It is the last line before ``at`` that begins in the first column with a name, and none if a
    closing brace in the first column comes after it: how llama.cpp, and most C++, is written.
    """
    found = ""
    for match in _FIRST_COLUMN.finditer(blanked(text), 0, at):
        found = "" if match[0] == "}" else text[match.start() : match.end()].strip()
    return found
