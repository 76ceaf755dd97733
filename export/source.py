"""What an export reads: the artifact's matrices, the source model, and where their rows go."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from export.checks import Progress, check_shapes
from export.converter import CarrierTensor
from export.encode import Item, TernaryRows
from export.fold import FoldPlan, Order, fold_plan
from export.stand_ins import Target
from pt2_core.artifact import sensitivity
from pt2_core.artifact.folder import Artifact
from pt2_core.artifact.matrix import TernaryMatrix, unpack_ternary
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.model.fold_edges import check_edges, edges_for

F32 = NDArray[np.float32]


class TernarySource:
    """The artifact's matrices, one block in memory at a time, and where their rows go.

    Attributes:
        targets: the checkpoint's tensors that hold ternary matrices; their matrices are numbered.
        whole: of these, the ones that cannot be ternary as a whole -> why.
        names: number of a matrix -> its name; empty for an expert that the artifact has not.
        places: ternary matrix -> ``TENSOR``, or ``TENSOR[e]`` for an expert.
    """

    def __init__(
        self, artifact: Artifact, model: Checkpoint, plan: FoldPlan, home: Mapping[str, int]
    ) -> None:
        self.artifact, self.model, self.plan, self._home = artifact, model, plan, home
        self._block: tuple[int, dict[str, TernaryMatrix]] = (-1, {})
        self._measured: sensitivity.Sensitivity | None = None
        self._replaced: dict[str, F32] | None = None
        self.places = places(artifact)
        self.targets, self.whole, self.names = _number(artifact, model, list(home))

    @classmethod
    def read(cls, artifact: Artifact, model: Checkpoint, progress: Progress) -> TernarySource:
        """Check every block file, collect the column orders, and plan the fold."""
        orders: dict[str, Order] = {}
        for index in range(artifact.n_blocks):
            progress("checking the artifact", index, artifact.n_blocks)
            for name, matrix in artifact.block(index).items():
                orders[name] = matrix.perm
        progress("checking the artifact", artifact.n_blocks, artifact.n_blocks)
        check_shapes(artifact, model)
        shapes = {name: list(info.shape) for name, info in model.tensors.items()}
        fold = artifact.fold()
        if fold is None:  # an artifact of before the manifest said it
            fold = edges_for(model.settings, shapes)
        if fold is not None:
            columns = {name: len(order) for name, order in orders.items()}
            check_edges(fold, shapes, columns, len(artifact.residual_perm))
        plan = fold_plan(fold, shapes, places(artifact), artifact.residual_perm, orders)
        return cls(artifact, model, plan, artifact.homes())

    def group_size(self) -> int:
        """Columns that share an alpha and mu, where a matrix's entry does not say otherwise."""
        return int(self.artifact.manifest["settings"]["block_size"])

    def block_size(self, matrix: str) -> int:
        """Columns of a matrix that share an alpha and mu."""
        return int(self.artifact.matrices[matrix].get("block_size", self.group_size()))

    def group_of(self, tensor: CarrierTensor) -> int:
        """Columns that share an alpha and mu in all matrices of a ternary tensor."""
        return math.gcd(*(self.block_size(name) for name in self.matrices_of(tensor)))

    def matrices_of(self, tensor: CarrierTensor) -> list[str]:
        """The ternary matrices that a tensor is made of."""
        assert tensor.rows is not None
        return [self.names[number] for number in np.unique(tensor.rows.which)]

    def rows(self, item: Item, part: slice = slice(None)) -> TernaryRows:
        """Rows of a ternary tensor as they are in the file, counted over all its experts."""
        made = item.tensor.rows
        assert made is not None
        which, row = made.which[part], made.row[part]
        group, cols = self.group_of(item.tensor), item.tensor.shape[-1]
        found = TernaryRows(
            np.empty((len(which), cols), np.uint8),
            np.empty((len(which), cols // group), np.float16),
            np.empty((len(which), cols // group), np.float16),
        )
        for number in np.unique(which):
            at = np.flatnonzero(which == number)
            matrix = self._matrix(self.names[number])
            order = self._row_order(matrix.name, row[at])
            codes = (unpack_ternary(matrix.ternary[order]) + np.int8(1)).view(np.uint8)
            one = TernaryRows(codes, matrix.alpha[order], matrix.mu[order]).per_block(group)
            found.codes[at], found.alpha[at], found.mu[at] = one.codes, one.alpha, one.mu
        return found

    def _row_order(self, matrix: str, row: NDArray[np.int32]) -> NDArray[np.int32]:
        """Which row of a matrix each row is that the converter took from the folded one."""
        folded = self.plan.rows_of(self.places[matrix])
        return row if folded is None else folded[row]

    def original(self, name: str) -> F32:
        """The source's values, or what a refinement has put in their place.

        Args:
            name: a tensor of the checkpoint, or a ternary matrix (``[rows, cols]`` then).
        """
        if name not in self.places:
            return self._tensor(name)
        tensor, expert = self.artifact.tensor_of(name)
        return self._part(tensor, expert, self.artifact.transposed(name))

    def _part(self, tensor: str, expert: int | None, transposed: bool) -> F32:
        value = self._tensor(tensor)
        value = value if expert is None else value[expert]
        return value.T if transposed else value

    def _tensor(self, name: str) -> F32:
        if self._replaced is None:
            self._replaced = self.artifact.replaced()
        if name in self._replaced:
            return self._replaced[name]
        return self.model.read(name).float().numpy()

    def original_rows(self, item: Item) -> F32:
        """The original weight of a tensor of one matrix, rows and columns as in the file."""
        assert item.tensor.rows is not None
        (name,) = self.matrices_of(item.tensor)
        order = self._row_order(name, item.tensor.rows.row)
        return self.original(name)[order][:, self._matrix(name).perm]

    def values(self, tensor: str) -> F32:
        """What to write of a checkpoint's tensor whose matrices cannot be ternary in the file.

        ``alpha T + mu`` where the artifact has it, the original elsewhere; folded, and in the
        checkpoint's own layout.
        """
        target = self.targets[tensor]
        result = np.empty((target.count, target.rows, target.cols), np.float32)
        for e in range(target.count):
            name = self.names[target.first + e]
            if name:
                matrix = self._matrix(name)
                codes = (matrix.codes() + np.int8(1)).view(np.uint8)
                result[e] = TernaryRows(codes, matrix.alpha, matrix.mu).dequantize()
                order = self.plan.rows_of(self.places[name])
            else:
                place = f"{tensor}[{e}]"
                result[e] = self._part(tensor, e, target.transposed)
                order = self.plan.rows_of(place)
                if (columns := self.plan.cols_of(place)) is not None:
                    result[e] = result[e][:, columns]
            if order is not None:
                result[e] = result[e][order]
        if target.transposed:
            result = result.swapaxes(-1, -2)
        return result if len(target.shape) == 3 else result[0]

    def energy(self, item: Item) -> F32:
        """The mean square of each input of a tensor of one matrix, in the file's order."""
        (name,) = self.matrices_of(item.tensor)
        return self.measured().linears[name].energy[self._matrix(name).perm]

    def measured(self) -> sensitivity.Sensitivity:
        """The artifact's sensitivities; PT2Error where they have not been measured."""
        if self._measured is None:
            self._measured = sensitivity.read(self.artifact)
        return self._measured

    def _matrix(self, name: str) -> TernaryMatrix:
        index = self._home[name]
        if self._block[0] != index:
            self._block = (index, self.artifact.block(index))
        return self._block[1][name]

    def matrix_rows(self, item: Item, name: str) -> NDArray[np.intp]:
        """Which rows of a ternary tensor, over all its experts, are of this matrix."""
        assert item.tensor.rows is not None
        return np.flatnonzero(item.tensor.rows.which == self.names.index(name))

    def in_source_order(self, item: Item, values: F32, matrix: str | None = None) -> F32:
        """Values in the file's order as the source model has them.

        Args:
            values: float32 ``[rows, cols]``: a table, or the rows of one matrix
                (:meth:`matrix_rows`).
            matrix: the matrix; None for a table.
        """
        result = np.empty_like(values)
        if matrix is None:
            order = self.plan.cols.get(item.tensor.sources[0])
            result[:, slice(None) if order is None else order] = values
        else:
            assert item.tensor.rows is not None
            rows = item.tensor.rows.row[self.matrix_rows(item, matrix)]
            perm = self._matrix(matrix).perm
            result[np.ix_(self._row_order(matrix, rows), perm)] = values
        return result


def places(artifact: Artifact) -> dict[str, str]:
    """Ternary matrix -> its place among the checkpoint's tensors, as a fold plan names it."""
    found = {}
    for name in artifact.matrices:
        tensor, expert = artifact.tensor_of(name)
        found[name] = tensor if expert is None else f"{tensor}[{expert}]"
    return found


def _number(
    artifact: Artifact, model: Checkpoint, matrices: list[str]
) -> tuple[dict[str, Target], dict[str, str], list[str]]:
    """Number the matrices tensor by tensor; see :class:`TernarySource`."""
    targets: dict[str, Target] = {}
    names: list[str] = []
    for matrix in matrices:
        tensor, expert = artifact.tensor_of(matrix)
        if tensor not in targets:
            shape = tuple(model.info(tensor).shape)
            targets[tensor] = Target(shape, len(names), artifact.transposed(matrix))
            names += [""] * targets[tensor].count
        names[targets[tensor].first + (expert or 0)] = matrix
    whole = {}
    for tensor, target in targets.items():
        kept = names[target.first : target.first + target.count].count("")
        if kept:
            whole[tensor] = f"{kept} of its {target.count} experts are not ternary in the artifact"
    return targets, whole, names
