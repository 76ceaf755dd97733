"""Compensation, re-rounding, orders: against brute force on small matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_support import moments, weights

from pt2_core.errors import PT2Error
from quantize.method import gptq, reorder
from quantize.method.gptq import Errors, Method, damp, eliminate, quantize_matrix
from quantize.method.ternary import Grid, iterative_ternary_fitting, output_error, ternary_init

SEEDS = st.integers(0, 2**31 - 1)


def problem(seed: int, rows: int = 16, cols: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    return weights(seed, rows, cols), moments(seed, cols, tokens=4 * cols).double()


def loss(w: torch.Tensor, result: gptq.Ternary, h: torch.Tensor) -> float:
    return output_error(w, result.dequantize(), h.float())


@given(SEEDS, st.integers(1, 11))
@settings(max_examples=20, deadline=None)
def test_compensation_is_the_constrained_least_squares_solution(seed, k):
    cols = 12
    h = moments(seed, cols, tokens=60).double()
    hinv = torch.linalg.inv(h)
    spread, rest = eliminate(hinv, k)
    assert torch.allclose(rest, torch.linalg.inv(h[k:, k:]), rtol=1e-6, atol=1e-8)
    # An error e in the first k columns, and whatever change of the others makes up for it best.
    e = torch.randn(3, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    root = torch.linalg.cholesky(h).numpy()  # |d root|^2 = d h d^T
    want = np.linalg.lstsq(root[k:].T, -(e.numpy() @ root[:k]).T, rcond=None)[0].T
    # e is What_B - W_B, so the formula's sign turns.
    assert np.allclose((e @ spread).numpy(), want, rtol=1e-5, atol=1e-8)


def naive_reround(w, grid, hinv, order):
    """One column at a time, the whole inverse Hessian updated after each (OBS)."""
    w, hinv = w.double().clone(), hinv.clone()
    t = torch.zeros_like(w)
    left = list(order.tolist())
    while left:
        j = left.pop(0)
        t[:, j] = ((w[:, j] - grid.mu) / grid.alpha).round().clamp(-1, 1)
        e = w[:, j] - (grid.alpha * t[:, j] + grid.mu)
        for f in left:
            w[:, f] -= e * hinv[j, f] / hinv[j, j]
        row, pivot = hinv[j].clone(), hinv[j, j].clone()
        hinv = hinv - torch.outer(row, row) / pivot
    return t.float()


@pytest.mark.parametrize("sub_block", [5, 32, 1000])
def test_rerounding_is_obs_column_by_column(sub_block, monkeypatch):
    monkeypatch.setattr(gptq, "SUB_BLOCK", sub_block)
    monkeypatch.setattr(gptq, "CPU_ROWS", 7)
    w, h = problem(4, rows=20, cols=48)
    grid, _ = iterative_ternary_fitting(w, ternary_init(w)[1])
    hinv = damp(h, 0.01)[1]
    feedback, order = gptq.feedback_weights(hinv, h.float())
    got = gptq.reround(w, grid, feedback, order)
    want = naive_reround(w, grid, hinv, order)
    assert (got != want).float().mean() < 0.005  # a tie may fall either way in float32
    assert order.tolist() == sorted(range(48), key=lambda j: -h[j, j].item())


def test_each_stage_of_the_method_lowers_the_error_of_the_whole_matrix():
    totals: dict[str, float] = {}
    for seed in range(12):
        w, h = problem(seed, rows=32, cols=128)
        for name, method in {
            "alone": Method(32, compensate=False, reround=0),
            "compensated": Method(32, reround=0),
            "no aga": Method(32, aga=False, reround=0),
            "rerounded": Method(32, reround=1),
        }.items():
            result, errors = quantize_matrix(w, h, method)
            totals[name] = totals.get(name, 0.0) + loss(w, result, h)
            final = errors.rows_of(0, 32)["E_x"]["final"]
            assert final == pytest.approx(loss(w, result, h), rel=1e-4)
    assert totals["rerounded"] < totals["compensated"] < totals["no aga"]
    assert totals["compensated"] < totals["alone"]


def test_stage_errors_are_sums_over_the_blocks():
    w, h = problem(2, rows=4, cols=64)
    method = Method(64, reround=1)
    errors = Errors()
    grid, t = gptq.ternarize_block(w, h.float(), method, damp(h, 0.01)[1], errors)
    assert list(errors.output) == ["init", "itf", "aga", "reround"]
    assert errors.output["reround"].sum().item() == pytest.approx(
        output_error(w, grid.dequantize(t), h.float()), rel=1e-4
    )
    _, whole = quantize_matrix(torch.cat([w, w], dim=0), h, method)
    for stage, value in errors.output.items():
        assert torch.allclose(whole.output[stage][4:], value, rtol=1e-3)


@given(SEEDS, st.sampled_from(["none", "random", "ssr", "hessian"]))
@settings(max_examples=12, deadline=None)
def test_result_is_what_the_artifact_stores(seed, order):
    w, h = problem(seed, rows=8, cols=64)
    perms = {"random": reorder.random_order(64, seed, "x"), "hessian": reorder.descending(h.diag())}
    result, _ = quantize_matrix(w, h, Method(16), perm=perms.get(order), ssr=order == "ssr")
    assert sorted(result.perm.tolist()) == list(range(64))
    assert torch.equal(result.alpha, result.alpha.half().float())
    assert torch.equal(result.mu, result.mu.half().float())
    assert bool((result.alpha >= 0).all()) and result.t.dtype == torch.int8
    # The formula of docs/design.md, one column at a time.
    for j in range(64):
        column = result.alpha[:, j // 16] * result.t[:, j] + result.mu[:, j // 16]
        assert torch.allclose(result.dequantize()[:, result.perm[j]], column, atol=1e-7)


def test_an_order_is_only_a_renaming_of_the_columns():
    w, h = problem(5)
    perm = reorder.random_order(64, 1, "m")
    there, _ = quantize_matrix(w, h, Method(16), perm=perm)
    here, _ = quantize_matrix(w[:, perm], h[perm[:, None], perm], Method(16))
    assert torch.equal(there.t, here.t) and torch.equal(there.alpha, here.alpha)
    assert torch.equal(w[:, perm][:, reorder.inverse(perm)], w)
    x = torch.randn(7, 64)
    assert torch.allclose(x[:, perm] @ w[:, perm].T, x @ w.T, atol=6e-6)


def test_matrices_with_one_input_may_be_stacked():
    w, h = problem(6, rows=40)
    whole, errors = quantize_matrix(w, h, Method(32))
    top, top_errors = quantize_matrix(w[:16], h, Method(32))
    part = whole.rows_of(0, 16)
    assert (part.t != top.t).float().mean() < 0.01
    assert errors.rows_of(0, 16)["E_x"]["final"] == pytest.approx(
        top_errors.rows_of(0, 16)["E_x"]["final"], rel=0.02
    )


def test_dead_inputs_zero_rows_and_constant_rows():
    w, h = problem(7)
    dead = torch.tensor([3, 40])
    h[dead] = 0
    h[:, dead] = 0
    w[1] = 0
    w[2] = 0.25
    messages: list[str] = []
    result, _ = quantize_matrix(w, h, Method(32), log=messages.append)
    assert "2 of 64 inputs are always 0" in messages[0]
    alive = torch.ones(64, dtype=torch.bool)
    alive[dead] = False
    w_hat = result.dequantize()
    assert bool(w_hat.isfinite().all())
    assert not w_hat[1].any() and not result.t[1].any()
    assert output_error(w[2:3, alive], w_hat[2:3, alive], h[alive][:, alive].float()) < 1e-3


def test_a_hessian_that_is_not_positive_definite_gets_more_damping():
    w, h = problem(8)
    values, vectors = torch.linalg.eigh(h)
    values[0] = -0.05 * h.diagonal().mean()
    broken = vectors @ torch.diag(values) @ vectors.T
    messages: list[str] = []
    result, _ = quantize_matrix(w, broken, Method(32), log=messages.append)
    assert any("trying 0.1" in m for m in messages)
    assert bool(result.dequantize().isfinite().all())
    values[0] = -1000 * h.diagonal().mean()
    with pytest.raises(PT2Error, match="not positive definite"):
        damp(vectors @ torch.diag(values) @ vectors.T, 0.01)


def test_rank_one_inputs_are_survived():
    """Fewer calibration tokens than columns: the Hessian is singular, damping mends it."""
    w = weights(11, 8, 64)
    x = torch.randn(1, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result, _ = quantize_matrix(w, x.T @ x, Method(32))
    assert loss(w, result, x.T @ x) < 0.05 * float((w.double() @ x.T).square().sum()) + 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused(value):
    w, h = problem(9)
    w[3, 3] = value
    with pytest.raises(PT2Error, match="NaN or Inf in the weights"):
        quantize_matrix(w, h, Method(32))
    w, h = problem(9)
    h[3, 3] = value
    with pytest.raises(PT2Error, match="NaN or Inf in the Hessian"):
        quantize_matrix(w, h, Method(32))


def test_ssr_takes_the_columns_most_like_the_mean():
    w = torch.randn(32, 20, generator=torch.Generator().manual_seed(0)).double()
    w[:, 7] = 0
    order = reorder.most_similar(w, 6)
    mean = w.mean(dim=1).numpy()
    cosine = [
        float(c @ mean / (np.linalg.norm(c) * np.linalg.norm(mean))) if c.any() else -2.0
        for c in w.T.numpy()
    ]
    assert order[:6].tolist() == sorted(range(20), key=lambda j: -cosine[j])[:6]
    assert order[6:].tolist() == sorted(order[6:].tolist())
    assert sorted(order.tolist()) == list(range(20))


@given(SEEDS, st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 3)]))
@settings(max_examples=20, deadline=None)
def test_orders_within_heads_can_be_folded(seed, layout):
    heads, group = layout
    head_dim = 8
    energy = torch.rand(heads * head_dim, generator=torch.Generator().manual_seed(seed))
    perm = reorder.within_heads(energy, head_dim, group)
    inner = perm.reshape(heads, head_dim)
    for head in range(heads):
        assert sorted((inner[head] - head * head_dim).tolist()) == list(range(head_dim))
        leader = head // group * group
        assert torch.equal(inner[head] - head * head_dim, inner[leader] - leader * head_dim)
    if group == 1:
        assert bool((energy[perm].reshape(heads, -1).diff(dim=1) <= 0).all())


def test_random_order_depends_on_seed_and_name_only():
    a = reorder.random_order(64, 0, "x")
    assert torch.equal(a, reorder.random_order(64, 0, "x"))
    assert not torch.equal(a, reorder.random_order(64, 1, "x"))
    assert not torch.equal(a, reorder.random_order(64, 0, "y"))


def test_grid_with_alpha_zero_rounds_to_zero():
    w, h = problem(12, rows=3, cols=16)
    feedback, order = gptq.feedback_weights(damp(h, 0.01)[1], h.float())
    t = gptq.reround(w, Grid(torch.zeros(3), torch.zeros(3)), feedback, order)
    assert not t.any()
