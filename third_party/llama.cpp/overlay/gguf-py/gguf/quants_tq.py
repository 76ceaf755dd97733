"""TQ2_1 and TQ1_1: ternary weights alpha * t + mu, one (alpha, mu) per 128.

The NumPy twin of ggml/src/ggml-tq.c, to the byte; FORMAT.md describes the blocks. Imported by quants.py,
which registers the classes.
"""

from __future__ import annotations

import numpy as np

from .constants import GGMLQuantizationType
from .quants import __Quant

_LANES = 32
_MAX_STEPS = 50  # of iterative ternary fitting
_DET_MIN = 1e-7  # a relative determinant below this is a block of one level
_N_BASE3 = 26  # bytes of codes in a TQ1_1 block


def _tree_sum(v: np.ndarray) -> np.ndarray:
    """Row sums (n, 128) -> (n,), by halving as in C, so that the last bit agrees."""
    n = v.shape[-1]
    while n > 1:
        n //= 2
        v = v[:, :n] + v[:, n : 2 * n]
    return v[:, 0]


def _round(x: np.ndarray, mu: np.ndarray, half_step: np.ndarray) -> np.ndarray:
    """T (n, 128) int8 for the grid mu + 2 * half_step * {-1, 0, 1}; the midpoint goes to 0."""
    r = x - mu[:, None]
    h = half_step[:, None]
    return (r > h).astype(np.int8) - (r < -h).astype(np.int8)


def _solve(
    x: np.ndarray, sum_x: np.ndarray, t: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least-squares alpha and mu for fixed T (eq. 9), and where T has more than one value."""
    n = np.float64(x.shape[-1])
    td = t.astype(np.float64)
    s_t, s_tt, s_xt = _tree_sum(td), _tree_sum(td * td), _tree_sum(x * td)
    det = n * s_tt - s_t * s_t
    ok = det > _DET_MIN * (n * s_tt)
    safe = np.where(ok, det, 1.0)
    return (n * s_xt - s_t * sum_x) / safe, (s_tt * sum_x - s_t * s_xt) / safe, ok


def _fit(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """alpha, mu (n,) float16 and T (n, 128) int8 of float32 blocks (n, 128)."""
    with np.errstate(over="ignore", invalid="ignore"):
        x = blocks.astype(np.float64)
        sum_x = _tree_sum(x)
        mean = sum_x / x.shape[-1]
        delta = 0.75 * (_tree_sum(np.abs(x - mean[:, None])) / x.shape[-1])
        t = _round(x, mean, delta)
        alpha, mu = np.zeros_like(mean), mean.copy()
        todo = np.arange(len(x))
        for _ in range(_MAX_STEPS):
            a, m, ok = _solve(x[todo], sum_x[todo], t[todo])
            alpha[todo] = np.where(ok, a, 0.0)
            mu[todo] = np.where(ok, m, mu[todo])
            todo, a, m = todo[ok], a[ok], m[ok]
            new = _round(x[todo], m, 0.5 * a)
            changed = (new != t[todo]).any(axis=-1)
            t[todo] = new
            todo = todo[changed]
            if len(todo) == 0:
                break
        alpha_h = alpha.astype(np.float32).astype(np.float16)
        flat = alpha_h == 0
        alpha_h = np.where(flat, np.float16(0), alpha_h)
        mu_h = np.where(flat, mean, mu).astype(np.float32).astype(np.float16)
        t = _round(x, mu_h.astype(np.float64), 0.5 * alpha_h.astype(np.float64))
        return alpha_h, mu_h, np.where(flat[:, None], np.int8(0), t)


def _scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """alpha and mu (n, 1) float32 of encoded blocks (n, bytes)."""
    am = np.ascontiguousarray(blocks[:, :4]).view("<f2").astype(np.float32)
    return am[:, :1], am[:, 1:]


def _join(alpha: np.ndarray, mu: np.ndarray, qs: np.ndarray) -> np.ndarray:
    am = np.stack([alpha, mu], axis=-1).astype("<f2").view(np.uint8)
    return np.concatenate([am, qs], axis=-1)


def _values(blocks: np.ndarray, codes: np.ndarray) -> np.ndarray:
    alpha, mu = _scales(blocks)
    with np.errstate(invalid="ignore"):
        values = alpha * (codes.astype(np.float32) - np.float32(1)) + mu
    return np.where(np.isfinite(alpha) & np.isfinite(mu), values, np.float32(np.nan))


class TQ2_1(__Quant, qtype=GGMLQuantizationType.TQ2_1):
    @classmethod
    def quantize_blocks(cls, blocks: np.ndarray) -> np.ndarray:
        alpha, mu, t = _fit(blocks)
        planes = (t + 1).astype(np.uint8).reshape(-1, 4, _LANES)
        shift = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 4, 1)
        return _join(alpha, mu, np.bitwise_or.reduce(planes << shift, axis=1))

    @classmethod
    def dequantize_blocks(cls, blocks: np.ndarray) -> np.ndarray:
        shift = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 4, 1)
        codes = (blocks[:, None, 4:] >> shift) & np.uint8(3)
        return _values(blocks, codes.reshape(len(blocks), -1))


class TQ1_1(__Quant, qtype=GGMLQuantizationType.TQ1_1):
    @classmethod
    def quantize_blocks(cls, blocks: np.ndarray) -> np.ndarray:
        alpha, mu, t = _fit(blocks)
        planes = (t + 1).astype(np.uint8).reshape(-1, 4, _LANES)
        unit = np.array([1, 3, 9, 27], dtype=np.uint8).reshape(1, 4, 1)
        qs = (planes[:, :, :_N_BASE3] * unit).sum(axis=1, dtype=np.uint8)
        # the codes of lanes 26..31, lane by lane, are the fifth digits
        fifth = planes[:, :, _N_BASE3:].transpose(0, 2, 1).reshape(len(blocks), -1)
        qs[:, : fifth.shape[1]] += fifth * np.uint8(81)
        return _join(alpha, mu, qs)

    @classmethod
    def dequantize_blocks(cls, blocks: np.ndarray) -> np.ndarray:
        n = len(blocks)
        qs = blocks[:, 4:]
        unit = np.array([1, 3, 9, 27], dtype=np.uint8).reshape(1, 4, 1)
        main = (qs[:, None, :] // unit) % np.uint8(3)
        n_fifth = 4 * (_LANES - _N_BASE3)
        fifth = np.minimum(qs[:, :n_fifth] // np.uint8(81), 2).reshape(n, -1, 4).transpose(0, 2, 1)
        codes = np.concatenate([main, fifth], axis=-1).reshape(n, -1)
        return _values(blocks, codes)
