"""Whole rows at once: the joint grid and coordinate descent, against brute force and themselves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_support import moments, weights

from pt2_core.errors import PT2Error
from quantize.method import descent
from quantize.method.gptq import Method, quantize_matrix
from quantize.method.ternary import (
    Grid,
    fit_grid,
    iterative_ternary_fitting,
    positive_alpha,
    starting_point,
    store_grid,
)

SEEDS = st.integers(0, 2**31 - 1)


def problem(seed: int, rows: int = 8, cols: int = 64, k: int = 16, levels: int = 3):
    """Weights, T and a grid per block as a blockwise pass without activations leaves them, H."""
    w = weights(seed, rows, cols)
    h = moments(seed, cols, tokens=4 * cols).float()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    codes, grids = [], []
    for block in w.split(k, dim=1):
        grid, t = iterative_ternary_fitting(block, starting_point(block, levels)[1], 50, levels)
        grid, t = positive_alpha(grid, t, levels)
        grids.append(store_grid(grid))
        codes.append(t * (grid.alpha > 0)[:, None])
    alpha, mu = (torch.stack(v, dim=1) for v in zip(*grids, strict=True))
    return w, torch.cat(codes, dim=1), Grid(alpha, mu), h


def naive_descend(w, t, grid, h, sweeps, levels):
    """Every column tries all values, the whole objective computed for each, in float64."""
    k = w.shape[1] // grid.alpha.shape[1]
    t = t.double().clone()
    alpha, mu = (x.double().repeat_interleave(k, dim=1) for x in grid)
    for _ in range(sweeps):
        for j in range(w.shape[1]):
            values = []
            for candidate in range(-1, levels - 1):
                t[:, j] = candidate
                e = w.double() - alpha * t - mu
                values.append(((e @ h.double()) * e).sum(dim=1))
            t[:, j] = torch.stack(values).argmin(dim=0).double() - 1
    return t.float()


@pytest.mark.parametrize("sub_block, levels", [(1, 3), (5, 3), (32, 3), (5, 4)])
def test_descent_is_the_best_of_all_values_column_by_column(sub_block, levels, monkeypatch):
    monkeypatch.setattr(descent, "SUB_BLOCK", sub_block)
    w, t, grid, h = problem(1, levels=levels)
    for sweeps in (1, 3):
        got = descent.descend(w, t, grid, h, sweeps, levels=levels)
        want = naive_descend(w, t, grid, h, sweeps, levels)
        assert (got != want).float().mean() < 0.005  # a tie may fall either way in float32
        assert not torch.equal(got, t)


@given(SEEDS, st.sampled_from([3, 4]), st.sampled_from(["float16", "pair"]))
@settings(max_examples=25, deadline=None)
def test_neither_step_raises_the_objective_of_any_row(seed, levels, scales):
    w, t, grid, h = problem(seed, levels=levels)
    grid = store_grid(grid, scales)
    last = descent.objective(w, t, grid, h)
    start = last.clone()
    for _ in range(3):
        grid, t = descent.joint_grid(w, t, grid, h, levels, scales)
        assert all(map(torch.equal, grid, store_grid(grid, scales)))
        now = descent.objective(w, t, grid, h)
        assert bool((now <= last * (1 + 1e-5)).all())
        assert bool((grid.alpha >= 0).all()) and set(t.unique().tolist()) <= set(
            range(-1, levels - 1)
        )
        assert torch.equal(grid.alpha, grid.alpha.half().float())
        assert torch.equal(grid.mu, grid.mu.half().float())
        last = now
        t = descent.descend(w, t, grid, h, 1, levels=levels)
        now = descent.objective(w, t, grid, h)
        assert bool((now <= last * (1 + 1e-5)).all())
        last = now
    assert last.sum() < start.sum()


@given(SEEDS)
@settings(max_examples=15, deadline=None)
def test_the_joint_grid_is_the_least_squares_solution(seed):
    w, t, grid, h = problem(seed, rows=3, cols=48)
    new, turned = descent.joint_grid(w, t, grid, h)
    root = torch.linalg.cholesky(h.double()).numpy()  # |e root|^2 = e h e^T
    for row in range(3):
        basis = np.zeros((6, 48))
        for b in range(3):
            basis[b, 16 * b : 16 * b + 16] = t[row, 16 * b : 16 * b + 16]
            basis[3 + b, 16 * b : 16 * b + 16] = 1
        target = w[row].double().numpy() @ root
        solution, *_ = np.linalg.lstsq((basis @ root).T, target, rcond=None)
        least = float(np.square(solution @ basis @ root - target).sum())
        got = float(descent.objective(w, turned, new, h)[row])
        # float16's rounding of alpha and mu is all that is left between the two
        assert least * (1 - 1e-6) <= got <= least * 1.001 + 1e-9


def test_with_one_block_and_white_inputs_the_joint_grid_is_the_fitted_one():
    w, t, _, _ = problem(3, cols=32, k=32)
    start = Grid(torch.full((8, 1), 0.5), torch.zeros(8, 1))
    got, _ = descent.joint_grid(w, t, start, torch.eye(32))
    want = fit_grid(w, t)
    assert torch.allclose(got.alpha[:, 0], want.alpha, rtol=1e-3)
    assert torch.allclose(got.mu[:, 0], want.mu, rtol=1e-3, atol=1e-4)


def test_coordinate_descent_ends_where_no_single_change_helps():
    w, t, grid, h = problem(5, rows=4, cols=32)
    t = descent.descend(w, t, grid, h, 50)
    best = descent.objective(w, t, grid, h)
    for j, value in itertools.product(range(32), (-1.0, 0.0, 1.0)):
        other = t.clone()
        other[:, j] = value
        assert bool((descent.objective(w, other, grid, h) >= best * (1 - 1e-5)).all())


@pytest.mark.parametrize("levels", [3, 4])
def test_a_joint_grid_of_negative_alpha_counts_t_from_the_other_end(levels):
    """Started from the mirrored T, the solution is the same weights, alpha again above 0."""
    w, t, grid, h = problem(4, levels=levels)
    plain, same = descent.joint_grid(w, t, grid, h, levels)
    zero = Grid(torch.zeros_like(grid.alpha), grid.mu)
    turned, back = descent.joint_grid(w, levels - 3 - t, zero, h, levels)
    assert torch.equal(same, back) and bool((turned.alpha > 0).all())
    a, b = (descent.objective(w, same, g, h) for g in (plain, turned))
    assert torch.allclose(a, b, rtol=1e-3)


def test_blocks_that_say_nothing_of_alpha_keep_a_sound_grid():
    """T all zero, T all one, a row of zeros: singular systems must change nothing for the worse."""
    w, t, grid, h = problem(6)
    t[0, :16] = 0
    t[1, 16:32] = 1
    w[2] = 0
    t[2] = 0
    before = descent.objective(w, t, grid, h)
    new, turned = descent.joint_grid(w, t, grid, h)
    assert bool(new.alpha.isfinite().all()) and bool(new.mu.isfinite().all())
    assert bool((descent.objective(w, turned, new, h) <= before * (1 + 1e-5)).all())
    zero = Grid(torch.zeros_like(grid.alpha), grid.mu)
    assert torch.equal(descent.descend(w, t, zero, h, 2), t)


def test_rows_do_not_depend_on_each_other(monkeypatch):
    w, t, grid, h = problem(7, rows=20)
    search = descent.Search(2, 3)
    whole_grid, whole_t = descent.refine_rows(w, t, grid, h, search)
    monkeypatch.setattr(descent, "CPU_ROWS", 7)
    monkeypatch.setattr(descent, "SOLVE_NUMBERS", 300)
    parts_grid, parts_t = descent.refine_rows(w, t, grid, h, search)
    assert (whole_t != parts_t).float().mean() < 0.01
    a = descent.objective(w, whole_t, whole_grid, h).sum()
    b = descent.objective(w, parts_t, parts_grid, h).sum()
    assert b == pytest.approx(float(a), rel=0.01)


def test_annealing_finds_what_plain_descent_does_not_and_never_makes_a_row_worse():
    w, t, grid, h = problem(10, rows=64, cols=96, k=32)
    start = descent.objective(w, t, grid, h)

    def ends(noise: float, seed: int = 0) -> torch.Tensor:
        new, found = descent.refine_rows(w, t, grid, h, descent.Search(8, 2, noise, seed))
        value = descent.objective(w, found, new, h)
        assert bool((value <= start * (1 + 1e-6)).all())
        return value

    plain, annealed = ends(0.0).sum(), ends(0.1).sum()
    assert annealed < 0.99 * plain
    assert torch.equal(ends(0.1), ends(0.1)) and not torch.equal(ends(0.1), ends(0.1, seed=1))
    assert bool((ends(1.0) <= start * (1 + 1e-6)).all())  # far too much noise: rows stay


def test_a_grid_that_float16_cannot_hold_is_refused():
    w, t, grid, h = problem(8)
    with pytest.raises(PT2Error, match="float16"):
        descent.joint_grid(w * 1e8, t, grid, h)


def test_four_levels_lose_less_than_three_at_every_stage():
    w, h = weights(9, 32, 128), moments(9, 128, tokens=512).double()
    three, four = (
        quantize_matrix(w, h, Method(32, levels, rounds=2))[1].rows_of(0, 32)["E_x"]
        for levels in (3, 4)
    )
    assert three.keys() == four.keys() and len(four) == 6
    assert all(four[stage] < 0.8 * three[stage] for stage in four if stage != "init")


@pytest.mark.parametrize("levels", [3, 4])
def test_pairs_cost_little_and_every_grid_is_one(levels):
    w, h = weights(9, 32, 128), moments(9, 128, tokens=512).double()
    halves, pair = (
        quantize_matrix(w, h, Method(32, levels, scales, rounds=2))
        for scales in ("float16", "pair")
    )
    result, sums = pair[0], pair[1].rows_of(0, 32)["E_x"]
    grid = Grid(result.alpha, result.mu)
    assert all(map(torch.equal, grid, store_grid(grid, "pair")))
    assert sums["final"] < 1.05 * halves[1].rows_of(0, 32)["E_x"]["final"]


def test_a_mean_far_beyond_the_spread_survives_a_pair():
    """Mu is out of the fitted alpha's reach: the pair's alpha is raised, and T chosen for it."""
    w, h = weights(9, 8, 32) + 5.0, moments(9, 32, tokens=512).double()
    result, _ = quantize_matrix(w, h, Method(32, 3, "pair"))
    assert float((result.dequantize() - w).abs().max()) < 0.6
    with pytest.raises(PT2Error, match="scale pair"):
        quantize_matrix(w * 1e5, h, Method(32, 3, "pair"))


@pytest.mark.parametrize("levels", [3, 4])
def test_rounds_lower_the_error_of_the_whole_matrix_and_a_target_is_followed(levels):
    w, h = weights(9, 32, 128), moments(9, 128, tokens=512).double()
    _, plain = quantize_matrix(w, h, Method(32, levels))
    result, errors = quantize_matrix(w, h, Method(32, levels, rounds=2))
    assert set(result.t.unique().tolist()) == set(range(-1, levels - 1))
    sums = errors.rows_of(0, 32)["E_x"]
    assert sums["blockwise"] == pytest.approx(plain.rows_of(0, 32)["E_x"]["final"], rel=1e-6)
    assert sums["final"] < 0.97 * sums["blockwise"]
    assert torch.equal(result.t * (result.alpha == 0).repeat_interleave(32, 1), result.t * 0)
    target = w + 0.02 * torch.randn(w.shape, generator=torch.Generator().manual_seed(0))
    moved, _ = quantize_matrix(w, h, Method(32, levels, rounds=2), target=target)
    near, far = (((moved.dequantize() - x) @ h.float() * (moved.dequantize() - x)).sum()
                 for x in (target, w))  # fmt: skip
    assert near < far
