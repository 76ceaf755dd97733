"""The quantiser of one block: the paper's equations, its invariants, and the degenerate rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_support import moments, weights

from pt2_core.errors import PT2Error
from quantize.method import ternary
from quantize.method.ternary import (
    Grid,
    activation_grid,
    fit_grid,
    iterative_ternary_fitting,
    output_error,
    positive_alpha,
    round_to_grid,
    store_grid,
    ternary_init,
    weight_error,
)

SEEDS = st.integers(0, 2**31 - 1)


def test_init_is_equation_4_and_5():
    w = weights(0, tails=True)
    grid, t = ternary_init(w)
    for i, row in enumerate(w.double().numpy()):
        mu = row.mean()
        centred = row - mu
        delta = 0.75 * np.abs(centred).mean()
        want = np.where(centred > delta, 1, np.where(centred < -delta, -1, 0))
        assert np.array_equal(t[i].numpy(), want)
        assert grid.alpha[i].item() == pytest.approx(
            (want * centred).sum() / np.abs(want).sum(), rel=1e-5
        )
        assert grid.mu[i].item() == pytest.approx(mu, rel=1e-4, abs=1e-7)


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_equation_9_is_least_squares(seed):
    w = weights(seed, rows=6, k=16)
    t = torch.randint(-1, 2, w.shape, generator=torch.Generator().manual_seed(seed)).float()
    t[:, 0], t[:, 1] = 1, -1  # never constant
    grid = fit_grid(w, t)
    for i in range(w.shape[0]):
        columns = np.stack([t[i].numpy(), np.ones(w.shape[1])], axis=1).astype(np.float64)
        want = np.linalg.lstsq(columns, w[i].double().numpy(), rcond=None)[0]
        assert np.allclose([grid.alpha[i], grid.mu[i]], want, rtol=1e-3, atol=1e-6)


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_equation_12_is_weighted_least_squares(seed):
    w, c = weights(seed, rows=6, k=16), moments(seed, k=16)
    _, t = ternary_init(w)
    grid = activation_grid(w, t, c)
    root = np.linalg.cholesky(c.double().numpy() + 1e-12 * np.eye(16))  # c = root root^T
    for i in range(w.shape[0]):
        columns = root.T @ np.stack([t[i].numpy(), np.ones(16)], axis=1).astype(np.float64)
        want = np.linalg.lstsq(columns, root.T @ w[i].double().numpy(), rcond=None)[0]
        assert np.allclose([grid.alpha[i], grid.mu[i]], want, rtol=2e-3, atol=1e-5)


def test_rounding_takes_the_nearest_point():
    w = weights(3)
    grid, _ = ternary_init(w)
    t = round_to_grid(w, grid)
    errors = torch.stack([(w - grid.dequantize(torch.full_like(w, v))).abs() for v in (-1, 0, 1)])
    chosen = (w - grid.dequantize(t)).abs()
    assert torch.allclose(chosen, errors.min(dim=0).values, atol=1e-7)


@given(SEEDS, st.booleans(), st.sampled_from([3, 4]))
@settings(max_examples=25, deadline=None)
def test_itf_never_raises_the_weight_error_and_ends_in_a_fixed_point(seed, tails, levels):
    w = weights(seed, rows=16, k=128, tails=tails)
    grid, begin = ternary.starting_point(w, levels)
    last = weight_error(w, grid.dequantize(begin))
    for steps in range(1, 30):
        grid, t = iterative_ternary_fitting(w, begin, steps, levels)
        error = weight_error(w, grid.dequantize(t))
        assert error <= last * (1 + 1e-6)
        last = error
    grid, t = iterative_ternary_fitting(w, begin, 50, levels)
    assert torch.equal(round_to_grid(w, fit_grid(w, t), levels), t)
    assert set(t.unique().tolist()) == set(range(-1, levels - 1))
    assert torch.allclose(torch.stack(grid), torch.stack(fit_grid(w, t)), atol=1e-7)


def test_itf_by_chunks_is_the_same_as_row_by_row(monkeypatch):
    w = weights(5, rows=50, k=64, tails=True)
    _, start = ternary_init(w)
    monkeypatch.setattr(ternary, "CPU_ROWS", 8)
    grid, t = iterative_ternary_fitting(w, start)
    for i in range(w.shape[0]):
        one, t_one = iterative_ternary_fitting(w[i : i + 1], start[i : i + 1])
        assert torch.equal(t[i], t_one[0])
        assert grid.alpha[i].item() == pytest.approx(one.alpha.item(), rel=1e-5)


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_aga_lowers_the_output_error_of_every_row(seed):
    w, c = weights(seed, k=64), moments(seed, k=64)
    grid, t = iterative_ternary_fitting(w, ternary_init(w)[1])
    aligned = activation_grid(w, t, c)
    for i in range(w.shape[0]):
        row = slice(i, i + 1)
        before = output_error(w[row], Grid(*(v[row] for v in grid)).dequantize(t[row]), c)
        after = output_error(w[row], Grid(*(v[row] for v in aligned)).dequantize(t[row]), c)
        assert after <= before * (1 + 1e-4)
    assert weight_error(w, aligned.dequantize(t)) >= weight_error(w, grid.dequantize(t)) * 0.9999


def test_negative_alpha_changes_signs_only():
    w = weights(7)
    _, t = ternary_init(w)
    grid = Grid(torch.linspace(-1, 1, w.shape[0]), torch.zeros(w.shape[0]))
    flipped, t2 = positive_alpha(grid, t)
    assert bool((flipped.alpha >= 0).all())
    assert torch.equal(flipped.dequantize(t2), grid.dequantize(t))


def test_four_levels_turn_round_to_the_same_values():
    w = weights(7)
    _, t = ternary.starting_point(w, 4)
    grid = Grid(torch.linspace(-1, 1, w.shape[0]), w.mean(dim=1))
    turned, t2 = positive_alpha(grid, t, 4)
    assert bool((turned.alpha >= 0).all()) and set(t2.unique().tolist()) == {-1, 0, 1, 2}
    assert torch.allclose(turned.dequantize(t2), grid.dequantize(t), atol=1e-6)


def test_four_levels_of_a_row_that_has_them_are_found_exactly():
    t = torch.randint(-1, 3, (5, 128), generator=torch.Generator().manual_seed(0)).float()
    grid = Grid(torch.linspace(0.5, 2, 5), torch.linspace(-1, 1, 5))
    w = grid.dequantize(t)
    found, t2 = iterative_ternary_fitting(w, ternary.starting_point(w, 4)[1], 50, 4)
    assert torch.equal(t2, t)
    assert torch.allclose(torch.stack(found), torch.stack(grid), atol=1e-5)


@pytest.mark.parametrize("levels", [3, 4])
@pytest.mark.parametrize("value", [0.0, 0.37, -2.5])
def test_a_row_of_equal_values(value, levels):
    w = torch.full((2, 16), value)
    grid, t = iterative_ternary_fitting(w, ternary.starting_point(w, levels)[1], 50, levels)
    aligned = activation_grid(w, t, moments(1, k=16))
    for g in (grid, aligned):
        assert torch.equal(g.alpha, torch.zeros(2))
        assert torch.allclose(g.dequantize(t), w, rtol=1e-6)
    assert not t.any()


@pytest.mark.parametrize("levels", [3, 4])
def test_one_outlier_is_exact(levels):
    w = torch.zeros(3, 128)
    w[0, 5], w[1, 127], w[2, 0] = 8.0, -0.25, 1e-3
    grid, t = iterative_ternary_fitting(w, ternary.starting_point(w, levels)[1], 50, levels)
    assert torch.allclose(grid.dequantize(t), w, atol=1e-9)
    aligned = activation_grid(w, t, moments(2, k=128))
    assert torch.allclose(aligned.dequantize(t), w, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("constant", [-1.0, 0.0, 1.0])
def test_singular_systems_take_the_mean(constant):
    w, c = weights(9, rows=3, k=16), moments(9, k=16)
    t = torch.full_like(w, constant)
    assert torch.allclose(fit_grid(w, t).mu, w.mean(dim=1))
    aligned = activation_grid(w, t, c)
    assert torch.equal(aligned.alpha, torch.zeros(3))
    assert torch.allclose(aligned.mu, (w @ c.sum(dim=1)) / c.sum(), rtol=1e-4)


def test_inputs_that_are_always_zero_leave_the_weights_to_decide():
    w = weights(10, rows=3, k=16)
    _, t = ternary_init(w)
    aligned = activation_grid(w, t, torch.zeros(16, 16))
    assert torch.allclose(torch.stack(aligned), torch.stack(fit_grid(w, t)))


def test_weights_too_large_for_float16_are_refused():
    with pytest.raises(PT2Error, match="float16"):
        store_grid(Grid(torch.tensor([1e6]), torch.tensor([0.0])))


def test_weights_too_large_for_alpha_are_refused_by_their_size():
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    ternary.check_range(weight * 3e4, 128)
    with pytest.raises(PT2Error, match="too large for alpha in float16"):
        ternary.check_range(weight * 2e5, 128)
