"""benchmarks/scale_bits.py: the roundings of alpha and mu, and how they reach the weights."""

from __future__ import annotations

import numpy as np
import pytest
from scripts import load_script

from pt2_core.artifact.matrix import TernaryMatrix, pack_ternary
from quantize import evaluate

scale_bits = load_script("scale_bits")


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_equal_steps_are_half_a_step_off_at_most(bits: int, signed: bool) -> None:
    rng = np.random.default_rng(bits)
    values = rng.normal(size=(20, 16)).astype(np.float16)
    values = values if signed else np.abs(values)
    values[3] = 0
    rounded = scale_bits.linear(values, bits, signed)
    steps = np.abs(values.astype(np.float32)).max(1, keepdims=True) / (2 ** (bits - signed) - 1)
    assert (np.abs(rounded - values) <= 0.51 * steps + 1e-6).all()  # fp16 scale: a little more
    assert (rounded[3] == 0).all()
    assert max(len(np.unique(row)) for row in rounded) <= 2**bits
    assert not np.array_equal(rounded, values)


def test_e4m3_keeps_four_significant_bits_of_what_is_not_tiny() -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(0.1, 1.0, size=(8, 64)).astype(np.float16)
    assert (np.abs(scale_bits.e4m3(values) / values - 1) <= 2**-4 + 1e-3).all()


def test_a_changed_grid_reaches_the_weights() -> None:
    codes = np.tile(np.array([-1, 0, 1, 1], dtype=np.int8), (2, 32))
    ones = np.ones((2, 1), dtype=np.float16)
    matrix = TernaryMatrix("q", pack_ternary(codes), ones, 0 * ones, np.arange(128, dtype=np.int32))

    class Stored:
        def block(self, index: int) -> dict[str, TernaryMatrix]:
            return {"q": matrix}

    plain = evaluate._dequantized(Stored(), 0, None)  # type: ignore[arg-type]
    changed = evaluate._dequantized(Stored(), 0, lambda a, m: (3 * a, m + 1))  # type: ignore[arg-type]
    assert plain is not None and changed is not None
    assert np.array_equal(plain["q"].numpy(), codes)
    assert np.array_equal(changed["q"].numpy(), 3 * codes + 1)
    assert matrix.alpha[0, 0] == 1, "the artifact stays as it is"
