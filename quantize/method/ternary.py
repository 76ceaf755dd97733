"""The quantiser of one block of columns, with three levels or four: pure functions on tensors.

Throughout, ``w`` is float32 ``[rows, k]`` (the block's weights), ``t`` is float32 ``[rows, k]`` of
{-1, 0, 1}, and a :class:`Grid` holds alpha and mu, float32 ``[rows]``, so that ``w ~ alpha*t + mu``
row by row. ``c`` is float32 ``[k, k]``: the second moment of the block's inputs, symmetric and
positive semidefinite. Equation numbers are those of the PT2-LLM paper.

``levels`` is how many values t may take, 3 (the paper's) or 4: -1 to ``levels - 2``. With four of
them the paper's steps stay what they are; only the start and the largest t are others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pt2_core import scale_pairs as pairs
from pt2_core.errors import PT2Error
from quantize.method.scale_pairs import rounded

# A 2x2 system whose determinant is smaller than this share of the product of its diagonal cannot
# tell alpha from mu: T is (nearly) constant over the row.
SINGULAR = 1e-7
# Mean square of the inputs' sum, as a share of the sum of their mean squares, that counts as none.
CANCELS = 1e-6
LOWEST = -1  # the smallest t
# Four levels start with this share of a row's range between its first level and its last.
RANGE = 0.75
# Rows worked on at once on a CPU: the temporaries of one chunk stay in a core's cache.
CPU_ROWS = 1024


class Grid(NamedTuple):
    """Scale and offset of each row, float32 ``[rows]``."""

    alpha: Tensor
    mu: Tensor

    def dequantize(self, t: Tensor) -> Tensor:
        """``alpha * t + mu``, float32 ``[rows, k]``."""
        return torch.addcmul(self.mu[:, None], self.alpha[:, None], t)


def ternary_init(w: Tensor) -> tuple[Grid, Tensor]:
    """The start of eq. 4-5: mu is the row's mean, the threshold 0.75 times the mean deviation.

    A row whose values are all equal gets t = 0 and alpha = 0.

    Returns:
        (grid, t)
    """
    mu = w.mean(dim=1)
    centred = w - mu[:, None]
    size = centred.abs()
    chosen = size > 0.75 * size.mean(dim=1, keepdim=True)
    count = chosen.sum(dim=1)
    alpha = (size * chosen).sum(dim=1) / count.clamp(min=1)
    return Grid(alpha, mu), centred.sign() * chosen


def range_init(w: Tensor, levels: int) -> tuple[Grid, Tensor]:
    """A start for any number of levels: ``RANGE`` of each row's range, cut into equal steps.

    The middle of the levels lies on the middle of the range. A row whose values are all equal gets
    t = 0 and alpha = 0.

    Returns:
        (grid, t)
    """
    low, high = w.aminmax(dim=1)
    alpha = (high - low) * (RANGE / (levels - 1))
    middle = LOWEST + (levels - 1) / 2
    grid = Grid(alpha, (high + low) / 2 - middle * alpha)
    return grid, round_to_grid(w, grid, levels)


def starting_point(w: Tensor, levels: int) -> tuple[Grid, Tensor]:
    """Where ITF starts: the paper's start for three levels, :func:`range_init` for four."""
    return ternary_init(w) if levels == 3 else range_init(w, levels)


def fit_grid(w: Tensor, t: Tensor) -> Grid:
    """The grid of least ``|w - alpha*t - mu|^2`` for a given t (eq. 9), row by row.

    Where t is constant over a row the system is singular: mu is then the row's mean and alpha 0.
    """
    return _fit_grid(w, t, w.sum(dim=1))


def _fit_grid(w: Tensor, t: Tensor, w1: Tensor) -> Grid:
    m = w.shape[1]
    wt = (w * t).sum(dim=1)
    t1 = t.sum(dim=1)
    tt = (t * t).sum(dim=1)
    det = m * tt - t1 * t1  # whole numbers, so the comparison with 0 is exact
    singular = det <= 0
    det = det.masked_fill(singular, 1.0)
    alpha = ((m * wt - t1 * w1) / det).masked_fill(singular, 0.0)
    mu = torch.where(singular, w1 / m, (tt * w1 - t1 * wt) / det)
    return Grid(alpha, mu)


