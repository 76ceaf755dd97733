"""Three levels or four: what a type can hold of an artifact, and what the file says of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

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


def wrong_levels(
    artifact: Artifact, fields: Mapping[str, Any], tensors: Iterable[Any]
) -> Iterator[str]:
    """What a file's metadata says wrongly of the levels of its types.

    Args:
        fields: the file's metadata.
        tensors: of gguf-py's reader.
    """
    for kind in sorted({t.tensor_type.name.lower() for t in tensors}):
        for key, levels in levels_entry(artifact, kind).items():
            if fields.get(key) != levels:
                yield f"{key} is {fields.get(key, 'missing')} in place of {levels}"


def levels_entry(artifact: Artifact, kind: str) -> dict[str, int]:
    """The metadata key that says that a type's fourth code is used; none with three levels."""
    levels = levels_of(artifact)
    if kind not in formats.TYPES or levels == 3:
        return {}
    return {formats.TYPES[kind].levels_key(): levels}
