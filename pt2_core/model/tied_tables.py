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
from pt2_core.model.architectures import EMBEDDING, HEAD
from pt2_core.safetensors_file import TensorInfo, header_bytes

_PIECE = 1 << 24  # elements compared at a time


def decide_tied(
    path: Path, flag: bool, tensors: Mapping[str, TensorInfo], home: Mapping[str, str]
) -> tuple[bool, list[str]]:
    """Whether one table serves as embeddings and head, and what to say about it.

    Raises:
        PT2Error: there are no embeddings, or no head although the flag does not tie.
    """
    if EMBEDDING not in tensors:
        raise PT2Error(
            f"{path} has no tensor {EMBEDDING}: load it with transformers and save it again with "
            "save_pretrained"
        )
    if HEAD not in tensors:
        if not flag:
            raise PT2Error(
                f"{path} has no tensor {HEAD}, and config.json does not tie the head to the "
                "embeddings (tie_word_embeddings): give the missing file, or set it to true if "
                "the model was trained so"
            )
        return True, []
    if not flag:
        return False, []
    if tensors[EMBEDDING].shape == tensors[HEAD].shape and _equal(path, tensors, home):
        return True, [f"dropped {HEAD}: it equals {EMBEDDING}, and tie_word_embeddings is true"]
    return False, [
        f"ignored tie_word_embeddings of config.json: {HEAD} is stored and differs from "
        f"{EMBEDDING}, so the two are not tied"
    ]


def _equal(path: Path, tensors: Mapping[str, TensorInfo], home: Mapping[str, str]) -> bool:
    maps = [_map(path / home[n], tensors[n]) for n in (EMBEDDING, HEAD)]
    same_kind = tensors[EMBEDDING].dtype == tensors[HEAD].dtype
    for at in range(0, maps[0].size, _PIECE):
        a, b = (m[at : at + _PIECE] for m in maps)
        if same_kind and np.array_equal(a, b):
            continue
        if not np.array_equal(_float(a, tensors[EMBEDDING].dtype), _float(b, tensors[HEAD].dtype)):
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
