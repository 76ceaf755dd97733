"""The ternary tensor types in NumPy: TQ2_1 and TQ1_1.

One class a type, each with ``pack`` (alpha, mu and codes to bytes), ``unpack`` (back) and
``dequantize`` (bytes to weights). The layouts are those of ``third_party/llama.cpp/FORMAT.md``; a
test holds these functions and the C library together byte for byte.

Notation: a block is 128 elements of a row; element ``e`` sits in ``lane = e % 32`` of
``plane = e // 32``; a code is ``c = t + 1`` in {0, 1, 2}; the weight is ``alpha * (c - 1) + mu``.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
F16 = NDArray[np.float16]
F32 = NDArray[np.float32]

BLOCK = 128
LANES = 32
PLANES = BLOCK // LANES
LAYOUT_VERSION = 1


class BlockType:
    """A ternary type: 128 weights in ``nbytes`` bytes, two of them halves (alpha, mu)."""

    name: str
    id: int
    nbytes: int

    @classmethod
    def pack(cls, codes: U8, alpha: F16, mu: F16) -> U8:
        """Encode a matrix.

        Args:
            codes: uint8 ``[rows, cols]`` in {0, 1, 2}; ``cols`` a multiple of 128.
            alpha: float16 ``[rows, cols / 128]``.
            mu: float16 ``[rows, cols / 128]``.

        Returns:
            uint8 ``[rows, cols / 128 * nbytes]``.

        Raises:
            ValueError: shapes that do not fit, or a code above 2.
        """
        rows, cols = codes.shape
        if cols % BLOCK or alpha.shape != (rows, cols // BLOCK) or mu.shape != alpha.shape:
            raise ValueError(f"{cls.name}: codes {codes.shape}, alpha {alpha.shape}, mu {mu.shape}")
        if codes.size and int(codes.max()) > 2:
            raise ValueError(f"{cls.name}: a code is {int(codes.max())}; codes are 0, 1 and 2")
        n = rows * (cols // BLOCK)
        out = np.empty((n, cls.nbytes), dtype=np.uint8)
        out[:, 0:2] = alpha.astype("<f2").reshape(n, 1).view(np.uint8)
        out[:, 2:4] = mu.astype("<f2").reshape(n, 1).view(np.uint8)
        out[:, 4:] = cls._encode(codes.reshape(n, PLANES, LANES))
        return out.reshape(rows, -1)

    @classmethod
    def unpack(cls, data: U8) -> tuple[U8, F16, F16]:
        """The inverse of :meth:`pack`: ``(codes, alpha, mu)`` from uint8 ``[rows, bytes]``."""
        rows, row_bytes = data.shape
        if row_bytes % cls.nbytes:
            raise ValueError(f"{cls.name}: a row of {row_bytes} bytes is not whole blocks")
        blocks = np.ascontiguousarray(data).reshape(-1, cls.nbytes)
        halves = np.ascontiguousarray(blocks[:, :4]).view("<f2").astype(np.float16)
        codes = cls._decode(blocks[:, 4:]).reshape(rows, -1)
        return codes, halves[:, 0].reshape(rows, -1), halves[:, 1].reshape(rows, -1)

    @classmethod
    def dequantize(cls, data: U8) -> F32:
        """uint8 ``[rows, bytes]`` to float32 weights ``[rows, cols]``."""
        return weights(*cls.unpack(data))

    @classmethod
    def _encode(cls, codes: U8) -> U8:
        raise NotImplementedError

    @classmethod
    def _decode(cls, qs: U8) -> U8:
        raise NotImplementedError


class TQ2_1(BlockType):
    """2.25 bits a weight: byte ``lane`` holds the codes of planes 0..3, two bits each."""

    name, id, nbytes = "TQ2_1", 120, 36
    _shifts = np.arange(0, 2 * PLANES, 2, dtype=np.uint8)

    @classmethod
    def _encode(cls, codes: U8) -> U8:
        return np.bitwise_or.reduce(codes << cls._shifts[:, None], axis=1)

    @classmethod
    def _decode(cls, qs: U8) -> U8:
        return (qs[:, None, :] >> cls._shifts[:, None]) & np.uint8(3)


class TQ1_1(BlockType):
    """1.875 bits a weight: 26 base-3 bytes of up to five codes, lowest digit first.

    Digits 0..3 of byte ``i`` are the planes of lane ``i``; digit 4 of the first 24 bytes holds the
    six lanes 26..31, four planes each; digit 4 of the last two bytes is 0.
    """

    name, id, nbytes = "TQ1_1", 121, 30
    _full = 26
    _tail = (LANES - 26) * PLANES
    _powers = np.array([1, 3, 9, 27, 81], dtype=np.uint8)

    @classmethod
    def _encode(cls, codes: U8) -> U8:
        digits = np.zeros((len(codes), 5, cls._full), dtype=np.uint8)
        digits[:, :PLANES] = codes[:, :, : cls._full]
        digits[:, 4, : cls._tail] = codes[:, :, cls._full :].swapaxes(1, 2).reshape(-1, cls._tail)
        return (digits * cls._powers[:, None]).sum(axis=1, dtype=np.uint8)

    @classmethod
    def _decode(cls, qs: U8) -> U8:
        digits = (qs[:, None, :] // cls._powers[:, None]) % 3
        tail = digits[:, 4, : cls._tail].reshape(-1, LANES - cls._full, PLANES).swapaxes(1, 2)
        return np.concatenate([digits[:, :PLANES], tail], axis=2)


TERNARY_TYPES: dict[str, type[BlockType]] = {"tq2_1": TQ2_1, "tq1_1": TQ1_1}


def weights(codes: U8, alpha: F16, mu: F16) -> F32:
    """``alpha * (code - 1) + mu`` in float32.

    Every implementation gives these very bits: the product is exact, so only the sum rounds.

    Args:
        codes: uint8 ``[rows, cols]`` in {0, 1, 2}.
        alpha: float16 ``[rows, blocks]``, with ``cols`` a multiple of ``blocks``.
        mu: float16 ``[rows, blocks]``.
    """
    rows, blocks = alpha.shape
    t = codes.reshape(rows, blocks, -1).astype(np.float32) - np.float32(1)
    t *= alpha.astype(np.float32)[:, :, None]
    t += mu.astype(np.float32)[:, :, None]
    return t.reshape(rows, -1)


def register() -> None:
    """Teach the installed ``gguf`` package the types 120 and 121 (idempotent).

    Its writer only needs their sizes; its reader looks ids up in an enum, which Python does not
    let one subclass, so the members are added to the enum's own tables.
    """
    enum: Any = gguf.GGMLQuantizationType
    for t in TERNARY_TYPES.values():
        if t.id not in enum._value2member_map_:
            member = int.__new__(enum, t.id)
            member._name_, member._value_ = t.name, t.id
            enum._member_map_[t.name] = enum._value2member_map_[t.id] = member
        gguf.GGML_QUANT_SIZES[enum(t.id)] = (BLOCK, t.nbytes)
