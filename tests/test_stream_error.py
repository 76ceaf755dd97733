"""The residual stream's error is made up for by the matrix that is added to it, and by no other."""

from __future__ import annotations

import pytest
import torch

from pt2_core.errors import PT2Error
from pt2_core.model.layout import Rows
from quantize.model.sites import Matrix, Site
from quantize.moments import stream_error

ERROR = torch.arange(12, dtype=torch.float64).reshape(4, 3) + 1
SITE = Site((), 0, "mlp.out.weight")


def matrix(name: str, rows: int) -> Matrix:
    every = torch.arange(rows)
    param = f"model.layers.0.{name}.weight"
    part = Rows(param, None, False, param, None, False, every, every)
    return Matrix(f"model.layers.0.{name}", param, None, False, rows, 3, 0, None, [part])


def test_rows_of_other_matrices_have_none_even_where_they_are_as_many():
    found = stream_error(ERROR, [matrix("mlp.gate", 4), matrix("mlp.out", 4)], SITE)
    assert found is not None and found.dtype == torch.float64
    assert torch.equal(found, torch.cat([torch.zeros_like(ERROR), ERROR]))
    assert torch.equal(stream_error(ERROR, [matrix("mlp.out", 4)], SITE), ERROR)


def test_where_no_matrix_joins_there_is_nothing_to_make_up_for():
    assert stream_error(ERROR, [matrix("mlp.gate", 4)], SITE) is None
    assert stream_error(None, [matrix("mlp.out", 4)], SITE) is None


def test_a_matrix_that_joins_with_a_part_of_it_is_named():
    with pytest.raises(PT2Error, match=r"model\.layers\.0\.mlp\.out: only a part of it is added"):
        stream_error(ERROR, [matrix("mlp.out", 8)], SITE)
