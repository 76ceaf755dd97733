"""Whether a model's embeddings are its head too, decided as transformers 5 does. Free of torch.

The flag ``tie_word_embeddings`` ties the two only where the files hold no other head: with both
stored, equal tables are one and different ones stay two.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pt2_core.errors import PT2Error
from pt2_core.safetensors_file import TensorInfo, header_bytes

# What most architectures call them.
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_PIECE = 1 << 24  # elements compared at a time


def decide_tied(
    path: Path, flag: bool | None, tensors: Mapping[str, TensorInfo], home: Mapping[str, str],
    embedding: str = EMBEDDING, head: str = HEAD,
) -> tuple[bool, list[str]]:  # fmt: skip
    """Whether one table serves as embeddings and head, and what to say about it.

    Args:
        flag: ``tie_word_embeddings``; None where ``config.json`` is silent.
        embedding, head: the names of the two tables.

    Raises:
        PT2Error: there is no head although the flag says that the two are not tied.
    """
    if head not in tensors:
        if flag is False:
            raise PT2Error(no_head(path, head))
        return True, []
    if not flag:
        return False, []
    if tensors[embedding].shape == tensors[head].shape and _equal(
        path, tensors, home, (embedding, head)
    ):
        return True, [f"dropped {head}: it equals {embedding}, and tie_word_embeddings is true"]
    return False, [
        f"ignored tie_word_embeddings of config.json: {head} is stored and differs from "
        f"{embedding}, so the two are not tied"
    ]


def no_head(path: Path, head: str) -> str:
    """What is wrong where a model has no head."""
    return (
        f"{path} has no tensor {head}, and config.json does not tie the head to the "
        "embeddings (tie_word_embeddings): give the missing file, or set it to true if "
        "the model was trained so"
    )


def _equal(
    path: Path, tensors: Mapping[str, TensorInfo], home: Mapping[str, str], names: tuple[str, str]
) -> bool:
    one, other = names
    maps = [_map(path / home[n], tensors[n]) for n in names]
    same_kind = tensors[one].dtype == tensors[other].dtype
    for at in range(0, maps[0].size, _PIECE):
        a, b = (m[at : at + _PIECE] for m in maps)
        if same_kind and np.array_equal(a, b):
            continue
        if not np.array_equal(_float(a, tensors[one].dtype), _float(b, tensors[other].dtype)):
            return False
    return True


def _map(file: Path, info: TensorInfo) -> NDArray[np.generic]:
    """A tensor's elements as they lie in the file; BF16 as uint16."""
    kind = {"F32": "<u4", "F16": "<u2", "BF16": "<u2"}[info.dtype]
    count = (info.end - info.begin) // np.dtype(kind).itemsize
    if count == 0:
        return np.empty(0, kind)
    return np.memmap(file, kind, "r", offset=header_bytes(file) + info.begin, shape=(count,))


def _float(bits: NDArray[np.generic], dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":
        return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)
    return np.asarray(bits).view("<f4" if dtype == "F32" else "<f2").astype(np.float32)
