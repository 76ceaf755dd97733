"""Fold the quantiser's column orders into the weights around them, exactly.

A matrix quantised in the order ``perm`` computes ``W[:, perm] @ x[perm]``. llama.cpp has no gather,
so ``x`` itself must arrive in that order. What makes it is in the manifest
(:class:`pt2_core.model.fold_edges.FoldEdges`): the tensors that read or write the residual stream,
which has one order, and for any other input the rows that make it. Attention mixes positions, not
channels, so an order within a head passes through it; heads that share a key-value head share their
order.

:func:`fold_plan` checks the orders and returns the order of rows and of columns by place: a
tensor's full name, or ``NAME[e]`` for one expert of a tensor of three dimensions. It is the same
for the converter's tensors, for the ternary rows and for a state dict in a test.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pt2_core.errors import PT2Error
from pt2_core.model.fold_edges import FoldEdges, Heads, rows_and_columns, split_expert

Order = NDArray[np.int32]
_INSTEAD = "quantise again with --order foldable"


@dataclass
class FoldPlan:
    """Orders of rows and columns by place; absent means as they are."""

    rows: dict[str, Order] = field(default_factory=dict)
    cols: dict[str, Order] = field(default_factory=dict)

    def apply(self, name: str, tensor: NDArray[Any]) -> NDArray[Any]:
        """The folded tensor: an array ``[n]``, ``[rows, cols]`` or ``[experts, rows, cols]``."""
        if name in self.rows:
            tensor = np.take(tensor, self.rows[name], axis=max(tensor.ndim - 2, 0))
        if name in self.cols:
            tensor = tensor[..., self.cols[name]]
        if tensor.ndim == 3:
            experts = [self.apply(f"{name}[{e}]", tensor[e]) for e in range(len(tensor))]
            tensor = np.stack(experts)
        return tensor

    def rows_of(self, place: str) -> Order | None:
        """The order of a matrix's rows, for all experts of its tensor or for this one; or None."""
        return self._of(self.rows, place)

    def cols_of(self, place: str) -> Order | None:
        """The order of a matrix's columns."""
        return self._of(self.cols, place)

    def _of(self, side: dict[str, Order], place: str) -> Order | None:
        # No tensor has both: check_edges refuses rows that follow two orders.
        return side.get(place, side.get(split_expert(place)[0]))


def fold_plan(
    fold: FoldEdges | None,
    tensors: Mapping[str, Sequence[int]],
    places: Mapping[str, str],
    residual: Order,
    orders: Mapping[str, Order],
) -> FoldPlan:
    """Work out what has to move so that every matrix's input arrives in its order.

    Args:
        fold: what orders fold into, as the manifest says; None where nothing does.
        tensors: full name -> shape, of the checkpoint's tensors.
        places: ternary matrix -> its place (``TENSOR`` or ``TENSOR[e]``).
        residual: int32 ``[hidden]``, the order of the residual stream.
        orders: ternary matrix -> int32 ``[cols]``.

    Raises:
        PT2Error: an order that is no permutation or cannot be folded.
    """
    plan = FoldPlan()
    check_order("the residual stream", residual)
    for matrix, order in orders.items():
        check_order(matrix, order)
    if all(is_identity(o) for o in (residual, *orders.values())):
        return plan
    fold = fold or FoldEdges()
    if not is_identity(residual):
        if not fold.columns:
            raise PT2Error(
                "the residual stream has an order, and the manifest does not say what it folds "
                "into: quantise again with --order none"
            )
        plan.rows.update(dict.fromkeys(fold.rows, residual))
        plan.cols.update(dict.fromkeys(fold.columns, residual))
    for matrix, order in orders.items():
        _fold_matrix(plan, fold, matrix, order, residual, tensors)
    for place in places.values():
        # An artifact's columns are in their order already: only rows are left to move.
        plan.cols.pop(place, None)
    return plan


def _fold_matrix(
    plan: FoldPlan, fold: FoldEdges, matrix: str, order: Order, residual: Order,
    tensors: Mapping[str, Sequence[int]],
) -> None:  # fmt: skip
    """Fold the order of one matrix's columns, or see that it is the residual stream's."""
    role = fold.role(matrix)
    if role == "residual":
        if not np.array_equal(order, residual):
            raise _own_order(matrix, "not the residual stream's, and")
        return
    if is_identity(order):
        return
    if role == "none":
        raise _own_order(matrix, "which nothing folds:")
    edge = fold.edges[matrix]
    made = order if edge.heads is None else _value_rows(matrix, order, edge.heads)
    for place in edge.rows:
        rows, _ = rows_and_columns(place.tensor, tensors[split_expert(place.tensor)[0]])
        whole = plan.rows.get(place.tensor)
        whole = np.arange(rows, dtype=np.int32) if whole is None else whole.copy()
        whole[place.start : place.stop] = place.start + made
        plan.rows[place.tensor] = whole


def dense_plan(plan: FoldPlan, places: Mapping[str, str], orders: Mapping[str, Order]) -> FoldPlan:
    """``plan`` for a model whose matrices are all still in the source's column order.

    It adds the columns that an artifact has permuted already: with it a whole state dict can be
    folded, which must leave the model's logits as they were.
    """
    experts = {split_expert(place)[0] for place in places.values() if place.endswith("]")}
    cols = {name: order for name, order in plan.cols.items() if name not in experts}
    cols |= {places[m]: order for m, order in orders.items() if not is_identity(order)}
    return FoldPlan(dict(plan.rows), cols)


def moved(plan: FoldPlan) -> Iterator[str]:
    """Every place that has an order."""
    yield from dict.fromkeys([*plan.rows, *plan.cols])


def _own_order(matrix: str, why: str) -> PT2Error:
    return PT2Error(
        f"{matrix} has a column order of its own, {why} llama.cpp cannot reorder activations "
        f"while it runs: {_INSTEAD}"
    )


def _value_rows(matrix: str, order: Order, heads: Heads) -> Order:
    """The order of the values' rows, int32 ``[n_kv * dim]``, that an order of columns asks for."""
    if len(order) != heads.n_head * heads.dim:
        raise PT2Error(
            f"{matrix} has {len(order)} columns, not {heads.n_head} heads of {heads.dim}: "
            "the manifest's 'fold' does not fit it"
        )
    per_head = order.reshape(heads.n_head, heads.dim)
    within = per_head - np.arange(heads.n_head, dtype=np.int32)[:, None] * heads.dim
    if within.min() < 0 or within.max() >= heads.dim:
        raise PT2Error(f"{matrix} moves columns from one head to another: {_INSTEAD}")
    shared = within.reshape(heads.n_kv, -1, heads.dim)
    if not (shared == shared[:, :1]).all():
        raise PT2Error(
            f"{matrix} orders query heads that share a key-value head differently: {_INSTEAD}"
        )
    first = np.arange(heads.n_kv, dtype=np.int32)[:, None] * heads.dim
    return (shared[:, 0] + first).reshape(-1).astype(np.int32)


def check_order(what: str, order: Order) -> None:
    """Raise PT2Error unless an order holds every place once."""
    if not np.array_equal(np.sort(order), np.arange(len(order))):
        raise PT2Error(f"the order of {what} is not a permutation: the artifact is damaged")


def is_identity(order: Order) -> bool:
    """Whether an order leaves everything where it is."""
    return bool(np.array_equal(order, np.arange(len(order))))
