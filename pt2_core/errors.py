"""What a user can mend, in one line: the error type of the whole project."""

from __future__ import annotations

import errno
import re
import resource

MAX_MESSAGE = 4000


class PT2Error(Exception):
    """Something the user can mend. The message is one line: what, where, what to do.

    Names out of files come into messages, so line breaks and control characters are made harmless
    here, and a name of a megabyte is cut.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """``text`` on one line of printable characters and tabs, its middle left out if it is long."""
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE // 2]} ... {text[-MAX_MESSAGE // 2 :]}"
    # Blanks and tabs within a path stay as they are, for a command in a message is pasted.
    line = re.sub(r"\s*[^\S \t]\s*", " ", text).strip()
    return "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in line)


def reason(e: OSError, full: str = "") -> str:
    """An error of the system in words: what is wrong, and what to do.

    Args:
        full: what to say of a full disk instead.
    """
    full = full or "the disk is full; free some space or choose another output"
    hints = {
        errno.ENOSPC: full,
        errno.EDQUOT: "the disk quota is used up; free some space or choose another output",
        errno.EFBIG: "the file is larger than files may be here (see ulimit -f)",
        errno.EACCES: "permission denied; choose a place you may write to",
        errno.EPERM: "permission denied; choose a place you may write to",
        errno.EROFS: "the file system is read-only; choose another output",
        errno.ENOENT: "no such file or folder",
        errno.EISDIR: "it is a folder",
        errno.ENOTDIR: "a part of the path is not a folder",
        errno.ELOOP: "its links lead in a circle",
        errno.EIO: "the device fails (input/output error)",
    }
    if e.errno is None and str(e).endswith("written"):  # NumPy's words for a short write
        limited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
        return f"{hints[errno.EFBIG]}, or the disk is full" if limited else full
    return hints.get(e.errno or 0, e.strerror or str(e))
