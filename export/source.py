"""What an export reads: the artifact's matrices, the source model, and where their rows go."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from export.checks import Progress, check_shapes
from export.encode import EMBEDDING, HEAD, Item, TernaryRows, row_order
from export.fold import FoldPlan, Heads, fold_plan
from pt2_core.artifact import sensitivity
from pt2_core.artifact.folder import Artifact, TernaryMatrix
from pt2_core.model.checkpoint import Checkpoint

HF_EMBEDDING, HF_HEAD = "model.embed_tokens.weight", "lm_head.weight"
TABLES = {EMBEDDING: HF_EMBEDDING, HEAD: HF_HEAD}


class TernarySource:
    """The artifact's matrices, one block in memory at a time, and where their rows go."""

    def __init__(
        self, artifact: Artifact, model: Checkpoint, plan: FoldPlan, home: dict[str, int]
    ) -> None:
        self.artifact, self.model, self.plan, self._home = artifact, model, plan, home
        self._block: tuple[int, dict[str, TernaryMatrix]] = (-1, {})
        self._measured: sensitivity.Sensitivity | None = None

    @classmethod
    def read(cls, artifact: Artifact, model: Checkpoint, progress: Progress) -> TernarySource:
        """Check every block file, collect the column orders, and plan the fold."""
        orders, home = {}, {}
        for index in range(artifact.n_blocks):
            progress("checking the artifact", index, artifact.n_blocks)
            for name, matrix in artifact.block(index).items():
                orders[name], home[name] = matrix.perm, index
        progress("checking the artifact", artifact.n_blocks, artifact.n_blocks)
        check_shapes(artifact, model, list(home))
        heads = Heads.from_config(model.settings)
        plan = fold_plan(model.tensors, heads, artifact.residual_perm, orders)
        return cls(artifact, model, plan, home)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Checkpoint tensor name -> (rows, cols)."""
        matrices = self.artifact.matrices
        return {f"{m}.weight": (matrices[m]["rows"], matrices[m]["cols"]) for m in self._home}

    def group_size(self) -> int:
        """Columns that share an alpha and mu."""
        return int(self.artifact.manifest["settings"]["block_size"])

    def rows(self, item: Item) -> TernaryRows:
        """The weight of an item, its rows in the file's order."""
        return TernaryRows.make(item.tensor, self._matrix(item), self.plan)

    def original(self, name: str) -> NDArray[np.float32]:
        """A tensor of the source model, or what a refinement has put in its place, float32."""
        replaced = self.artifact.replaced()
        return replaced[name] if name in replaced else self.model.read(name).float().numpy()

    def original_rows(self, item: Item) -> NDArray[np.float32]:
        """The original weight of an item, rows and columns in the file's order."""
        assert item.tensor.source is not None
        weight = self.original(item.tensor.source)
        return weight[row_order(item.tensor, self.plan)][:, self._matrix(item).perm]

    def energy(self, item: Item) -> NDArray[np.float32]:
        """The mean square of each input of an item, in the file's order."""
        matrix = self._matrix(item)
        return self.measured().linears[matrix.name].energy[matrix.perm]

    def measured(self) -> sensitivity.Sensitivity:
        """The artifact's sensitivities; PT2Error where they have not been measured."""
        if self._measured is None:
            self._measured = sensitivity.read(self.artifact)
        return self._measured

    def _matrix(self, item: Item) -> TernaryMatrix:
        assert item.tensor.source is not None
        module = item.tensor.source.removesuffix(".weight")
        index = self._home[module]
        if self._block[0] != index:
            self._block = (index, self.artifact.block(index))
        return self._block[1][module]

    def in_source_order(self, item: Item, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """A ternary linear's or a table's values as the source model has them.

        Args:
            values: float32 ``[rows, cols]`` in the file's order.
        """
        result = np.empty_like(values)
        if item.tensor.source is None:
            order = self.plan.cols.get(TABLES[item.tensor.name])
            result[:, slice(None) if order is None else order] = values
        else:
            rows, perm = row_order(item.tensor, self.plan), self._matrix(item).perm
            result[np.ix_(rows, perm)] = values
        return result
