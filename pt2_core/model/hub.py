"""A model by its name on the Hugging Face hub: ``ORG/NAME`` becomes a folder of the hub's cache.

Everything is huggingface_hub's: the cache (``HF_HOME``, ``HF_HUB_CACHE``), ``HF_HUB_OFFLINE``, the
token (``HF_TOKEN``, ``hf auth login``), progress, and resuming what was cut off. Only files that
count are fetched: settings, tokenizer, card and licence, and of the weights one set of safetensors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pt2_core.errors import PT2Error, one_line
from pt2_core.files import read_json
from pt2_core.model.weight_files import INDEX, SINGLE
from pt2_core.progress import say

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Not "*.json" alone: folders below (onnx, original) hold other forms of the model.
SMALL_FILES = (
    "*.json", "*.jinja", "*.txt", "*.model", "README.md", "LICENSE*", "USE_POLICY*", "NOTICE*",
)  # fmt: skip
NOT_BELOW = ("*/*",)
_SNAPSHOT = re.compile(r"models--(.+?)--(.+)/snapshots/([0-9a-f]{7,64})$")


def model_folder(model: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of a model that is given by its folder or by its name on the hub.

    A folder that exists counts as one, whatever its name.

    Args:
        revision: branch, tag or commit on the hub (None: its main branch).

    Raises:
        PT2Error: a revision is given with a folder, or the hub's model cannot be had.
    """
    path = Path(model)
    if path.exists() or not NAME.fullmatch(os.fspath(model)):
        if revision is not None:
            raise PT2Error(
                f"--revision {revision} belongs to a name on the hub, and {path} is none"
            )
        return path
    return download(os.fspath(model), revision)


def download(name: str, revision: str | None = None) -> Path:
    """The snapshot of a hub's model in the cache, complete as far as it counts.

    Raises:
        PT2Error: no such model or revision, no access, or no connection.
    """
    with _explained(name, revision):
        folder = _snapshot(name, revision, SMALL_FILES)
        # The commit of the first answer: a branch may move between two of them.
        for patterns in (_weights(folder), ["*.safetensors"]):
            _snapshot(name, folder.name, patterns)
            if any(folder.glob("*.safetensors")):
                break
    if not any(folder.glob("*.safetensors")):
        raise PT2Error(f"{name} on the hub has no safetensors: there is nothing to read it from")
    say(f"{name} is in {folder}")
    return folder


def _snapshot(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    got = snapshot_download(
        name, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(NOT_BELOW)
    )
    return Path(str(got))


def _weights(folder: Path) -> list[str]:
    """The weights to fetch: those that the index names, else the usual name."""
    if not (folder / INDEX).is_file():
        return [SINGLE]
    index = read_json(folder / INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    files = sorted({n for n in names.values() if isinstance(n, str)}) if names else []
    if not files or any("/" in n or any(c in n for c in "*?[") for n in files):
        raise PT2Error(f"{folder / INDEX} names no weights beside it: it is damaged")
    return files


def hub_name(folder: Path) -> tuple[str, str] | None:
    """(``ORG/NAME``, commit) of a folder that is a snapshot in the hub's cache, else None."""
    match = _SNAPSHOT.search(folder.absolute().as_posix())
    return (f"{match[1]}/{match[2]}", match[3]) if match else None


def model_name(folder: Path) -> str:
    """What a model is called: its name on the hub without the owner, else its folder's name."""
    found = hub_name(folder)
    return found[0].split("/")[1] if found else Path(os.path.abspath(folder)).name


@contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    """Turn the hub's errors into one line with what to do."""
    from huggingface_hub import errors

    at = f"{name} at {revision}" if revision else name
    words: tuple[tuple[type[Exception], str], ...] = (
        (
            errors.GatedRepoError,
            f"{name} is gated: accept its terms on its page, then: hf auth login (or set HF_TOKEN)",
        ),
        (errors.RevisionNotFoundError, f"the hub's {name} has no revision {revision}"),
        (
            errors.RepositoryNotFoundError,
            f"there is no folder {name}, and no such model on the hub; for a private one: hf auth "
            "login (or set HF_TOKEN)",
        ),
        (
            errors.LocalEntryNotFoundError,
            f"there is no folder {name}, and {at} is not in the hub's cache and the hub cannot be "
            "reached (HF_HUB_OFFLINE, or no connection)",
        ),
    )
    try:
        yield
    except PT2Error:
        raise
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as e:
        for kind, text in words:
            if isinstance(e, kind):
                raise PT2Error(text) from e
        raise PT2Error(f"{at} cannot be had from the hub: {one_line(str(e))[:300]}") from e
