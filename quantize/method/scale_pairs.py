"""Scale pairs (:mod:`pt2_core.scale_pairs`) on the tensors of the quantiser's inner loop."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pt2_core import scale_pairs as pairs


@lru_cache(maxsize=8)
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Alpha of every code, and the middles between neighbours, both float64."""
    table = torch.from_numpy(pairs.alphas().copy()).to(device)
    return table, (table[:-1] + table[1:]) / 2


def rounded(alpha: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
    """What scale pairs hold in place of an alpha and a mu; the bits of ``scale_pairs.rounded``.

    Args:
        alpha: float32, any shape, finite and >= 0.
        mu: float32 of the same shape, finite.

    Returns:
        (alpha, mu), float32 of the same shape.
    """
    table, middles = _tables(alpha.device)
    wide, offset = alpha.double(), mu.double()
    codes = torch.searchsorted(middles, wide)
    codes += codes % 2 * (middles[codes.clamp(max=pairs.CODES - 2)] == wide)
    ends = torch.where(offset < 0, pairs.LOW_END, pairs.HIGH_END)
    codes = torch.maximum(codes, torch.searchsorted(table, offset * pairs.STEPS / ends))
    found = table[codes.clamp(max=pairs.CODES - 1)]
    ratio = pairs.STEPS * offset / torch.where(found > 0, found, 1.0)
    multiple = ratio.round().clamp(pairs.LEAST, pairs.MOST)
    return found.float(), (found * multiple / pairs.STEPS).float()
