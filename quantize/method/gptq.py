"""Blockwise quantisation of a weight matrix to three or four levels with exact error compensation.

After a block B of columns is quantised, the columns F that are still to come are moved so that the
layer's output changes least:  delta_F = -(W_B - What_B) [Hinv_BB]^-1 Hinv_BF,  where Hinv is the
inverse of the (damped) Hessian of B and F together. Eliminating B from Hinv leaves the inverse for
F, whatever the order in which blocks are chosen, so SSR may choose as it goes. Hinv is float64, the
weights float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pt2_core.errors import PT2Error
from quantize.method import descent, reorder
from quantize.method.ternary import (
    CPU_ROWS,
    Grid,
    activation_grid,
    clamp_levels_,
    fit_grid,
    iterative_ternary_fitting,
    positive_alpha,
    round_to_grid,
    scale_only,
    scale_start,
    starting_point,
    store_grid,
)

STAGES = ("init", "itf", "aga", "reround")
# Columns re-rounded before their errors are carried to the rest of the block by one matmul.
SUB_BLOCK = 32
DAMPING_TRIES = 4
# A scale pair whose alpha is so much larger than the one it stands for has been raised to reach mu.
RAISED = 1.1


@dataclass(frozen=True)
class Method:
    """What is done to each block; the fields are those of quantize.config.Config."""

    block_size: int = 128
    levels: int = 3
    scales: str = "float16"
    offset: bool = True
    itf: bool = True
    itf_steps: int = 50
    aga: bool = True
    compensate: bool = True
    reround: int = 1
    damping: float = 0.01
    rounds: int = 0
    sweeps: int = 4
    noise: float = 0.0
    seed: int = 0


class Ternary(NamedTuple):
    """A quantised matrix, columns in the quantised order.

    t int8 ``[rows, cols]``; alpha and mu float32 ``[rows, cols/k]`` whose values are float16's;
    perm int64 ``[cols]``.
    """

    t: Tensor
    alpha: Tensor
    mu: Tensor
    perm: Tensor

    def dequantize(self) -> Tensor:
        """float32 ``[rows, cols]``, columns in the source's order."""
        rows, cols = self.t.shape
        blocks = self.t.reshape(rows, self.alpha.shape[1], -1).float()
        blocks = torch.addcmul(self.mu[..., None], self.alpha[..., None], blocks)
        return blocks.reshape(rows, cols)[:, reorder.inverse(self.perm)]

    def rows_of(self, start: int, stop: int) -> Ternary:
        """Rows ``start:stop``, which share this matrix's column order."""
        return Ternary(self.t[start:stop], self.alpha[start:stop], self.mu[start:stop], self.perm)


@dataclass
class Errors:
    """E_w and E_x of every row after each stage, float64 ``[rows]``, summed over the blocks.

    For the stages these are errors of each block against the weights it was given (already moved by
    the compensation); ``final`` is the error of the whole matrix against its original weights, for
    which the compensation counts as well.
    """

    weight: dict[str, Tensor] = field(default_factory=dict)
    output: dict[str, Tensor] = field(default_factory=dict)

    def add(self, stage: str, w: Tensor, w_hat: Tensor, c: Tensor) -> None:
        """Add one block's (or the whole matrix's) errors to a stage."""
        e = w - w_hat
        for store, value in (
            (self.weight, e.square().sum(dim=1, dtype=torch.float64)),
            (self.output, ((e @ c) * e).sum(dim=1, dtype=torch.float64)),
        ):
            store[stage] = store[stage] + value if stage in store else value

    def rows_of(self, start: int, stop: int) -> dict[str, dict[str, float]]:
        """Sums over rows ``start:stop``: ``{"E_w": {stage: ...}, "E_x": {stage: ...}}``."""
        return {
            "E_w": {k: float(v[start:stop].sum()) for k, v in self.weight.items()},
            "E_x": {k: float(v[start:stop].sum()) for k, v in self.output.items()},
        }


