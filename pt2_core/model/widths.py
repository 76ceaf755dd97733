"""Which widths of linears a block size can be used with. Free of torch.

A linear is quantised in blocks of columns, and what is written must fit an export type: our
own hold blocks of 128, Q2_K super-blocks of 256 that may hold smaller blocks of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from pt2_core import formats

BLOCK_SIZES = (64, 128, 256)
TERNARY_BLOCK, Q2K_BLOCK = formats.BLOCK, 256


def storable(cols: int, block_size: int, *, exported: bool = True) -> bool:
    """Whether a linear of ``cols`` columns can be quantised in blocks of ``block_size`` and, where
    it is to be exported, fits a type.

    >>> storable(640, 128), storable(640, 64), storable(768, 64), storable(384, 256)
    (True, False, True, False)
    """
    if cols % block_size:
        return False
    return not exported or block_size % TERNARY_BLOCK == 0 or cols % Q2K_BLOCK == 0


def width_problem(
    widths: Mapping[str, Iterable[int]], block_size: int, skip: str | None = None, *,
    exported: bool = True,
) -> str | None:  # fmt: skip
    """What is wrong with a block size, all linears in one sentence, and the option that settles it.

    Args:
        widths: kind of linear (``q_proj``) -> its numbers of columns, of linears to be ternarised.
        skip: the linears that are left out already; the advice has them too.
        exported: as for :func:`storable`.

    Returns:
        None where every linear can be quantised and exported.
    """
    bad = _misfits(widths, block_size, exported)
    if not bad:
        return None
    listed = "; ".join(
        f"{', '.join(kinds)} ({cols} columns)" for cols, kinds in sorted(_by_width(bad).items())
    )
    problem = f"blocks of {block_size} do not fit {listed}"
    for other in sorted(BLOCK_SIZES, key=lambda b: (b != TERNARY_BLOCK, b)):
        if other != block_size and not _misfits(widths, other, exported):
            only = " (then pt2-export --type q2_k)" if other % TERNARY_BLOCK else ""
            return f"{problem}: use --block-size {other}{only}"
    kept = _misfits(widths, TERNARY_BLOCK, exported)
    if set(kept) == set(widths):
        return f"{problem}, and no other block size fits any linear: the model cannot be ternarised"
    pattern = "|".join([*([skip] if skip is not None else []), *map(re.escape, kept)])
    option = "" if block_size == TERNARY_BLOCK else f"--block-size {TERNARY_BLOCK} "
    return f"{problem}: use {option}--skip '{pattern}', which leaves them as they are"


def _misfits(
    widths: Mapping[str, Iterable[int]], block_size: int, exported: bool
) -> dict[str, list[int]]:
    """Kinds of linear with a width that does not fit, and these widths."""
    found = {k: [c for c in dict.fromkeys(v) if not storable(c, block_size, exported=exported)]
             for k, v in widths.items()}  # fmt: skip
    return {k: v for k, v in found.items() if v}


def _by_width(bad: Mapping[str, list[int]]) -> dict[int, list[str]]:
    result: dict[int, list[str]] = {}
    for kind, columns in bad.items():
        for cols in columns:
            result.setdefault(cols, []).append(kind)
    return result
