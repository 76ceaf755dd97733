"""The NumPy packers: layouts byte by byte, round trips, and Q2_K's search for scales."""

from __future__ import annotations

import itertools

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export import q2k
from export.types import BLOCK, TERNARY_TYPES, TQ2_1, register, weights


def random_matrix(rng, rows=5, blocks=4, group=BLOCK):
    codes = rng.integers(0, 3, (rows, blocks * group), dtype=np.uint8)
    alpha = rng.uniform(0.001, 0.1, (rows, blocks)).astype(np.float16)
    mu = (rng.normal(size=(rows, blocks)) * 0.01).astype(np.float16)
    return codes, alpha, mu


def by_the_format(kind, codes, alpha, mu):
    """One block, straight from docs/design.md, one element at a time."""
    out = bytearray(np.array([alpha, mu], dtype="<f2").tobytes())
    plane_lane = {(e // 32, e % 32): int(codes[e]) for e in range(BLOCK)}
    if kind is TQ2_1:
        for lane in range(32):
            out.append(sum(plane_lane[p, lane] << (2 * p) for p in range(4)))
        return bytes(out)
    for i in range(26):
        digits = [plane_lane[p, i] for p in range(4)]
        digits.append(plane_lane[i % 4, 26 + i // 4] if i < 24 else 0)
        out.append(sum(d * 3**k for k, d in enumerate(digits)))
    return bytes(out)


@pytest.mark.parametrize("kind", TERNARY_TYPES.values(), ids=lambda k: k.name)
def test_pack_is_the_documented_layout(kind):
    rng = np.random.default_rng(1)
    codes, alpha, mu = random_matrix(rng, rows=3, blocks=2)
    data = kind.pack(codes, alpha, mu)
    assert data.shape == (3, 2 * kind.nbytes)
    for row, block in itertools.product(range(3), range(2)):
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        expected = by_the_format(kind, codes[row, part], alpha[row, block], mu[row, block])
        got = data[row, block * kind.nbytes : (block + 1) * kind.nbytes]
        assert got.tobytes() == expected


@pytest.mark.parametrize("kind", TERNARY_TYPES.values(), ids=lambda k: k.name)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_round_trip_of_any_codes_and_any_halves(kind, data):
    rows, blocks = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    codes = rng.integers(0, 3, (rows, blocks * BLOCK), dtype=np.uint8)
    halves = rng.integers(0, 2**16, (2, rows, blocks), dtype=np.uint16).view(np.float16)
    got = kind.unpack(kind.pack(codes, halves[0], halves[1]))
    assert np.array_equal(got[0], codes)
    assert got[1].tobytes() == halves[0].tobytes()
    assert got[2].tobytes() == halves[1].tobytes()


@pytest.mark.parametrize("kind", TERNARY_TYPES.values(), ids=lambda k: k.name)
@pytest.mark.parametrize("code", [0, 1, 2])
def test_uniform_blocks(kind, code):
    codes = np.full((1, BLOCK), code, dtype=np.uint8)
    alpha, mu = np.array([[0.5]], np.float16), np.array([[-0.125]], np.float16)
    assert (kind.dequantize(kind.pack(codes, alpha, mu)) == 0.5 * (code - 1) - 0.125).all()


@pytest.mark.parametrize("kind", TERNARY_TYPES.values(), ids=lambda k: k.name)
def test_wrong_input_is_refused(kind):
    one = np.ones((1, 1), np.float16)
    with pytest.raises(ValueError, match="codes"):
        kind.pack(np.zeros((1, 100), np.uint8), one, one)
    with pytest.raises(ValueError, match="codes are 0, 1 and 2"):
        kind.pack(np.full((1, BLOCK), 3, np.uint8), one, one)
    with pytest.raises(ValueError, match="whole blocks"):
        kind.unpack(np.zeros((1, kind.nbytes + 1), np.uint8))


def test_gguf_package_learns_the_types_once():
    register()
    register()
    for kind in TERNARY_TYPES.values():
        member = gguf.GGMLQuantizationType(kind.id)
        assert (member.name, int(member)) == (kind.name, kind.id)
        assert gguf.GGML_QUANT_SIZES[member] == (BLOCK, kind.nbytes)


# Q2_K ---------------------------------------------------------------------------------------------


def q2k_decode(data):
    return gguf.dequantize(data, gguf.GGMLQuantizationType.Q2_K)


@pytest.mark.parametrize("group", [64, 128, 256, 512])
def test_q2k_reports_the_error_it_makes(group):
    rng = np.random.default_rng(group)
    codes, alpha, mu = random_matrix(rng, rows=64, blocks=1024 // group, group=group)
    data, error = q2k.encode(codes, alpha, mu)
    assert data.shape == (64, 4 * q2k.NBYTES)
    meant = weights(codes, alpha, mu)
    actual = float(np.sqrt(((q2k_decode(data) - meant) ** 2).sum() / (meant**2).sum()))
    assert error.rms == pytest.approx(actual, rel=1e-3)
    # One pair per super-block is exact but for the halves; four pairs share one d and dmin.
    assert error.rms < {64: 0.04, 128: 0.02}.get(group, 0.001)


def test_q2k_is_near_the_best_of_an_exhaustive_search():
    """Against every (sc, m) of both pairs, each with its own best d and dmin."""
    rng = np.random.default_rng(7)
    codes, alpha, mu = random_matrix(rng, rows=6, blocks=2)
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
