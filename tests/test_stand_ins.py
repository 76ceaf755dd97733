"""Stand-ins: what may be done to them and still be read off, and what may not."""

from __future__ import annotations

import numpy as np
import pytest

from export.stand_ins import NARROW, VALUES, WIDE, Levels, Target, row_map, sources_of, track, watch

pytestmark = pytest.mark.quick
Q, K, E = Target((8, 6), 0), Target((4, 6), 1), Target((3, 4, 6), 2)
TURNED = Target((6, 4), 5, transposed=True)


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
def test_rows_are_found_wherever_they_went(wide):
    order = np.random.default_rng(0).permutation(8)
    found = row_map(Q.stand_in(wide)[order], [Q], wide)
    assert found is not None and found.shape == (8, 6)
    assert found.row.tolist() == order.tolist() and not found.which.any()
    joined = np.concatenate([Q.stand_in(wide), K.stand_in(wide)[::-1]])
    found = row_map(joined, [Q, K], wide)
    assert found is not None and found.which.tolist() == [0] * 8 + [1] * 4
    assert found.row.tolist() == [*range(8), 3, 2, 1, 0]
    halves = row_map(E.stand_in(wide)[:, 2:], [E], wide)
    assert halves is not None and halves.shape == (3, 2, 6)
    assert halves.which.tolist() == [2, 2, 3, 3, 4, 4] and halves.row.tolist() == [2, 3] * 3
    turned = row_map(TURNED.stand_in(wide).T, [TURNED], wide)
    assert turned is not None and turned.shape == (4, 6) and turned.row.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x * 2, lambda x: x + 1, lambda x: x[:, ::-1], lambda x: x.T, lambda x: x[0],
        lambda x: np.concatenate([x, np.zeros_like(x)]), lambda x: x[None, None],
        lambda x: np.pad(x, ((0, 0), (0, 1))),
    ],
)  # fmt: skip
def test_more_than_that_is_noticed(change, wide):
    assert row_map(change(Q.stand_in(wide)), [Q], wide) is None


def test_only_wide_ones_see_what_becomes_of_the_columns():
    value = Q.stand_in(True)
    value[:, [3, 4]] = value[:, [4, 3]]
    assert row_map(value, [Q], True) is None
    assert row_map(Q.stand_in(True), [Q, Target((4, 5), 1)], True) is None
    assert row_map(np.concatenate([Q.stand_in(False), K.stand_in(False)]), [Q], False) is None


def test_a_tensor_that_the_converter_stumbles_over_is_given_otherwise():
    """First with all its columns, then as values in its block, and nothing else is touched."""
    names = [f"layers.{i}.{n}.weight" for i in range(3) for n in ("q", "up")]
    levels = Levels(dict.fromkeys(names, NARROW))
    assert levels.failed("layers.1.q.weight", ValueError("shape"))
    assert {n for n, level in levels.of.items() if level == WIDE} == {
        f"layers.{i}.q.weight" for i in range(3)
    }
    assert levels.failed("layers.1.q.weight", ValueError("shape"))
    assert [n for n, level in levels.of.items() if level == VALUES] == ["layers.1.q.weight"]
    assert "shape" in levels.reasons["layers.1.q.weight"]
    # A tensor that is none of ours: what is in its block, then everything, then there is no way.
    while levels.failed("layers.1.norm.weight", ValueError("other")):
        pass
    assert set(levels.of.values()) == {VALUES}


class Lazy:
    """As the converter's: it forgets its arguments when it is evaluated."""

    def __init__(self, *, meta, args=(), kwargs=None):
        self.meta, self.args, self.kwargs = meta, args, kwargs


def test_sources_are_known_after_evaluation():
    track(Lazy)
    track(Lazy)  # a second try of the converter
    a, b = (watch(n, lambda: Lazy(meta=0))() for n in "ab")
    both = Lazy(meta=0, args=([a, (b, 3)], 1))
    both.args = ()
    assert sources_of(Lazy(meta=0, args=(both,), kwargs={"x": a})) == ["a", "b"]
    assert sources_of(Lazy(meta=0)) == [] and sources_of(np.zeros(3)) == []
