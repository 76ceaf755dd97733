"""Alpha and mu of a block in 16 bits: the scale pair (docs/scale-pairs.md has it bit by bit).

    word  = code << 6 | multiple & 63
    alpha = 0 where code is 0, otherwise (1 + code % 32 / 32) * 2 ** (code // 32 - 18)
    mu    = alpha * multiple / 16

``code`` has 10 bits, ``multiple`` is a whole number of -32 to 31 in two's complement. Every one of
the 65536 words has a finite value. Alpha, mu and ``alpha * t + mu`` for every level t are exact in
float32, so no two implementations can differ.

NumPy is imported where it is used: commands that only want the constants start without it.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    F32 = NDArray[np.float32]
    F64 = NDArray[np.float64]
    U16 = NDArray[np.uint16]

MANTISSA_BITS = 5
BIAS = 18  # of alpha's exponent
CODES = 1 << 10  # of alpha
MULTIPLE_BITS = 6
STEPS = 16  # multiples of mu to one alpha
LEAST, MOST = -32, 31  # multiples
LOW_END, HIGH_END = LEAST - 0.5, MOST + 0.5  # of what is rounded to them
SMALLEST = (1 + 1 / 32) * 2.0**-BIAS  # alpha above 0
LARGEST = (2 - 1 / 32) * 2.0 ** (31 - BIAS)


@cache
def alphas() -> F64:
    """The value of every code of alpha, rising, float64 ``[1024]``. Not to be changed."""
    import numpy as np

    codes = np.arange(CODES)
    mantissas = 1 + codes % (1 << MANTISSA_BITS) / (1 << MANTISSA_BITS)
    values = mantissas * 2.0 ** (codes // (1 << MANTISSA_BITS) - BIAS)
    values[0] = 0
    values.flags.writeable = False
    return values


def decode(words: U16) -> tuple[F32, F32]:
    """Alpha and mu of scale pairs.

    Args:
        words: uint16, any shape.

    Returns:
        (alpha, mu), float32 of the same shape; alpha >= 0, and mu is 0 where alpha is.
    """
    import numpy as np

    alpha = alphas()[words >> MULTIPLE_BITS].astype(np.float32)
    unused = 16 - MULTIPLE_BITS
    multiple = (words << np.uint16(unused)).view(np.int16) >> unused
    return alpha, alpha * (multiple / np.float32(STEPS)).astype(np.float32)


def encode(alpha: F32, mu: F32) -> U16:
    """The scale pair that is taken for an alpha and a mu.

    Alpha goes to the nearest code (of two equally near ones to the even one), and mu to the nearest
    multiple of it (likewise). Where mu is more than half a step out of reach of that alpha, the
    smallest alpha is taken that has it in reach, so a block of equal weights (t = 0, and alpha 0)
    keeps its value. What is larger than the largest pair becomes the largest.

    Args:
        alpha: float32, any shape, finite and >= 0.
        mu: float32 of the same shape, finite.

    Returns:
        uint16 of the same shape.

    Raises:
        ValueError: NaN, infinity, or an alpha below 0.
    """
    import numpy as np

    wide, offset = np.asarray(alpha, np.float64), np.asarray(mu, np.float64)
    if not (np.isfinite(wide).all() and np.isfinite(offset).all()):
        raise ValueError("NaN or infinity in alpha or mu")
    if (wide < 0).any():
        raise ValueError("an alpha below 0")
    table = alphas()
    middles = (table[:-1] + table[1:]) / 2
    codes = np.searchsorted(middles, wide)
    even_above = codes % 2 * (middles[np.minimum(codes, CODES - 2)] == wide)
    reach = offset * STEPS / np.where(offset < 0, LOW_END, HIGH_END)  # the least alpha for this mu
    codes = np.maximum(codes + even_above, np.searchsorted(table, reach))
    codes = np.minimum(codes, CODES - 1)
    found = table[codes]
    ratio = STEPS * offset / np.where(found > 0, found, 1)
    multiples = np.clip(np.rint(ratio), LEAST, MOST).astype(np.int64)
    words = codes << MULTIPLE_BITS | multiples & (1 << MULTIPLE_BITS) - 1
    return words.astype(np.uint16)


def rounded(alpha: F32, mu: F32) -> tuple[F32, F32]:
    """An alpha and a mu as their scale pair has them; see :func:`encode`."""
    return decode(encode(alpha, mu))
