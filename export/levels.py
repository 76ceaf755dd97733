"""Three levels or four: what a type can hold of an artifact, and what the file says of it."""

from __future__ import annotations

from pt2_core import formats
from pt2_core.artifact.folder import Artifact
from pt2_core.errors import PT2Error


def levels_of(artifact: Artifact) -> int:
    """The most levels that a matrix of the artifact has."""
    return max((m.get("levels", 3) for m in artifact.matrices.values()), default=3)


def check_levels(artifact: Artifact, kind: str) -> None:
    """Raise PT2Error where a type of ours has fewer codes than the artifact has levels."""
    levels = levels_of(artifact)
    if kind not in formats.TYPES or formats.TYPES[kind].levels >= levels:
        return
    others = [name for name, t in formats.TYPES.items() if t.levels >= levels]
    raise PT2Error(
        f"{artifact.path} has {levels} levels, {kind} holds {formats.TYPES[kind].levels}: "
        f"use --type {' or '.join([*others, 'q2_k'])}"
    )


def levels_entry(artifact: Artifact, kind: str) -> dict[str, int]:
    """The metadata key that says that a type's fourth code is used; none with three levels."""
    levels = levels_of(artifact)
    if kind not in formats.TYPES or levels == 3:
        return {}
    return {formats.TYPES[kind].levels_key(): levels}
