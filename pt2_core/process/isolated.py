"""Start a Python child that imports nothing from the folder that the user happens to stand in.

``python -m module`` and ``python -c`` put the working folder first in the child's search path, so a
user's ``yaml.py`` would run in place of the library. Children are started with ``-I`` instead: no
working folder, no PYTHON* variables, no sitecustomize of theirs. What the parent finds its own
libraries with is handed over, less the working folder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path


def isolated(script: Path, arguments: Sequence[str]) -> list[str]:
    """The command that runs a script of ours by its path, apart from the working folder."""
    return [sys.executable, "-I", str(script), *arguments]


def search_path() -> list[str]:
    """The parent's search path without the working folder, for the child's ``sys.path``."""
    here = os.path.realpath(os.getcwd())
    return [p for p in sys.path if p and os.path.isabs(p) and os.path.realpath(p) != here]


def child_env() -> dict[str, str]:
    """The environment of such a child: nothing is fetched, and nothing is written beside it."""
    drop = ("PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME")
    kept = {k: v for k, v in os.environ.items() if k not in drop}
    more = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**kept, **more}
