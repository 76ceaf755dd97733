"""Whether an artifact and a model belong together: asked here by every command that takes both."""

from __future__ import annotations

from collections.abc import Callable

from pt2_core.artifact.folder import Artifact
from pt2_core.errors import PT2Error
from pt2_core.model.checkpoint import Checkpoint


def check_made_from(
    artifact: Artifact,
    model: Checkpoint,
    option: str = "--model",
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Refuse a model that is not the one that an artifact was made from.

    Args:
        option: what gives the command another folder.
        progress: called with the number of bytes after each piece of the model that is read; not
            at all where the model's checksum is remembered.

    Raises:
        PT2Error: the model's files differ from those that the quantiser read.
    """
    found, _ = model.fingerprint(progress=progress)
    if found != artifact.manifest["model"].get("fingerprint"):
        raise PT2Error(
            f"{artifact.path} was not made from the model in {model.path} (its files are others): "
            f"give the right one with {option} DIR"
        )
