"""Alpha and mu of a block in 16 bits: the scale pair (docs/scale-pairs.md has it bit by bit).

    word  = code << 7 | multiple & 127
    alpha = 0 where code is 0, otherwise (1 + code % 16 / 16) * 2 ** (code // 16 - 18)
    mu    = alpha * multiple / 32

``code`` has 9 bits, ``multiple`` is a whole number of -64 to 63 in two's complement. Every one of
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

MANTISSA_BITS = 4
BIAS = 18  # of alpha's exponent
CODES = 1 << 9  # of alpha
MULTIPLE_BITS = 7
STEPS = 32  # multiples of mu to one alpha
LEAST, MOST = -64, 63  # multiples
SMALLEST = (1 + 1 / 16) * 2.0**-BIAS  # alpha above 0
LARGEST = (2 - 1 / 16) * 2.0 ** (31 - BIAS)


@cache
def alphas() -> F64:
    """The value of every code of alpha, rising, float64 ``[512]``. Not to be changed."""
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

    Alpha goes to the nearest code (of two equally near ones to the even one), unless mu is then out
    of reach: a larger alpha is taken in that case, the smallest that reaches mu. So a block of
    equal weights (t = 0, and alpha 0) keeps its value to within 1 %. Mu goes to the nearest
    multiple. What is larger than the largest pair becomes the largest.

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
    reach = offset * STEPS / np.where(offset < 0, LEAST, MOST)  # the least alpha that reaches mu
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