def scale_only(w: Tensor, t: Tensor, c: Tensor | None = None) -> Grid:
    """The grid without offset of least error for a given t; its alpha may be negative.

    Args:
        c: float32 ``[k, k]``, the metric of the error (None: the plain sum of squares).

    Returns:
        mu is 0, and alpha where t is.
    """
    tc = t if c is None else t @ c
    size = (tc * t).sum(dim=1, dtype=torch.float64)
    alpha = (tc * w).sum(dim=1, dtype=torch.float64) / size.masked_fill(size <= 0, 1.0)
    alpha = alpha.masked_fill(size <= 0, 0.0).float()
    return Grid(alpha, torch.zeros_like(alpha))


def scale_start(w: Tensor, levels: int, sign: float = 1.0) -> tuple[Grid, Tensor]:
    """A start without offset: with ``sign`` the long side of the levels is the row's upper one.

    Three levels start from the mean size, as the paper's do; four reach ``RANGE`` of the row's
    largest value with their last level, on the side that ``sign`` names.
    """
    if levels == 3:
        size = w.abs()
        chosen = size > 0.75 * size.mean(dim=1, keepdim=True)
        alpha = (size * chosen).sum(dim=1) / chosen.sum(dim=1).clamp(min=1)
    else:
        low, high = (sign * w).aminmax(dim=1)
        alpha = sign * RANGE * torch.maximum(high / (LOWEST + levels - 1), -low)
    grid = Grid(alpha, torch.zeros_like(alpha))
    return grid, round_to_grid(w, grid, levels)


def round_to_grid(w: Tensor, grid: Grid, levels: int = 3) -> Tensor:
    """The nearest of the grid's points (eq. 10): t, 0 where alpha is 0."""
    inverse = torch.where(grid.alpha == 0, 0.0, 1.0 / grid.alpha)
    return clamp_levels_(((w - grid.mu[:, None]) * inverse[:, None]).round_(), levels)


def clamp_levels_(t: Tensor, levels: int) -> Tensor:
    """Whole numbers brought into the range of t, in place."""
    return t.clamp_(LOWEST, LOWEST + levels - 1)


def iterative_ternary_fitting(
    w: Tensor, t: Tensor, max_steps: int = 50, levels: int = 3, offset: bool = True
) -> tuple[Grid, Tensor]:
    """ITF: alternate eq. 9 and eq. 10 until t no longer changes (algorithm 1).

    Rows that have converged are left out of the following steps. The weight error never rises.

    Args:
        t: where to start, see :func:`starting_point`.
        offset: whether the grid has a mu; without, it stays 0 and alpha may be negative.
        max_steps: an upper limit; about 16 steps are usual, 24 the most that was seen.

    Returns:
        (grid, t)
    """
    if w.device.type != "cpu" or w.shape[0] <= CPU_ROWS:
        return _itf(w, t, max_steps, levels, offset)
    split = zip(w.split(CPU_ROWS), t.split(CPU_ROWS), strict=True)
    parts = [_itf(a, b, max_steps, levels, offset) for a, b in split]
    grid = Grid(*(torch.cat(v) for v in zip(*(g for g, _ in parts))))  # noqa: B905
    return grid, torch.cat([t for _, t in parts])


def _itf(w: Tensor, t: Tensor, max_steps: int, levels: int, offset: bool) -> tuple[Grid, Tensor]:
    alpha, mu = w.new_empty(w.shape[0]), w.new_empty(w.shape[0])
    rows = torch.arange(w.shape[0], device=w.device)
    now_w, now_t, w1 = w, t, w.sum(dim=1)
    for _ in range(max_steps):
        grid = _fit_grid(now_w, now_t, w1) if offset else scale_only(now_w, now_t)
        new_t = round_to_grid(now_w, grid, levels)
        changed = (new_t != now_t).any(dim=1)
        if rows.shape[0] == w.shape[0]:
            (alpha, mu), t = grid, new_t
        else:
            alpha[rows], mu[rows] = grid
            t[rows] = new_t
        left = int(changed.sum())
        if left == 0:
            break
        now_t = new_t
        # A converged row stays as it is, so this only saves time; on a GPU it would not even that.
        if w.device.type == "cpu" and 2 * left <= rows.shape[0]:
            rows, now_w, now_t, w1 = rows[changed], now_w[changed], new_t[changed], w1[changed]
    return Grid(alpha, mu), t