def quantize_matrix(
    w: Tensor,
    hessian: Tensor,
    method: Method,
    *,
    perm: Tensor | None = None,
    ssr: bool = False,
    target: Tensor | None = None,
    log: Callable[[str], None] = lambda message: None,
) -> tuple[Ternary, Errors]:
    """Ternarise one matrix, or several with the same input stacked by rows.

    First block by block with compensation; then, with ``method.rounds``, whole rows at once
    (:mod:`quantize.method.descent`).

    Args:
        w: float32 ``[rows, cols]``; cols a multiple of the block size. Not changed.
        hessian: float64 ``[cols, cols]``, the mean of x x^T over the calibration tokens.
        perm: int64 ``[cols]``, the order of the columns (None: as they are).
        ssr: choose every block's columns on the way (eq. 16) instead.
        target: float32 ``[rows, cols]``, what to come close to instead of ``w`` (None: ``w``).
            Errors are those against ``w`` in any case.
        log: told, in one line, of dead columns and of more damping.

    Returns:
        (the quantised matrix, errors per row and stage)

    Raises:
        PT2Error: NaN or Inf in ``w`` or ``hessian``, or a Hessian that no damping mends.
    """
    if not bool(w.isfinite().all()):
        raise PT2Error("NaN or Inf in the weights")
    cols, k = w.shape[1], method.block_size
    perm = torch.arange(cols, device=w.device) if perm is None else perm.to(w.device)
    original, aim, hessian = _mend_dead_columns(w, w if target is None else target, hessian, log)
    w = aim[:, perm]
    damped, inverse = damp(hessian, method.damping, log)
    hinv = inverse[perm[:, None], perm] if method.compensate or method.reround else None
    codes = torch.empty_like(w, dtype=torch.int8)
    grids: list[Grid] = []
    errors = Errors()
    for start in range(0, cols, k):
        if ssr:
            move = reorder.most_similar(w[:, start:], k)
            w[:, start:] = w[:, start:][:, move]
            perm = torch.cat([perm[:start], perm[start:][move]])
            hinv = hinv[move[:, None], move] if hinv is not None else None
        here = perm[start : start + k]
        c = hessian[here[:, None], here].float()
        block = w[:, start : start + k].contiguous()
        grid, t = ternarize_block(block, c, method, _block_of(hinv, k), errors)
        codes[:, start : start + k] = t.to(torch.int8)
        grids.append(grid)
        if hinv is not None:
            spread, hinv = eliminate(hinv, k)
            if method.compensate:
                w[:, start + k :].addmm_(block - grid.dequantize(t), spread.float(), alpha=-1)
    alpha, mu = (torch.stack(v, dim=1) for v in zip(*grids))  # noqa: B905
    result = Ternary(codes, alpha, mu, perm)
    if method.rounds:
        errors.add("blockwise", original, result.dequantize(), hessian.float())
        h = damped[perm[:, None], perm].float()
        search = descent.Search(
            method.rounds, method.sweeps, method.noise, method.seed, method.levels, method.scales,
            method.offset,
        )  # fmt: skip
        grid, t = descent.refine_rows(aim[:, perm], codes.float(), Grid(alpha, mu), h, search)
        result = Ternary(t.to(torch.int8), grid.alpha, grid.mu, perm)
    errors.add("final", original, result.dequantize(), hessian.float())
    return result, errors


