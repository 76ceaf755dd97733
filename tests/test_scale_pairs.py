"""Scale pairs: every word, the rule that encodes them, its edges, and its twin in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pt2_core import scale_pairs as pairs
from quantize.method import scale_pairs as twin

WORDS = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
RNG = np.random.default_rng(0)


def by_the_page(word: int) -> tuple[float, float]:
    """One word, as docs/scale-pairs.md says it, in Python's exact arithmetic."""
    code, field = word >> pairs.MULTIPLE_BITS, word % (1 << pairs.MULTIPLE_BITS)
    step = 1 << pairs.MANTISSA_BITS
    alpha = (1 + code % step / step) * 2.0 ** (code // step - pairs.BIAS) if code else 0.0
    half = 1 << (pairs.MULTIPLE_BITS - 1)
    return alpha, alpha * (field - 2 * half if field >= half else field) / pairs.STEPS


def samples() -> tuple[np.ndarray, np.ndarray]:
    """Alphas and mus of every size, their edges, ties between codes, and mus out of reach."""
    alpha = np.exp2(RNG.uniform(-24, 16, 40000))
    mu = alpha * RNG.normal(0, 1.2, alpha.shape)
    table = pairs.alphas()
    ties = np.concatenate([(table[:-1] + table[1:]) / 2, table])
    alpha = np.concatenate([alpha, ties, np.zeros(1000), [3e38, 0.0, 0.0]])
    some = np.exp2(RNG.uniform(-30, 16, 1000)) * RNG.choice([-1, 1], 1000)
    mu = np.concatenate([mu, ties * RNG.uniform(-2, 2, ties.shape), some, [3e38, 3e38, -0.0]])
    return alpha.astype(np.float32), mu.astype(np.float32)


def test_every_word_has_the_value_that_the_page_says():
    alpha, mu = pairs.decode(WORDS)
    want = np.array([by_the_page(int(w)) for w in WORDS])
    assert alpha.dtype == mu.dtype == np.float32
    assert np.array_equal(np.stack([alpha, mu], axis=1).astype(np.float64), want)
    assert np.isfinite(want).all() and want[:, 0].min() == 0
    assert alpha[alpha > 0].min() == pairs.SMALLEST and alpha.max() == pairs.LARGEST


def test_weights_are_exact_in_float32_and_alpha_and_mu_are_found_again_from_halves():
    """So no implementation rounds, and an artifact with halves loses nothing."""
    alpha, mu = pairs.decode(WORDS)
    for t in (-1, 0, 1, 2):
        exact = alpha.astype(np.float64) * t + mu.astype(np.float64)
        assert np.array_equal((alpha * np.float32(t) + mu).astype(np.float64), exact)
    halves = [x.astype(np.float16).astype(np.float32) for x in (alpha, mu)]
    assert np.array_equal(halves[0], alpha) and np.isfinite(halves[1]).all()
    again = pairs.encode(*halves)
    assert np.array_equal(again[alpha > 0], WORDS[alpha > 0])
    assert not again[alpha == 0].any()


def test_encoding_takes_the_nearest_code_and_the_nearest_multiple():
    alpha, mu = samples()
    words = pairs.encode(alpha, mu)
    got, got_mu = (x.astype(np.float64) for x in pairs.decode(words))
    table = pairs.alphas()
    wanted = np.minimum(alpha, pairs.LARGEST).astype(np.float64)
    nearest = table[np.abs(table[None] - wanted[:4000, None]).argmin(axis=1)]
    reach = np.where(mu < 0, -pairs.LOW_END, pairs.HIGH_END) / pairs.STEPS
    plain = (np.abs(mu) <= reach * wanted * 0.9)[:4000]  # nearly as far as it goes
    plain &= wanted[:4000] > 2 * pairs.SMALLEST
    assert 0.5 < plain.mean() < 1
    assert np.array_equal(got[:4000][plain], nearest[plain])
    inside = (got > 0) & (np.abs(mu) <= reach * got)
    assert inside.mean() > 0.5
    assert (np.abs(got_mu - mu)[inside] <= got[inside] / pairs.STEPS / 2).all()


def test_ties_go_to_the_even_code():
    table = pairs.alphas()
    middles = ((table[:-1] + table[1:]) / 2).astype(np.float32)
    codes = pairs.encode(middles, np.zeros_like(middles)) >> pairs.MULTIPLE_BITS
    lower = np.arange(pairs.CODES - 1)
    assert np.array_equal(codes, lower + lower % 2)


def test_a_mu_out_of_reach_gets_the_smallest_alpha_that_reaches_it():
    alpha = np.array([0.01, 0.01, 0.0, 0.0, 0.0, 0.0], np.float32)
    mu = np.array([1.0, -1.0, 0.37, -2.5, 1e-9, -1e-9], np.float32)
    got, got_mu = pairs.decode(pairs.encode(alpha, mu))
    assert (np.abs(got_mu[:4] / mu[:4] - 1) < 0.02).all()
    assert np.array_equal(got[4:], np.full(2, pairs.SMALLEST, np.float32))
    assert not got_mu[4:].any()
    table = pairs.alphas()
    for a, m in zip(got[:4], mu[:4], strict=True):
        reach = (pairs.HIGH_END if m > 0 else -pairs.LOW_END) / pairs.STEPS
        below = table[np.searchsorted(table, a) - 1]
        assert a * reach >= abs(m) > below * reach


def test_zero_is_the_zero_word_and_too_large_is_the_largest():
    assert pairs.encode(np.zeros(1, np.float32), np.zeros(1, np.float32))[0] == 0
    big = np.array([3e38, 1.0, 0.0], np.float32)
    alpha, mu = pairs.decode(pairs.encode(big, np.array([0, 3e38, -3e38], np.float32)))
    assert np.array_equal(alpha, np.full(3, pairs.LARGEST, np.float32))
    ends = [0, pairs.MOST / pairs.STEPS, pairs.LEAST / pairs.STEPS]
    assert np.array_equal(mu, np.array(ends, np.float32) * np.float32(pairs.LARGEST))


@pytest.mark.parametrize(
    "alpha, mu, words", [(-0.5, 0, "below 0"), (np.nan, 0, "NaN"), (1, np.inf, "infinity")]
)
def test_what_no_pair_holds_is_refused(alpha, mu, words):
    with pytest.raises(ValueError, match=words):
        pairs.encode(np.array([alpha], np.float32), np.array([mu], np.float32))


def test_rounding_twice_changes_nothing():
    once = pairs.rounded(*samples())
    again = pairs.rounded(*once)
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))


def test_the_twin_in_torch_has_the_same_bits():
    alpha, mu = samples()
    want = pairs.rounded(alpha, mu)
    got = twin.rounded(torch.from_numpy(alpha), torch.from_numpy(mu))
    for a, b in zip(want, got, strict=True):
        assert np.array_equal(a + 0.0, b.numpy() + 0.0)  # 0 and -0 are one value
