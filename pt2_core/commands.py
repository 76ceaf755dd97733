"""Commands that messages suggest: quoted, so that they can be pasted into a shell."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import PurePath


def command(*words: str | PurePath | int | float) -> str:
    """A command line for a POSIX shell.

    Args:
        words: the program, its options and its arguments, each as the program is to get it. A path
            is to be given as a Path: where its name begins with a dash it gets ``./`` in front, so
            that no program takes it for an option.

    >>> command("pt2-export", "model.gguf", "--from", PurePath("my model"))
    "pt2-export model.gguf --from 'my model'"
    """
    return shlex.join(_word(w) for w in words)


def _word(word: str | PurePath | int | float) -> str:
    text = str(word)
    if isinstance(word, PurePath) and text.startswith("-"):
        return os.path.join(".", text)
    return text


def resume_command(program: str, argv: Sequence[str] | None) -> str:
    """The command that takes up the run of ``program`` with these arguments.

    Args:
        program: its name, or several words such as ``python -m quantize.ablate``.
        argv: its arguments; None takes this process'. ``--overwrite``, which excludes
            ``--resume``, is left out.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    # After a lone "--" there are no options, so --resume goes in front of it.
    end = given.index("--") if "--" in given else len(given)
    options = [w for w in given[:end] if w not in ("--overwrite", "--resume")]
    return command(*program.split(), *options, "--resume", *given[end:])