def ternarize_block(
    w: Tensor, c: Tensor, method: Method, hinv: Tensor | None, errors: Errors | None = None
) -> tuple[Grid, Tensor]:
    """Ternarise one block of columns: init, ITF, AGA, and re-rounding rounds, as ``method`` says.

    Args:
        w: float32 ``[rows, k]``.
        c: float32 ``[k, k]``, the block of the Hessian.
        hinv: float64 ``[k, k]``, the block of the inverse Hessian of the columns that are left; it
            says how an error in one column can be made up for in the others. Only for re-rounding.
        errors: where to add this block's errors after each stage.

    Returns:
        (grid whose values are float16's, with alpha >= 0 but for four levels without offset;
        t float32 ``[rows, k]``)
    """

    def note(stage: str, grid: Grid, t: Tensor) -> None:
        if errors is not None:
            errors.add(stage, w, grid.dequantize(t), c)

    if method.offset:
        start = starting_point(w, method.levels)
    else:
        signs = (1.0,) if method.levels == 3 else (1.0, -1.0)
        start = _better_sign(w, c, [scale_start(w, method.levels, s) for s in signs], method)
    grid, t = start
    note("init", grid, t)
    if method.itf:
        grid, t = iterative_ternary_fitting(w, t, method.itf_steps, method.levels, method.offset)
        note("itf", grid, t)
    if method.aga:
        grid = _grid_of(w, t, c, method)
        note("aga", grid, t)
    grid, t = _turned(grid, t, method)
    if method.reround and hinv is not None:
        feedback, order = feedback_weights(hinv, c)
        for _ in range(method.reround):
            t = reround(w, store_grid(grid, method.scales), feedback, order, method.levels)
            grid = _grid_of(w, t, c, method)
            grid, t = _turned(grid, t, method)
    meant, grid = grid, store_grid(grid, method.scales)
    if method.scales == "pair":  # t was chosen for a much smaller alpha where mu was out of reach
        raised = grid.alpha > RAISED * meant.alpha
        t = torch.where(raised[:, None], round_to_grid(w, grid, method.levels), t)
    t = t * (grid.alpha != 0)[:, None]  # one code for one value: t is 0 where alpha is
    if method.reround:
        note("reround", grid, t)
    return grid, t


def _grid_of(w: Tensor, t: Tensor, c: Tensor, method: Method) -> Grid:
    """The best grid for a given t, in the metric that ``method`` asks for."""
    if not method.offset:
        return scale_only(w, t, c if method.aga else None)
    return activation_grid(w, t, c) if method.aga else fit_grid(w, t)


def _turned(grid: Grid, t: Tensor, method: Method) -> tuple[Grid, Tensor]:
    """Alpha made positive where the levels allow it: four without an offset have no mirror."""
    if not method.offset and method.levels != 3:
        return grid, t
    return positive_alpha(grid, t, method.levels)


def _better_sign(
    w: Tensor, c: Tensor, starts: list[tuple[Grid, Tensor]], method: Method
) -> tuple[Grid, Tensor]:
    """The start, row by row, that ends in the smaller output error after ITF and AGA."""
    if len(starts) == 1:
        return starts[0]
    errors = []
    for grid, t in starts:
        if method.itf:
            grid, t = iterative_ternary_fitting(w, t, method.itf_steps, method.levels, False)
        if method.aga:
            grid = scale_only(w, t, c)
        e = w - grid.dequantize(t)
        errors.append(((e @ c) * e).sum(dim=1))
    (first, t), (second, t_second) = starts
    other = errors[1] < errors[0]
    alpha = torch.where(other, second.alpha, first.alpha)
    return Grid(alpha, first.mu), torch.where(other[:, None], t_second, t)


