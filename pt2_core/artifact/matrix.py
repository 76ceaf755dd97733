"""A ternary matrix of an artifact: codes, scales, offsets and the order of its columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pt2_core.errors import PT2Error

# Of a matrix in a block's file.
PARTS = {"ternary": np.uint8, "alpha": np.float16, "mu": np.float16, "perm": np.int32}

Array = npt.NDArray[Any]


def pack_ternary(t: Array) -> Array:
    """Pack int8 values of {-1, 0, 1, 2} ``[rows, cols]`` into uint8 ``[rows, cols/4]``.

    Code ``t + 1`` of column 4j+i is in bits 2i and 2i+1 of byte j. With three levels 2 is not used.

    Raises:
        ValueError: the number of columns is not a multiple of 4, or a value is another.
    """
    rows, cols = t.shape
    if cols % 4:
        raise ValueError(f"the number of columns must be a multiple of 4, not {cols}")
    codes = (t.astype(np.int8) + 1).view(np.uint8).reshape(rows, cols // 4, 4)
    if codes.size and codes.max() > 3:
        raise ValueError("values must be -1, 0, 1 or 2")
    return codes[..., 0] | codes[..., 1] << 2 | codes[..., 2] << 4 | codes[..., 3] << 6


def unpack_ternary(packed: Array) -> Array:
    """The inverse of :func:`pack_ternary`: uint8 ``[rows, cols/4]`` -> int8 ``[rows, cols]``."""
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8(3)
    return codes.reshape(packed.shape[0], -1).astype(np.int8) - np.int8(1)


@dataclass(frozen=True)
class TernaryMatrix:
    """One linear of few levels: ``W[:, perm[j]] ~ alpha[:, j // g] * T[:, j] + mu[:, j // g]``.

    Attributes:
        name: of the tensor in the source model's files, ``.weight`` left out, e.g.
            ``model.layers.3.self_attn.q_proj``; with ``[e]`` behind it for one expert of a tensor
            of three dimensions.
        ternary: uint8 ``[rows, cols/4]``, see :func:`pack_ternary`.
        alpha: float16 ``[rows, cols/g]``, >= 0 but for four levels without an offset.
        mu: float16 ``[rows, cols/g]``.
        perm: int32 ``[cols]``.
        levels: how many values T may take, 3 or 4; they begin at -1.
    """

    name: str
    ternary: Array
    alpha: Array
    mu: Array
    perm: Array
    levels: int = 3

    @property
    def rows(self) -> int:
        return int(self.ternary.shape[0])

    @property
    def cols(self) -> int:
        return int(self.perm.shape[0])

    @property
    def block_size(self) -> int:
        return self.cols // int(self.alpha.shape[1])

    def codes(self) -> Array:
        """T as int8 ``[rows, cols]``, in the quantised column order."""
        return unpack_ternary(self.ternary)

    def dequantize(self) -> Array:
        """``alpha * T + mu`` as float32 ``[rows, cols]``, columns in the source model's order."""
        blocks = self.codes().reshape(self.rows, -1, self.block_size).astype(np.float32)
        blocks *= self.alpha.astype(np.float32)[..., None]
        blocks += self.mu.astype(np.float32)[..., None]
        weight = np.empty((self.rows, self.cols), dtype=np.float32)
        weight[:, self.perm] = blocks.reshape(self.rows, self.cols)
        return weight

    def check(self, where: str) -> None:
        """Raise PT2Error unless dtypes, shapes and values are what the format says."""
        for part, dtype in PARTS.items():
            if getattr(self, part).dtype != dtype:
                raise PT2Error(f"{where}: {self.name}.{part} is not {np.dtype(dtype).name}")
        problem = _shape_problem(self) or _value_problem(self)
        if problem:
            raise PT2Error(f"{where}: {self.name} is damaged ({problem}); run pt2-quantize again")


def _shape_problem(m: TernaryMatrix) -> str | None:
    if m.ternary.ndim != 2 or m.alpha.ndim != 2 or m.perm.ndim != 1:
        return "wrong number of dimensions"
    rows, cols = m.ternary.shape[0], m.perm.shape[0]
    blocks = m.alpha.shape[1]
    if m.ternary.shape != (rows, cols // 4) or m.alpha.shape != (rows, blocks):
        return "the shapes do not fit together"
    if m.mu.shape != m.alpha.shape or not blocks or cols % blocks or cols % 4:
        return "the shapes do not fit together"
    return None


def _value_problem(m: TernaryMatrix) -> str | None:
    if m.levels < 4 and np.any(m.ternary & (m.ternary >> 1) & 0x55):
        return "a code that is not ternary"
    if not (np.isfinite(m.alpha).all() and np.isfinite(m.mu).all()):
        return "NaN or Inf in alpha or mu"
    if np.any(m.alpha < 0) and (m.levels < 4 or m.mu.any()):
        return "a negative alpha"
    return None if is_permutation(m.perm) else "perm is not a permutation"


def is_permutation(perm: Array) -> bool:
    """Whether an integer vector of length n holds each of 0..n-1 once."""
    return bool(np.array_equal(np.sort(perm), np.arange(perm.shape[0])))
