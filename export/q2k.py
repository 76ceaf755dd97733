"""Pack alpha, mu and ternary codes into Q2_K blocks, which an unmodified llama.cpp runs.

A Q2_K super-block of 256 weights (``block_q2_K`` in llama.cpp's ``ggml-common.h``) has two halves
``d`` and ``dmin`` and, for each sub-block of 16, four bits ``sc`` and four bits ``m``; a weight is
``d * sc * q - dmin * m`` with ``q`` in 0..3. With ``q = t + 1`` this is ``alpha * t + mu`` when
``d * sc = alpha`` and ``dmin * m = alpha - mu =: beta``. Only the scales lose precision, never the
codes. The search for the least squared weight error of a super-block:

1. Directions: for each ``s`` in 1..15, the whole numbers nearest to ``s * x / x_max``, for x the
   alphas and, apart from them, the betas. The best few of both are kept.
2. Every pair of kept directions gets its jointly optimal ``(d, dmin)`` from a 2 x 2 system.
3. The same is tried with the codes turned round (``q = 1 - t``, ``d < 0``): the pairs (alpha,
   alpha + mu) lie elsewhere on the grid, and it mends a beta of the wrong sign (mu > alpha). Where
   all four codes are used it is ``q = 2 - t`` and (alpha, 2 alpha + mu).
4. The sub-blocks of the best choice then move on their own to the neighbouring ``(sc, m)`` that
   suits the codes they happen to hold, and ``(d, dmin)`` is solved once more.

The error of a sub-block with counts of codes folded into ``S0 = n``, ``S1 = sum q``,
``S2 = sum q^2`` is ``S2 da^2 - 2 S1 da db + S0 db^2`` for errors ``da`` of alpha, ``db`` of beta.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pt2_core.formats import F16, U8

SUPER = 256
SUB = 16
NBYTES = 84
_SUBS = SUPER // SUB
_KEEP = 4
_CHUNK = 1024
Array = NDArray[Any]


@dataclass
class WeightError:
    """Squared error and squared weights, summed; sums of these add up over tensors."""

    error: float = 0.0
    energy: float = 0.0

    def __add__(self, other: WeightError) -> WeightError:
        return WeightError(self.error + other.error, self.energy + other.energy)

    @property
    def rms(self) -> float:
        """Root of the error relative to the root of the energy (0 for all-zero weights)."""
        return float(np.sqrt(self.error / self.energy)) if self.energy > 0 else 0.0


def encode(codes: U8, alpha: F16, mu: F16) -> tuple[U8, WeightError]:
    """Encode a matrix as Q2_K.

    Args:
        codes: uint8 ``[rows, cols]`` in 0..3; ``cols`` a multiple of 256.
        alpha: float16 ``[rows, cols / g]`` with g a multiple of 16 that divides 256 or is a
            multiple of it.
        mu: float16, as ``alpha``.

    Returns:
        uint8 ``[rows, cols / 256 * 84]``, and the error against ``alpha * t + mu``.

    Raises:
        ValueError: shapes that do not fit.
    """
    rows, cols = codes.shape
    groups = alpha.shape[1]
    if cols % SUPER or alpha.shape != mu.shape or (cols % (groups * SUB)):
        raise ValueError(f"Q2_K: codes {codes.shape}, alpha {alpha.shape}, mu {mu.shape}")
    n = rows * (cols // SUPER)
    q = codes.reshape(n, _SUBS, SUB)
    per_sub = cols // groups // SUB
    a = np.repeat(alpha.astype(np.float32), per_sub, axis=1).reshape(n, _SUBS)
    b = a - np.repeat(mu.astype(np.float32), per_sub, axis=1).reshape(n, _SUBS)
    stride = min(per_sub, _SUBS)
    top = max(2, int(codes.max(initial=0)))
    out = np.empty((n, NBYTES), dtype=np.uint8)

    def chunk(first: int) -> WeightError:
        part = slice(first, first + _CHUNK)
        out[part], error = _encode_chunk(q[part], a[part], b[part], stride, top)
        return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        errors = list(pool.map(chunk, range(0, n, _CHUNK)))
    return out.reshape(rows, -1), sum(errors, WeightError())


def _encode_chunk(q: U8, a: Array, b: Array, stride: int, top: int) -> tuple[U8, WeightError]:
    """Super-blocks ``q`` uint8 ``[n, 16, 16]``, ``a`` and ``b`` float32 ``[n, 16]``; q <= top."""
    s = _moments(q)
    energy = _quadratic(s, a, b).sum(dtype=np.float64)
    turned = top - q
    s_turned = _moments(turned)
    # alpha q - beta = (-alpha) (top - q) - (beta - top alpha)
    best = _search(s, a, b, stride)
    other = _search(s_turned, -a, b - top * a, stride)
    flip = other[-1] < best[-1]
    d, dmin, sc, m, _ = (
        np.where(flip.reshape(-1, *[1] * (x.ndim - 1)), y, x)
        for x, y in zip(best, other, strict=True)
    )
    flip_sub = flip[:, None]
    s = np.where(flip_sub[None], s_turned, s)
    a, b = np.where(flip_sub, -a, a), np.where(flip_sub, b - top * a, b)
    d, dmin, sc, m, error = _refine(s, a, b, d, dmin, sc, m)
    q = np.where(flip_sub[:, :, None], turned, q)
    return _pack(q, d, dmin, sc, m), WeightError(float(error.sum(dtype=np.float64)), float(energy))


def _moments(q: U8) -> Array:
    """float32 ``[3, n, 16]``: S0, S1, S2 of each sub-block."""
    x = q.astype(np.float32)
    return np.stack([np.full(q.shape[:2], q.shape[2], np.float32), x.sum(-1), (x * x).sum(-1)])


def _quadratic(s: Array, da: Array, db: Array) -> Array:
    return s[2] * da * da - 2 * s[1] * da * db + s[0] * db * db


def _search(s: Array, a: Array, b: Array, stride: int) -> tuple[Array, Array, Array, Array, Array]:
    """Steps 1 and 2; the sub-blocks of a group (``stride`` of them) share their ``(sc, m)``.

    Returns:
        d, dmin ``[n]``; sc, m ``[n, 16]``; the error ``[n]``. All float32.
    """
    n = len(a)
    grouped = s.reshape(3, n, -1, stride).sum(-1)
    ga, gb = a[:, ::stride], b[:, ::stride]
    sc = _directions(ga, grouped[2])[:, :, None, :]
    m = _directions(gb, grouped[0])[:, None, :, :]
    sc, m = np.broadcast_arrays(sc, m)
    sc, m = sc.reshape(n, -1, ga.shape[1]), m.reshape(n, -1, ga.shape[1])
    wide = grouped[:, :, None, :]
    d, dmin = _solve(wide, ga[:, None], gb[:, None], sc, m)
    error = _quadratic(
        wide, ga[:, None] - d[..., None] * sc, gb[:, None] - dmin[..., None] * m
    ).sum(-1)
    pick = np.argmin(error, axis=1)[:, None]
    take = np.repeat(np.take_along_axis(sc, pick[..., None], 1)[:, 0], stride, axis=1)
    take_m = np.repeat(np.take_along_axis(m, pick[..., None], 1)[:, 0], stride, axis=1)
    chosen = (np.take_along_axis(x, pick, 1)[:, 0] for x in (d, dmin, error))
    d, dmin, error = chosen
    return d, dmin, take, take_m, error


def _directions(x: Array, weight: Array) -> Array:
    """The ``_KEEP`` best whole-number directions in 0..15 for ``x`` ``[n, groups]``.

    Returns float32 ``[n, _KEEP, groups]``; a row of zeros gives zeros.
    """
    peak = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    ratio = x / np.where(peak == 0, 1, peak)
    steps = np.arange(1, 16, dtype=np.float32)[None, :, None]
    v = np.clip(np.rint(ratio[:, None, :] * steps), 0, 15)
    w = weight[:, None, :]
    along = (w * ratio[:, None, :] * v).sum(-1)
    norm = (w * v * v).sum(-1)
    # The larger of two equal directions is kept: it leaves finer steps for the sub-blocks.
    gain = along * along / np.where(norm == 0, 1, norm) * (1 + 1e-6 * steps[..., 0])
    keep = np.argpartition(-gain, _KEEP, axis=1)[:, :_KEEP]
    return np.take_along_axis(v, keep[..., None], axis=1)


def _solve(s: Array, a: Array, b: Array, sc: Array, m: Array) -> tuple[Array, Array]:
    """Least-squares ``(d, dmin)`` over the last axis, rounded to half precision.

    Where the 2 x 2 system is singular (all sc or all m zero), each is solved by itself.
    """
    a11 = (s[2] * sc * sc).sum(-1)
    a12 = -(s[1] * sc * m).sum(-1)
    a22 = (s[0] * m * m).sum(-1)
    r1 = (sc * (s[2] * a - s[1] * b)).sum(-1)
    r2 = (m * (s[0] * b - s[1] * a)).sum(-1)
    det = a11 * a22 - a12 * a12
    sound = det > 1e-6 * a11 * a22
    det = np.where(sound, det, 1)
    alone_d = (s[2] * sc * a).sum(-1) / np.where(a11 == 0, 1, a11)
    alone_m = (s[0] * m * b).sum(-1) / np.where(a22 == 0, 1, a22)
    d = np.where(sound, (a22 * r1 - a12 * r2) / det, alone_d)
    dmin = np.where(sound, (a11 * r2 - a12 * r1) / det, alone_m)
    return _half(d), _half(dmin)


def _half(x: Array) -> Array:
    top = float(np.finfo(np.float16).max)
    return np.clip(x, -top, top).astype(np.float16).astype(np.float32)


def _refine(
    s: Array, a: Array, b: Array, d: Array, dmin: Array, sc: Array, m: Array
) -> tuple[Array, Array, Array, Array, Array]:
    """Step 4: each sub-block takes the best of the nine neighbours; then one more solve."""
    step = np.array([-1, 0, 1], dtype=np.float32)
    near_sc = np.clip(sc[..., None] + np.repeat(step, 3), 0, 15)
    near_m = np.clip(m[..., None] + np.tile(step, 3), 0, 15)
    da = a[..., None] - d[:, None, None] * near_sc
    db = b[..., None] - dmin[:, None, None] * near_m
    pick = np.argmin(_quadratic(s[..., None], da, db), axis=-1)[..., None]
    sc = np.take_along_axis(near_sc, pick, -1)[..., 0]
    m = np.take_along_axis(near_m, pick, -1)[..., 0]
    moved_d, moved_dmin = _solve(s, a, b, sc, m)

    def error(d: Array, dmin: Array) -> Array:
        return _quadratic(s, a - d[:, None] * sc, b - dmin[:, None] * m).sum(-1)

    before, after = error(d, dmin), error(moved_d, moved_dmin)
    better = after < before
    d, dmin = np.where(better, moved_d, d), np.where(better, moved_dmin, dmin)
    return d, dmin, sc, m, np.minimum(before, after)


def _pack(q: U8, d: Array, dmin: Array, sc: Array, m: Array) -> U8:
    """``block_q2_K``: 16 bytes ``sc | m << 4``, 64 bytes of codes (planes of 32), d, dmin."""
    n = len(q)
    out = np.empty((n, NBYTES), dtype=np.uint8)
    out[:, :16] = sc.astype(np.uint8) | (m.astype(np.uint8) << 4)
    planes = q.reshape(n, 2, 4, 32) << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    out[:, 16:80] = np.bitwise_or.reduce(planes, axis=2).reshape(n, 64)
    out[:, 80:] = np.stack([d, dmin], axis=1).astype("<f2").view(np.uint8)
    return out
