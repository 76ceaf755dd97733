"""Our types in the gguf package, and Q2_K's search for scales."""

from __future__ import annotations

import itertools

import gguf
import numpy as np
import pytest

from export import q2k
from export.gguf_types import register
from pt2_core import formats
from pt2_core.formats import BLOCK, weights


def random_matrix(rng, rows=5, blocks=4, group=BLOCK, levels=3):
    codes = rng.integers(0, levels, (rows, blocks * group), dtype=np.uint8)
    alpha = rng.uniform(0.001, 0.1, (rows, blocks)).astype(np.float16)
    mu = (rng.normal(size=(rows, blocks)) * 0.01).astype(np.float16)
    return codes, alpha, mu


def test_gguf_package_learns_the_types_once():
    register()
    register()
    for kind in formats.TYPES.values():
        member = gguf.GGMLQuantizationType(kind.id)
        assert (member.name, int(member)) == (kind.name, kind.id)
        assert gguf.GGML_QUANT_SIZES[member] == (kind.block, kind.nbytes)


# Q2_K ---------------------------------------------------------------------------------------------


def q2k_decode(data):
    return gguf.dequantize(data, gguf.GGMLQuantizationType.Q2_K)


@pytest.mark.parametrize(
    "group, levels", [(64, 3), (128, 3), (128, 4), (256, 3), (256, 4), (512, 3)]
)
def test_q2k_reports_the_error_it_makes(group, levels):
    rng = np.random.default_rng(group)
    codes, alpha, mu = random_matrix(rng, 64, 1024 // group, group, levels)
    data, error = q2k.encode(codes, alpha, mu)
    assert data.shape == (64, 4 * q2k.NBYTES)
    meant = weights(codes, alpha, mu)
    actual = float(np.sqrt(((q2k_decode(data) - meant) ** 2).sum() / (meant**2).sum()))
    assert error.rms == pytest.approx(actual, rel=1e-3)
    # One pair per super-block is exact but for the halves; four pairs share one d and dmin.
    assert error.rms < {64: 0.04, 128: 0.02}.get(group, 0.001)


@pytest.mark.parametrize("levels", [3, 4])
def test_q2k_is_near_the_best_of_an_exhaustive_search(levels):
    """Against every (sc, m) of both pairs, each with its own best d and dmin."""
    rng = np.random.default_rng(7)
    codes, alpha, mu = random_matrix(rng, rows=6, blocks=2, levels=levels)
    _, error = q2k.encode(codes, alpha, mu)
    meant = weights(codes, alpha, mu)
    best = sum(exhaustive(c, w) for c, w in zip(codes, meant, strict=True))
    assert error.error <= 1.1 * best


def exhaustive(codes, meant):
    """Least squared error of one super-block over all 16^4 scales, real-valued d and dmin."""
    q = codes.reshape(2, BLOCK).astype(np.float64)
    w = meant.reshape(2, BLOCK).astype(np.float64)
    grid = np.array(list(itertools.product(range(16), repeat=2)), dtype=np.float64)
    sc, m = (np.repeat(grid, 256, 0), np.tile(grid, (256, 1)))
    s0, s1, s2 = BLOCK, q.sum(1), (q * q).sum(1)
    a11, a22 = (sc**2 * s2).sum(1), (m**2 * s0).sum(1)
    a12 = -(sc * m * s1).sum(1)
    r1, r2 = (sc * (q * w).sum(1)).sum(1), -(m * w.sum(1)).sum(1)
    det = a11 * a22 - a12**2
    ok = det > 1e-9
    gain = (a22 * r1**2 - 2 * a12 * r1 * r2 + a11 * r2**2)[ok] / det[ok]
    return (w * w).sum() - gain.max()


@pytest.mark.parametrize(
    ("alpha", "mu"),
    [
        ([0.02, 0.03], [0.05, -0.01]),  # one beta negative, the other positive
        ([0.02, 0.03], [0.05, 0.06]),  # both negative
        ([0.0, 0.0], [0.0, 0.0]),
        ([0.0, 0.02], [0.01, 0.0]),
        ([0.0, 0.0], [-0.01, 0.02]),  # only offsets, of both signs
        ([1e-4, 0.1], [0.0, 0.0]),  # scales far apart
        ([60000.0, 1.0], [0.0, 0.0]),
    ],
)
def test_q2k_of_unusual_scales(alpha, mu):
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 3, (1, 256), dtype=np.uint8)
    a, m = np.array([alpha], np.float16), np.array([mu], np.float16)
    data, error = q2k.encode(codes, a, m)
    meant = weights(codes, a, m).astype(np.float64)
    decoded = q2k_decode(data).astype(np.float64)
    assert np.isfinite(decoded).all()
    assert error.error == pytest.approx(((decoded - meant) ** 2).sum(), rel=1e-2, abs=1e-12)
    if not meant.any():
        assert not decoded.any()
    # Offsets of both signs need two signs of dmin, which the type lacks: that much may be lost.
    assert error.rms < (0.9 if alpha == [0.0, 0.0] else 0.25)


def test_q2k_refuses_rows_that_are_no_super_blocks():
    one = np.ones((1, 1), np.float16)
    with pytest.raises(ValueError, match="Q2_K"):
        q2k.encode(np.zeros((1, 128), np.uint8), one, one)