def activation_grid(w: Tensor, t: Tensor, c: Tensor) -> Grid:
    """AGA: the grid of least ``(w - alpha*t - mu) c (w - alpha*t - mu)^T`` (eq. 12), row by row.

    Eq. 13 does not say what its S is; read as S = c it diverges, so the full quadratic forms of
    eq. 12 are solved. Where t is (nearly) constant the system is singular: mu is then the weighted
    mean and alpha 0. The solution's alpha may be negative, see :func:`positive_alpha`.
    """
    c1 = c.sum(dim=1)
    tc = t @ c
    a = (tc * t).sum(dim=1, dtype=torch.float64)
    b = (t @ c1).double()
    d = c1.sum(dtype=torch.float64)
    wt = (tc * w).sum(dim=1, dtype=torch.float64)
    w1 = (w @ c1).double()
    # Inputs that cancel out (all of a LayerNorm's outputs do), or none at all: nothing says what mu
    # should be.
    if d <= CANCELS * c.diagonal().sum(dtype=torch.float64):
        return fit_grid(w, t)
    det = a * d - b * b
    singular = det <= SINGULAR * a * d
    det = det.masked_fill(singular, 1.0)
    alpha = ((d * wt - b * w1) / det).masked_fill(singular, 0.0)
    mu = torch.where(singular, w1 / d, (a * w1 - b * wt) / det)
    return Grid(alpha.float(), mu.float())


def positive_alpha(grid: Grid, t: Tensor, levels: int = 3) -> tuple[Grid, Tensor]:
    """The same values with alpha >= 0: rows of negative alpha are counted from the other end.

    Three levels are their own mirror image, so mu stays; of four, t becomes ``1 - t`` and mu takes
    up the step between.
    """
    sign = torch.where(grid.alpha < 0, -1.0, 1.0)
    if levels == 3:
        return Grid(grid.alpha.abs(), grid.mu), t * sign[:, None]
    mirrored = mirror(levels) * (grid.alpha < 0)
    grid = Grid(grid.alpha.abs(), grid.mu + mirrored * grid.alpha)
    return grid, t * sign[:, None] + mirrored[:, None]


def mirror(levels: int) -> int:
    """The sum of the smallest and the largest t: levels counted from the other end are this - t."""
    return 2 * LOWEST + levels - 1


def check_range(weight: Tensor, block_size: int) -> None:
    """Refuse a weight ``[rows, cols]`` of which a block's alpha is certain not to fit into float16.

    Alpha is the mean size of a block's larger weights, so at least that of all of them.

    Raises:
        PT2Error: with the size of the block.
    """
    blocks = weight.float().view(weight.shape[0], -1, block_size)
    largest = float((blocks - blocks.mean(-1, keepdim=True)).abs().mean(-1).max())
    if largest > torch.finfo(torch.float16).max:
        raise PT2Error(f"weights of about {largest:.3g} are too large for alpha in float16 (65504)")


def store_grid(grid: Grid, scales: str = "float16") -> Grid:
    """Round alpha and mu to what is stored, and return them as float32.

    Args:
        scales: ``float16``, or ``pair``: 16 bits for both (docs/scale-pairs.md). A pair whose alpha
            would not reach mu has a larger one, perhaps much larger.

    Raises:
        PT2Error: a value does not fit (weights above 65504; of pairs, an alpha above 16128).
    """
    if scales == "pair":
        return _store_pairs(grid)
    stored = Grid(grid.alpha.half().float(), grid.mu.half().float())
    if not bool((stored.alpha.isfinite() & stored.mu.isfinite()).all()):
        raise PT2Error("alpha or mu does not fit into float16: the weights are too large")
    return stored


def _store_pairs(grid: Grid) -> Grid:
    size = grid.alpha.abs()
    low, high = (pairs.LARGEST * end / pairs.STEPS for end in (pairs.LEAST, pairs.MOST))
    if not bool(((size <= pairs.LARGEST) & (grid.mu >= low) & (grid.mu <= high)).all()):
        raise PT2Error(
            f"alpha or mu does not fit into a scale pair ({pairs.LARGEST:g}): weights too large"
        )
    alpha, mu = rounded(size, grid.mu)
    return Grid(torch.where(grid.alpha < 0, -alpha, alpha), mu)


def weight_error(w: Tensor, w_hat: Tensor) -> float:
    """E_w of eq. 6: the sum of squared differences."""
    return float((w - w_hat).square().sum(dtype=torch.float64))


def output_error(w: Tensor, w_hat: Tensor, c: Tensor) -> float:
    """E_x of eq. 11, ``sum_rows (w - w_hat) c (w - w_hat)^T``; per token if ``c`` is a mean."""
    e = w - w_hat
    return float(((e @ c) * e).sum(dtype=torch.float64))
