"""Text for the user's screen, whatever its encoding, and the consoles that show it as it is.

Paths and messages may hold ``[b]``, ``:smile:``, bytes that are not UTF-8, or signs that an ASCII
terminal does not have. None of these may change what is shown, or end a run in an exception.
"""

from __future__ import annotations

import codecs
import os
import sys
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_ERRORS = "pt2-printable"
_ASCII = {"±": "+-", "≈": "~", "×": "x", "–": "-", "—": "-", "−": "-", "…": "...", "→": "->",
          "≤": "<=", "≥": ">=", "α": "alpha", "μ": "mu", "µ": "u", "•": "*"}  # fmt: skip


def make_printable() -> None:
    """Let stdout and stderr take any text: signs they lack are written in ASCII."""
    codecs.register_error(_ERRORS, _replace)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=_ERRORS)


def screen(*, stderr: bool = False, file: IO[str] | None = None, **more: Any) -> Console:
    """A rich console that shows text as it is: no markup, no emoji codes, no highlighting.

    Colours are given by ``style=``. Pass a ``Text`` for more than one style in a line.
    """
    from rich.console import Console

    plain = {"markup": False, "emoji": False, "highlight": False}
    return Console(file=file, stderr=stderr, **{**plain, **more})


def foreign_name(error: UnicodeError) -> str | None:
    """The part of a path that is not UTF-8, as ``'mod\\xff'``, if an error is about one."""
    text = getattr(error, "object", None)
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    if not isinstance(text, str) or not any("\udc80" <= c <= "\udcff" for c in text):
        return None
    name = next(p for p in text.split(os.sep) if any("\udc80" <= c <= "\udcff" for c in p))
    return repr(name.encode("utf-8", "surrogateescape"))[1:]


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    piece = error.object[error.start : error.end]
    out = b"".join(_sign(c) for c in piece)
    return out, error.end


def _sign(c: str) -> bytes:
    if "\udc80" <= c <= "\udcff":  # a byte of a file name, as it is
        return bytes([ord(c) - 0xDC00])
    return _ASCII.get(c, c.encode("ascii", "backslashreplace").decode()).encode("ascii")
