"""Read a written file back through llama.cpp's own dequantisers and compare it bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from export.encode import Item, TernaryRows
from export.ggml import Ggml
from export.writer import digest
from pt2_core import formats, upstream
from pt2_core.errors import PT2Error

_VALUES_AT_ONCE = 1 << 24


def verify_files(
    files: Sequence[Path],
    items: Sequence[Item],
    digests: Mapping[str, str],
    ternary: Callable[[Item, slice], TernaryRows],
    ggml: Ggml,
    step: Callable[[], None],
) -> None:
    """Check every tensor of the written files.

    All of them: type, shape, and the bytes that were meant to be written. Our own types: the
    weights that the C library decodes are those of the artifact, bit for bit, and so are Q2_0's and
    TQ2_0's but for the sign of a zero. Q2_K: the C library
    decodes the bytes as NumPy does.

    Args:
        files: one GGUF file or its splits.
        digests: tensor name -> SHA-256 of the bytes that were written.
        ternary: gives some rows of the artifact's weights for an item, read anew.
        step: called after each tensor.

    Raises:
        PT2Error: the first difference.
    """
    found = {}
    for file in files:
        for t in gguf.GGUFReader(file).tensors:
            found[t.name] = t
    if found.keys() != {i.tensor.name for i in items}:
        raise _differs("the list of tensors")
    for item in items:
        name = item.tensor.name
        t = found[name]
        if t.tensor_type != item.type or tuple(reversed(t.shape.tolist())) != item.tensor.shape:
            raise _differs(f"{name} (type or shape)")
        data = np.asarray(t.data)
        if digest(data) != digests[name]:
            raise _differs(f"{name} (bytes)")
        if item.tensor.ternary:
            compare_weights(name, data, item, ternary, ggml)
        step()


def compare_weights(
    name: str,
    data: NDArray[Any],
    item: Item,
    ternary: Callable[[Item, slice], TernaryRows],
    ggml: Ggml,
) -> None:
    """Compare a ternary weight as the C library decodes it with what it should be."""
    kind = item.type.name.lower()
    ours = kind in formats.TYPES
    theirs = kind in upstream.TYPES
    if not ours and not theirs and kind != "q2_k":
        return
    rows, cols = math.prod(item.tensor.shape[:-1]), item.tensor.shape[-1]
    data = data.reshape(rows, -1)
    chunk = max(1, _VALUES_AT_ONCE // cols)
    for first in range(0, rows, chunk):
        part = slice(first, min(first + chunk, rows))
        raw = data[part]
        actual = ggml.dequantize(raw, item.type)
        whole = (
            ternary(item, part).dequantize() if ours or theirs else gguf.dequantize(raw, item.type)
        )
        if theirs:  # d * 0 is -0 in C where d is negative, and +0 here
            actual, whole = actual + np.float32(0), whole + np.float32(0)
        if not np.array_equal(actual.view(np.uint32), whole.view(np.uint32)):
            raise _differs(f"{name} (weights)")


def check_blocks(data: NDArray[Any], kind: type[formats.TernaryType]) -> None:
    """Refuse a tensor with blocks that no encoder writes.

    What such bytes stand for is defined, so that they can have the values of good ones.

    Args:
        data: as gguf-py's reader has a tensor of this type, uint8 ``[..., row bytes]``.

    Raises:
        ValueError: the first of them.
    """
    rows = data.view(np.uint8).reshape(-1, data.shape[-1])
    chunk = max(1, _VALUES_AT_ONCE // (rows.shape[1] // kind.nbytes * kind.block))
    for first in range(0, len(rows), chunk):
        kind.check(rows[first : first + chunk], first)


def _differs(what: str) -> PT2Error:
    return PT2Error(
        f"the written file does not read back as it should: {what} differs; nothing was kept. "
        "Check the disk, and run pt2-llama doctor"
    )
