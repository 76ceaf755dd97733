"""Whole rows at once: the grid of all blocks by one solve, and coordinate descent on T.

The blockwise pass (:mod:`quantize.method.gptq`) decides block after block and never looks back.
Here every row of a matrix is improved as a whole, on the objective

    f(row) = (target - What) H (target - What)^T,   What = alpha[block] * t + mu[block],

with the (damped) Hessian H of all columns. :func:`joint_grid` solves for the alpha and mu of all
blocks of a row together (a least squares problem in 2 * blocks unknowns), :func:`descend` sets one
column of T after the other to its best value given all others; both leave f as it is or lower it.
Descent ends in the nearest place where no single change helps. With noise that fades from sweep to
sweep (simulated annealing) it passes by most of these and ends several per cent lower.

Shapes: ``target`` float32 ``[rows, cols]``, ``t`` float32 ``[rows, cols]`` of the levels, ``grid``
alpha and mu float32 ``[rows, blocks]`` (values of float16), ``h`` float32 ``[cols, cols]``,
symmetric and positive definite; columns in the quantised order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from quantize.method.ternary import CPU_ROWS, Grid, clamp_levels_, mirror, store_grid

# Columns between two updates of the whole block's gradient by one matmul.
SUB_BLOCK = 32
# A sweep that moves a smaller share of T than this is the last one.
SETTLED = 1e-4
SETTLING_SWEEPS = 4  # at most so many without noise after those with it
# Record the inner loop as a CUDA graph: the same bits nine times as fast on an H200
# (benchmarks/closed_form.py checks and times it).
RECORD = True
# The solve stays this close (relative to the diagonal) to the grid it starts from, which decides
# where T cannot tell alpha from mu.
RIDGE = 1e-6
# Numbers in the largest temporary of a joint solve; rows are cut into chunks to keep to it.
SOLVE_NUMBERS = 1 << 26


@dataclass(frozen=True)
class Search:
    """How long and how widely to search; the fields are those of quantize.config.Config.

    Attributes:
        rounds: of a joint grid solve and ``sweeps`` sweeps of descent.
        sweeps: in a round.
        noise: standard deviation, in steps of T, of what is added to each column's best value
            before it is rounded; it falls linearly to 0 over all sweeps. 0: plain descent.
        seed: of the noise.
        levels: of T.
        scales: what alpha and mu are rounded to, see ``store_grid``.
        offset: whether there is a mu; without, it stays 0 and alpha of four levels keeps its sign.
    """

    rounds: int = 2
    sweeps: int = 4
    noise: float = 0.0
    seed: int = 0
    levels: int = 3
    scales: str = "float16"
    offset: bool = True


def refine_rows(
    target: Tensor, t: Tensor, grid: Grid, h: Tensor, search: Search
) -> tuple[Grid, Tensor]:
    """Improve T and the grid of every row; a row that got no better stays as it was.

    Returns:
        (grid, t): values of float16 with alpha >= 0; t is 0 where alpha is 0.
    """
    size = CPU_ROWS if target.device.type == "cpu" else max(1, SOLVE_NUMBERS // target.shape[1])
    generator = torch.Generator(target.device).manual_seed(search.seed)
    parts = [
        _refine(target[a : a + size], t[a : a + size],
                Grid(grid.alpha[a : a + size], grid.mu[a : a + size]), h, search, generator)
        for a in range(0, target.shape[0], size)
    ]  # fmt: skip
    alpha = torch.cat([g.alpha for g, _ in parts])
    mu = torch.cat([g.mu for g, _ in parts])
    return Grid(alpha, mu), torch.cat([t for _, t in parts])


def _refine(
    target: Tensor, t: Tensor, start: Grid, h: Tensor, search: Search, generator: torch.Generator
) -> tuple[Grid, Tensor]:
    grid, found, levels = start, t, search.levels
    what = (levels, search.scales, search.offset)
    for r in range(search.rounds):
        grid, found = joint_grid(target, found, grid, h, *what)
        noise = [search.noise * (1 - (r + i / search.sweeps) / search.rounds)
                 for i in range(search.sweeps)]  # fmt: skip
        found = descend(target, found, grid, h, search.sweeps, noise, generator, levels)
    if search.noise:  # down to where no single change helps
        grid, found = joint_grid(target, found, grid, h, *what)
        found = descend(target, found, grid, h, SETTLING_SWEEPS, levels=levels)
    grid, found = joint_grid(target, found, grid, h, *what)
    better = objective(target, found, grid, h) < objective(target, t, start, h)
    better = better[:, None]
    chosen = Grid(*(torch.where(better, new, old) for new, old in zip(grid, start, strict=True)))
    return chosen, torch.where(better, found, t)


def dequantize(t: Tensor, grid: Grid) -> Tensor:
    """``alpha * t + mu`` with one grid per block, float32 ``[rows, cols]``."""
    rows, blocks = grid.alpha.shape
    return torch.addcmul(
        grid.mu[..., None], grid.alpha[..., None], t.reshape(rows, blocks, -1)
    ).reshape(rows, -1)


def objective(target: Tensor, t: Tensor, grid: Grid, h: Tensor) -> Tensor:
    """f of every row, float64 ``[rows]``."""
    e = (target - dequantize(t, grid)).double()
    return ((e @ h.double()) * e).sum(dim=1)


def descend(
    target: Tensor,
    t: Tensor,
    grid: Grid,
    h: Tensor,
    sweeps: int,
    noise: Sequence[float] = (),
    generator: torch.Generator | None = None,
    levels: int = 3,
) -> Tensor:
    """Cyclic coordinate descent on T with the grid held fixed.

    Column j's best value given all others is ``t_j + g_j / (alpha * h_jj)``, rounded and clamped,
    where ``g = (target - What) h`` is kept up to date: inside a sub-block column by column, beyond
    it by matmuls.

    Args:
        sweeps: at most so many passes over the columns; fewer where T has settled.
        noise: of each sweep, see :class:`Search`; with any of it the objective may rise.
        generator: of the noise, on the tensors' device.

    Returns:
        t, float32 ``[rows, cols]``; without noise of no higher objective (but for float32
        rounding).
    """
    cols = target.shape[1]
    k = cols // grid.alpha.shape[1]
    # Transposed: a column of T is one run of memory.
    t = t.T.contiguous()
    alpha = grid.alpha.T.contiguous()
    inverse = torch.where(alpha != 0, 1.0 / alpha, 0.0)
    step = (1.0 / h.diagonal()).reshape(-1, k, 1) * inverse[:, None]  # [blocks, k, rows]
    for i in range(sweeps):
        sigma = noise[i] if noise else 0.0
        gradient = h @ (target - dequantize(t.T, grid)).T  # anew each sweep: rounding adds up
        before = t.clone()
        for b, start in enumerate(range(0, cols, k)):
            block = slice(start, start + k)
            centre = t[block]
            if sigma:
                noise_here = torch.empty_like(centre).normal_(0, sigma, generator=generator)
                centre = noise_here.add_(centre)
            moved = descend_block(
                t[block], centre, gradient[block], h[block, block], step[b], alpha[b], levels
            )
            gradient.addmm_(h[:, block], moved, alpha=-1)
        if not sigma and float((t != before).sum()) < SETTLED * t.numel():
            break
    return t.T.contiguous()


def _descend_block(
    t: Tensor, centre: Tensor, gradient: Tensor, h: Tensor, step: Tensor, alpha: Tensor,
    levels: int,
) -> Tensor:  # fmt: skip
    """One pass over a block's columns; changes ``t`` ``[k, rows]`` in place.

    Args:
        centre: ``t`` and the noise on it, float32 ``[k, rows]``.
        gradient: float32 ``[k, rows]``; not changed.
        h: float32 ``[k, k]``.
        step: ``1 / (alpha * h_jj)``, float32 ``[k, rows]``; 0 where alpha is 0.
        alpha: float32 ``[rows]``.

    Returns:
        what was added to What, float32 ``[k, rows]``.
    """
    k = t.shape[0]
    g = gradient.clone()
    moved = torch.empty_like(t)
    for begin in range(0, k, SUB_BLOCK):
        end = min(begin + SUB_BLOCK, k)
        for j in range(begin, end):
            best = clamp_levels_(torch.addcmul(centre[j], g[j], step[j]).round_(), levels)
            torch.sub(best, t[j], out=moved[j])
            moved[j].mul_(alpha)
            t[j] = best
            if j + 1 < end:
                g[j + 1 : end].addr_(h[j, j + 1 : end], moved[j], alpha=-1)
        if end < k:
            g[end:].addmm_(h[end:, begin:end], moved[begin:end], alpha=-1)
    return moved


class _Graph:
    """:func:`_descend_block` recorded once as a CUDA graph: its thousand tiny kernels then start
    from the GPU's own queue instead of one by one from Python."""

    def __init__(self, k: int, rows: int, device: torch.device, levels: int) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        self.inputs = (
            zeros(k, rows), zeros(k, rows), zeros(k, rows), zeros(k, k), zeros(k, rows), zeros(rows)
        )  # fmt: skip
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            _descend_block(
                *self.inputs, levels
            )  # libraries set themselves up outside of the recording
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.moved = _descend_block(*self.inputs, levels)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        inputs[0].copy_(self.inputs[0])
        return self.moved


