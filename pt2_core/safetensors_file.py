"""Check a safetensors file before anything is read from it.

The layout (https://github.com/huggingface/safetensors#format): eight bytes with the header's
length, the header as JSON, then the tensors' bytes. The library maps the file lazily, so that a
truncated copy may be noticed only in the middle of a long run; here lengths and offsets are checked
first.
Free of torch and numpy.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pt2_core.errors import PT2Error

# Less than 1: two values in a byte, or four in three.
ITEM_BYTES: dict[str, float] = {
    "F4": 0.5, "F6_E2M3": 0.75, "F6_E3M2": 0.75,
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000
MAX_HEADER_VALUES = 1 << 22  # of 300 thousand tensors
MAX_DIMS = 8  # of a tensor; the product of millions of sizes takes minutes


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a header: the format's own dtype name, its shape, its place in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """Read and check the header of a safetensors file.

    Returns:
        tensor name -> :class:`TensorInfo`, in the order of the names.

    Raises:
        PT2Error: the file is missing, truncated or too long, or its header is broken: no JSON,
            a name twice, an unknown dtype, a size that is no whole number or does not fit the
            shape, more than MAX_DIMS dimensions, gaps or overlaps.
    """
    path = Path(path)
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode) and not stat.S_ISDIR(state.st_mode):
            raise _broken(path, "it is no regular file")
        size = state.st_size
        with path.open("rb") as f:
            first = f.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            if len(first) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise _broken(path, f"its header does not fit in its {size} bytes")
            text = f.read(length)
    except OSError as e:
        raise PT2Error(f"cannot read {path}: {e.strerror}") from e
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > MAX_HEADER_VALUES:
        raise _broken(path, "its header lists more than a model can have")
    try:
        raw = json.loads(text, object_pairs_hook=_names_once)
        _check_notes(raw.pop("__metadata__", {}))
        tensors = {k: _tensor(v) for k, v in raw.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise _broken(path, "its header is not a valid list of tensors") from e
    _check_layout(path, tensors, size - 8 - length)
    return dict(sorted(tensors.items()))


def header_bytes(path: str | os.PathLike[str]) -> int:
    """Where the tensors' bytes begin in a file that :func:`read_header` has read."""
    with Path(path).open("rb") as f:
        return 8 + int(struct.unpack("<Q", f.read(8))[0])


def _names_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(value := dict(pairs)) < len(pairs):
        raise ValueError("a name twice")
    return value


def _check_notes(value: Any) -> None:
    if not all(isinstance(v, str) for v in value.values()):
        raise ValueError("metadata that are not texts")


def _tensor(value: dict[str, Any]) -> TensorInfo:
    begin, end = (_size(n) for n in value["data_offsets"])
    shape = value["shape"]
    if not isinstance(shape, list) or len(shape) > MAX_DIMS:
        raise ValueError("a shape that no tensor has")
    if not isinstance(value["dtype"], str):
        raise ValueError("no dtype")
    return TensorInfo(value["dtype"], tuple(_size(n) for n in shape), begin, end)


def _size(value: Any) -> int:
    """A size or an offset: a JSON integer, so no float and no bool, that 63 bits hold."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError("a size that is none")
    return value


def _check_layout(path: Path, tensors: dict[str, TensorInfo], data_bytes: int) -> None:
    """The tensors must cover the rest of the file exactly, without gaps or overlaps."""
    at = 0
    for name, t in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if t.dtype not in ITEM_BYTES:
            raise PT2Error(
                f"{path}: tensor {name} has the unknown dtype {t.dtype[:40]}; if the model is "
                "quantised, give the 16-bit model that it was made from"
            )
        if t.begin != at or t.end - t.begin != math.prod(t.shape) * ITEM_BYTES[t.dtype]:
            raise _broken(path, f"the bytes of tensor {name} do not fit its shape and place")
        at = t.end
    if at != data_bytes:
        kind = "truncated" if at > data_bytes else "longer than its header says"
        raise _broken(path, f"it is {kind} ({data_bytes} bytes of tensors, {at} expected)")


def _broken(path: Path, why: str) -> PT2Error:
    return PT2Error(f"{path} is not a whole safetensors file: {why}; copy or download it again")