def feedback_weights(hinv: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """How far re-rounding moves the later columns of a block for an error in an earlier one.

    Args:
        hinv: float64 ``[k, k]``, see :func:`ternarize_block`.
        c: float32 ``[k, k]``.

    Returns:
        (n, order): an error e in column ``order[i]`` moves column ``order[j]``, j > i, by
        ``-e * n[i, j]``; n float32 ``[k, k]``. Columns with the most energy are rounded first,
        while the most others can still make up for them. They need not lie in that order.
    """
    order = torch.argsort(c.diagonal(), descending=True, stable=True)
    upper = torch.linalg.cholesky(hinv[order[:, None], order]).T
    return (upper / upper.diagonal()[:, None]).float(), order


def reround(w: Tensor, grid: Grid, feedback: Tensor, order: Tensor, levels: int = 3) -> Tensor:
    """Choose t anew, column by column, on a fixed grid with error feedback inside the block.

    Args:
        w: float32 ``[rows, k]``.
        feedback, order: see :func:`feedback_weights`.

    Returns:
        t, float32 ``[rows, k]``.
    """
    if w.device.type != "cpu" or w.shape[0] <= CPU_ROWS:
        return _reround(w, grid, feedback, order, levels)
    parts = zip(w.split(CPU_ROWS), grid.alpha.split(CPU_ROWS), grid.mu.split(CPU_ROWS))  # noqa: B905
    return torch.cat([_reround(a, Grid(b, m), feedback, order, levels) for a, b, m in parts])


def _reround(w: Tensor, grid: Grid, feedback: Tensor, order: Tensor, levels: int) -> Tensor:
    left = w.T[order]  # [k, rows]: one column of w is one run of memory
    t = torch.empty_like(left)
    error = torch.empty_like(left)
    inverse = torch.where(grid.alpha == 0, 0.0, 1.0 / grid.alpha)
    for begin in range(0, left.shape[0], SUB_BLOCK):
        end = min(begin + SUB_BLOCK, left.shape[0])
        for j in range(begin, end):
            torch.sub(left[j], grid.mu, out=t[j])
            clamp_levels_(t[j].mul_(inverse).round_(), levels)
            torch.sub(left[j], grid.mu, out=error[j])
            error[j].addcmul_(grid.alpha, t[j], value=-1)
            if j + 1 < end:
                left[j + 1 : end].addr_(feedback[j, j + 1 : end], error[j], alpha=-1)
        left[end:].addmm_(feedback[begin:end, end:].T, error[begin:end], alpha=-1)
    return t[reorder.inverse(order)].T.contiguous()


def eliminate(hinv: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Take the first k columns out of an inverse Hessian.

    Args:
        hinv: float64 ``[n, n]``, symmetric positive definite.

    Returns:
        (spread, rest): ``spread = [Hinv_BB]^-1 Hinv_BF``, ``[k, n-k]``, says how an error in B is
        made up for in F; ``rest``, ``[n-k, n-k]``, is the inverse of H restricted to F.
    """
    lower = torch.linalg.cholesky(hinv[:k, :k])
    spread = torch.cholesky_solve(hinv[:k, k:], lower)
    rest = torch.addmm(hinv[k:, k:], hinv[k:, :k], spread, alpha=-1)
    return spread, rest


def damp(
    hessian: Tensor, damping: float, log: Callable[[str], None] = lambda message: None
) -> tuple[Tensor, Tensor]:
    """``hessian + damping * mean(diagonal) * identity`` and its inverse, float64 ``[n, n]``.

    A matrix that is then not positive definite gets ten times the damping, at most three times
    over; ``log`` is told each time.

    Raises:
        PT2Error: it is still not positive definite.
    """
    mean = hessian.diagonal().mean()
    for attempt in range(DAMPING_TRIES):
        damped = hessian.clone()
        damped.diagonal().add_(damping * 10**attempt * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            inverse = torch.cholesky_inverse(lower)
            if bool(inverse.isfinite().all()):
                return damped, inverse
        if attempt + 1 < DAMPING_TRIES:
            log(
                f"the Hessian with {damping * 10**attempt:g} damping is not positive definite; "
                f"trying {damping * 10 ** (attempt + 1):g}"
            )
    raise PT2Error(
        "the Hessian is not positive definite, even with much damping: "
        "use more calibration text, or a larger --damping"
    )


def _mend_dead_columns(
    w: Tensor, target: Tensor, hessian: Tensor, log: Callable[[str], None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs that were never other than 0: their diagonal becomes 1, their weights 0."""
    diagonal = hessian.diagonal()
    if not bool(diagonal.isfinite().all()):
        raise PT2Error("NaN or Inf in the Hessian")
    dead = diagonal <= 0
    count = int(dead.sum())
    if count == 0:
        return w, target, hessian
    log(f"{count} of {w.shape[1]} inputs are always 0; their weights are taken as 0")
    hessian = hessian.clone()
    hessian.diagonal().masked_fill_(dead, 1.0)
    return w.masked_fill(dead, 0.0), target.masked_fill(dead, 0.0), hessian


def _block_of(hinv: Tensor | None, k: int) -> Tensor | None:
    return None if hinv is None else hinv[:k, :k]