@lru_cache(maxsize=8)
def _graph(k: int, rows: int, device: torch.device, levels: int) -> _Graph:
    return _Graph(k, rows, device, levels)


def descend_block(
    t: Tensor, centre: Tensor, gradient: Tensor, h: Tensor, step: Tensor, alpha: Tensor,
    levels: int,
) -> Tensor:  # fmt: skip
    """:func:`_descend_block`, with ``RECORD`` on a GPU as a recorded graph.

    What it returns is valid until the next call.
    """
    if RECORD and t.is_cuda:
        rows = t.shape[1]
        return _graph(t.shape[0], rows, t.device, levels)(t, centre, gradient, h, step, alpha)
    return _descend_block(t, centre, gradient, h, step, alpha, levels)


def joint_grid(
    target: Tensor, t: Tensor, grid: Grid, h: Tensor, levels: int = 3, scales: str = "float16",
    offset: bool = True,
) -> tuple[Grid, Tensor]:  # fmt: skip
    """The alpha and mu of all blocks of a row at once, for a given T.

    A row keeps its old grid where the new one, rounded to what is stored, is no better.

    Returns:
        (grid, t): t counted from the other end where alpha came out negative, and 0 where it is 0.
    """
    blocks = grid.alpha.shape[1]
    rows, cols = target.shape
    mirrored = mirror(levels) if offset else 0
    size = max(1, SOLVE_NUMBERS // max(cols, 4 * blocks * blocks))
    steps = [
        _solve(target[a : a + size], t[a : a + size],
               Grid(grid.alpha[a : a + size], grid.mu[a : a + size]), h, mirrored, scales,
               offset)
        for a in range(0, rows, size)
    ]  # fmt: skip
    alpha, mu = torch.cat([s.alpha for s in steps]), torch.cat([s.mu for s in steps])
    if not offset and levels != 3:  # no mirror: the sign stays
        turned = t.reshape(rows, blocks, -1) * (alpha != 0)[..., None]
        return Grid(alpha, mu), turned.reshape(rows, cols)
    turned = t.reshape(rows, blocks, -1) * alpha.sign()[..., None]
    if mirrored:
        turned += mirrored * (alpha < 0)[..., None]
    return Grid(alpha.abs(), mu), turned.reshape(rows, cols)


def _solve(
    target: Tensor, t: Tensor, grid: Grid, h: Tensor, mirrored: int, scales: str, offset: bool
) -> Grid:
    """The accepted grid of some rows. Where its alpha is negative, its mu is that of the mirrored t
    (:func:`quantize.method.ternary.mirror`), which is what will be stored."""
    matrix, right = _normal_equations(target, t, grid, h)
    count = grid.alpha.shape[1]
    if not offset:  # mu has no say: its rows and columns become those of nothing
        matrix[:, count:] = 0
        matrix[:, :, count:] = 0
        right[:, count:] = 0
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    damped = matrix.clone()
    damped.diagonal(dim1=1, dim2=2).copy_(
        torch.where(diagonal > 0, diagonal * (1 + RIDGE), torch.ones_like(diagonal))
    )
    lower, info = torch.linalg.cholesky_ex(damped)
    step = torch.cholesky_solve(right[..., None], lower)[..., 0]
    step = torch.where((info == 0)[:, None] & step.isfinite(), step, 0.0)
    blocks = grid.alpha.shape[1]
    old = torch.cat([grid.alpha, grid.mu], dim=1)
    alpha, mu = (old + step).float().split(blocks, dim=1)
    if mirrored:
        mu = mu + mirrored * alpha.clamp(max=0)
    stored = store_grid(Grid(alpha, mu), scales)
    new = torch.cat([stored.alpha, stored.mu], dim=1)
    step = new.double() - old.double()
    if mirrored:  # what the stored pair means for t as it is
        step[:, blocks:] -= mirrored * stored.alpha.double().clamp(max=0)
    change = torch.einsum("ri,rij,rj->r", step, matrix, step) - 2 * (step * right).sum(dim=1)
    new = torch.where((change < 0)[:, None], new, old)
    return Grid(new[:, :blocks].contiguous(), new[:, blocks:].contiguous())


def _normal_equations(target: Tensor, t: Tensor, grid: Grid, h: Tensor) -> tuple[Tensor, Tensor]:
    """The quadratic form of f in a change of (alphas, mus), and its gradient.

    Returns:
        (matrix float64 ``[rows, 2 blocks, 2 blocks]``, right float64 ``[rows, 2 blocks]``)
    """
    rows, cols = target.shape
    blocks = grid.alpha.shape[1]
    k = cols // blocks
    by_block = t.reshape(rows, blocks, k)
    gradient = ((target - dequantize(t, grid)) @ h).reshape(rows, blocks, k)
    right = torch.cat([(gradient * by_block).sum(dim=2), gradient.sum(dim=2)], dim=1).double()
    matrix = torch.empty(rows, 2 * blocks, 2 * blocks, dtype=torch.float64, device=t.device)
    for b in range(blocks):
        block = slice(b * k, (b + 1) * k)
        th = (t[:, block] @ h[block]).reshape(rows, blocks, k)
        matrix[:, b, :blocks] = (th * by_block).sum(dim=2)
        matrix[:, b, blocks:] = th.sum(dim=2)
    ones = h.double().reshape(blocks, k, blocks, k).sum(dim=(1, 3))
    matrix[:, blocks:, blocks:] = ones
    matrix[:, blocks:, :blocks] = matrix[:, :blocks, blocks:].transpose(1, 2)
    return (matrix + matrix.transpose(1, 2)) / 2, right
