"""The ternary types in NumPy: layouts byte by byte, round trips, and one home for their facts."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pt2_core import formats
from pt2_core.formats import BLOCK, TQ2_1

ROOT = Path(__file__).resolve().parents[1]


def random_matrix(kind, rng, rows, blocks):
    codes = rng.integers(0, kind.levels, (rows, blocks * kind.block), dtype=np.uint8)
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


@pytest.mark.parametrize("kind", formats.TYPES.values(), ids=lambda k: k.name)
def test_pack_is_the_documented_layout(kind):
    rng = np.random.default_rng(1)
    codes, alpha, mu = random_matrix(kind, rng, rows=3, blocks=2)
    data = kind.pack(codes, alpha, mu)
    assert data.shape == (3, 2 * kind.nbytes)
    for row, block in itertools.product(range(3), range(2)):
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        expected = by_the_format(kind, codes[row, part], alpha[row, block], mu[row, block])
        got = data[row, block * kind.nbytes : (block + 1) * kind.nbytes]
        assert got.tobytes() == expected


@pytest.mark.parametrize("kind", formats.TYPES.values(), ids=lambda k: k.name)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_round_trip_of_any_codes_and_any_halves(kind, data):
    rows, blocks = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    codes = rng.integers(0, kind.levels, (rows, blocks * BLOCK), dtype=np.uint8)
    halves = rng.integers(0, 2**16, (2, rows, blocks), dtype=np.uint16).view(np.float16)
    got = kind.unpack(kind.pack(codes, halves[0], halves[1]))
    assert np.array_equal(got[0], codes)
    assert got[1].tobytes() == halves[0].tobytes()
    assert got[2].tobytes() == halves[1].tobytes()


@pytest.mark.parametrize("kind", formats.TYPES.values(), ids=lambda k: k.name)
@pytest.mark.parametrize("code", [0, 1, 2])
def test_uniform_blocks(kind, code):
    codes = np.full((1, BLOCK), code, dtype=np.uint8)
    alpha, mu = np.array([[0.5]], np.float16), np.array([[-0.125]], np.float16)
    assert (kind.dequantize(kind.pack(codes, alpha, mu)) == 0.5 * (code - 1) - 0.125).all()


@pytest.mark.parametrize("kind", formats.TYPES.values(), ids=lambda k: k.name)
def test_wrong_input_is_refused(kind):
    one = np.ones((1, 1), np.float16)
    with pytest.raises(ValueError, match="codes"):
        kind.pack(np.zeros((1, 100), np.uint8), one, one)
    with pytest.raises(ValueError, match="codes are 0, 1"):
        kind.pack(np.full((1, BLOCK), kind.levels, np.uint8), one, one)
    with pytest.raises(ValueError, match="whole blocks"):
        kind.unpack(np.zeros((1, kind.nbytes + 1), np.uint8))


@pytest.mark.parametrize("kind", formats.TYPES.values(), ids=lambda k: k.name)
def test_random_blocks_are_valid_and_use_every_code(kind):
    raw = kind.random_blocks(200, np.random.default_rng(0), 0.02)
    codes, alpha, mu = kind.unpack(raw)
    assert np.unique(codes).tolist() == [0, 1, 2]
    assert np.array_equal(kind.pack(codes, alpha, mu), raw)
    assert alpha.min() > 0.009 and alpha.max() < 0.031
    assert np.abs(mu).max() < 0.0031 and mu.min() < 0 < mu.max()


def test_tables_follow_from_the_classes():
    assert list(formats.TYPES) == [t.ggml_name for t in formats.TYPES.values()]
    assert tuple(t.name for t in formats.BY_NAME.values()) == formats.NAMES
    assert len({t.id for t in formats.ALL}) == len(formats.ALL)
    assert formats.DEFAULT.ggml_name == next(iter(formats.TYPES))
    assert {formats.SMALLEST.bpw()} == {min(t.bpw() for t in formats.TYPES.values())}
    assert formats.Q8_T not in formats.TYPES.values() and formats.Q8_T in formats.ALL


@pytest.mark.parametrize("change", [{"id": TQ2_1.id}, {"name": "TQ2_1"}])
def test_an_id_or_name_that_is_taken_is_refused(change):
    name = change.get("name", "NEW")
    facts = {"id": change.get("id", 4000), "fields": {"qs": 32}, "file_type": 4000}
    with pytest.raises(ValueError, match="is TQ2_1"):
        type(name, (formats.TernaryType,), facts)
    assert name == "TQ2_1" or "new" not in formats.TYPES


def test_types_are_named_in_one_module_of_the_programs():
    """No other module has a type's name, not even in its prose: names and tables come from here."""
    text = re.compile("|".join(rf"\b{t.name}\b|\b{t.ggml_name}\b" for t in formats.ALL))
    packages = ("pt2_core", "quantize", "export", "llamacpp_bench", "pt2_eval", "pt2_llama")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for package in packages
        for path in sorted((ROOT / package).rglob("*.py"))
        if "llama.cpp" not in path.parts and path.name != "formats.py"
        for line in path.read_text().splitlines()
        if text.search(line)
    ]
    assert found == []


def test_tables_alone_need_no_numpy():
    code = "import sys; from pt2_core import formats; assert formats.NAMES; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "numpy" not in done.stdout.split()
