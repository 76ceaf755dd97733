"""Choose a type for every tensor, and encode one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from numpy.typing import NDArray

from export import q2k
from export.config import ORDINARY_TYPES, ExportConfig
from export.converter import Carrier, CarrierTensor
from export.fold import FoldPlan
from export.ggml import Ggml, type_of
from export.mixed import Choice
from pt2_core import formats
from pt2_core.artifact.folder import TernaryMatrix
from pt2_core.errors import PT2Error
from pt2_core.formats import BLOCK, weights
from pt2_core.model.widths import width_problem

if TYPE_CHECKING:
    from pt2_core.formats import F16, U8

F32_TYPE = gguf.GGMLQuantizationType.F32
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


@dataclass
class Item:
    """One tensor of the output.

    Attributes:
        tensor: what the converter made of it.
        type: its type in the file.
        nbytes: its size in the file.
        reason: why it is not ternary; None where it is.
        fallback: whether it would be ternary if only it could.
    """

    tensor: CarrierTensor
    type: gguf.GGMLQuantizationType
    nbytes: int
    reason: str | None
    fallback: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.tensor.shape)


def plan_items(
    carrier: Carrier, config: ExportConfig, ggml: Ggml, kept: Mapping[str, str],
    mixed: Choice | None = None,
) -> list[Item]:  # fmt: skip
    """Choose the types.

    Args:
        carrier: the converter's output.
        kept: Hugging Face module name -> reason, the linears that the quantiser left alone.
        mixed: types chosen to fit a size, in place of ``config``'s.

    Raises:
        PT2Error: with ``strict``, the first linear that would not be ternary.
    """
    blocks = int(carrier.fields.get(f"{carrier.arch}.block_count", (0, None, None))[0])
    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == carrier.arch)
    names = gguf.get_tensor_name_map(arch, blocks)
    reasons = {f"{names.get_name(m)}.weight": why for m, why in kept.items()}
    tied = all(t.name != HEAD for t in carrier.tensors)
    items = []
    for tensor in carrier.tensors:
        item = _plan(tensor, config, reasons, tied, mixed or Choice())
        fitting = _fit(item.type, tensor.shape[-1], ggml)
        if fitting != item.type:
            note = f"{tensor.shape[-1]} columns are no whole {item.type.name} blocks"
            item.reason = f"{item.reason}; {note}" if item.reason else note
            item.type = fitting
        if item.fallback and config.strict:
            raise PT2Error(
                f"--strict: {tensor.source or tensor.name} would not be ternary ({item.reason})"
            )
        item.nbytes = (item.elements // tensor.shape[-1]) * ggml.row_size(
            item.type, tensor.shape[-1]
        )
        items.append(item)
    return items


def _plan(
    tensor: CarrierTensor, config: ExportConfig, kept: Mapping[str, str], tied: bool, mixed: Choice
) -> Item:
    def item(name: str, reason: str | None, fallback: bool = False) -> Item:
        return Item(tensor, type_of(name), 0, reason, fallback)

    if tensor.source is not None:
        better = mixed.linears.get(tensor.source.removesuffix(".weight"))
        if better is not None:
            return item(better, "original weights, chosen for the target size")
        unit = q2k.SUPER if config.type == "q2_k" else BLOCK
        if tensor.shape[-1] % unit == 0:
            return item(config.type, None)
        why = f"{tensor.shape[-1]} columns are no whole {config.type} blocks of {unit}"
        return item(config.fallback_type, why, fallback=True)
    if len(tensor.shape) < 2:
        return item("f32", "norm, bias or constant")
    if tensor.name == EMBEDDING:
        what = "token embeddings and head" if tied else "token embeddings"
        return item(mixed.tables.get("embedding") or config.embeddings(tied), what)
    if tensor.name == HEAD:
        return item(mixed.tables.get("head") or config.head(), "head")
    if tensor.name in kept:
        return item(config.fallback_type, f"kept: {kept[tensor.name]}", fallback=True)
    if tensor.name.endswith(".weight") and len(tensor.shape) == 2:
        return item(config.fallback_type, "not a linear that pt2-quantize knows", fallback=True)
    return item("f32", "not a matrix")


def _fit(kind: gguf.GGMLQuantizationType, cols: int, ggml: Ggml) -> gguf.GGMLQuantizationType:
    """``kind``, or the next type whose blocks fit into a row."""
    while cols % ggml.block_size(kind):
        substitute = ORDINARY_TYPES.get(kind.name.lower()) or "f16"
        kind = type_of(substitute)
    return kind


def row_order(tensor: CarrierTensor, plan: FoldPlan) -> NDArray[Any]:
    """Which row of the source's weight each row of a linear is: the fold's order, and on top of it
    the converter's."""
    assert tensor.rows is not None and tensor.source is not None
    folded = plan.rows.get(tensor.source)
    return tensor.rows if folded is None else folded[tensor.rows]


@dataclass
class TernaryRows:
    """A ternary weight with its rows where they will be in the file.

    Attributes:
        codes: uint8 ``[rows, cols]`` of t + 1.
        alpha: float16 ``[rows, cols / g]``.
        mu: float16 ``[rows, cols / g]``.
    """

    codes: U8
    alpha: F16
    mu: F16

    @classmethod
    def make(cls, tensor: CarrierTensor, matrix: TernaryMatrix, plan: FoldPlan) -> TernaryRows:
        """Put the rows of an artifact's matrix into the order of the fold, then the converter's."""
        if (matrix.rows, matrix.cols) != tensor.shape:
            raise PT2Error(f"{matrix.name} in the artifact does not fit the model's shape")
        order = row_order(tensor, plan)
        codes = (matrix.codes() + np.int8(1)).view(np.uint8)
        return cls(codes[order], matrix.alpha[order], matrix.mu[order])

    def dequantize(self) -> NDArray[np.float32]:
        """What is meant: float32 ``[rows, cols]``."""
        return weights(self.codes, self.alpha, self.mu)

    def per_block(self, size: int) -> TernaryRows:
        """The same with an alpha and mu for every ``size`` columns, g being a multiple of it."""
        repeats = self.codes.shape[1] // self.alpha.shape[1] // size
        alpha, mu = (np.repeat(x, repeats, axis=1) for x in (self.alpha, self.mu))
        return TernaryRows(self.codes, alpha, mu)


def check_group_size(group: int, kind: str, columns: Mapping[str, int]) -> None:
    """Raise PT2Error when a type cannot hold blocks of ``group`` columns.

    Args:
        columns: Hugging Face module name -> number of columns, of the ternary linears.
    """
    if group % BLOCK == 0:
        return
    widths: dict[str, list[int]] = {}
    for module, cols in columns.items():
        widths.setdefault(module.rpartition(".")[2], []).append(cols)
    if kind in formats.TYPES and all(c % q2k.SUPER == 0 for c in columns.values()):
        raise PT2Error(
            f"the artifact has blocks of {group}, {kind} holds blocks of {BLOCK}: use --type q2_k, "
            f"or quantise again with --block-size {BLOCK}"
        )
    # No type holds such blocks: what is left is to quantise again, in blocks that one does.
    again = width_problem(widths, BLOCK)
    if kind in formats.TYPES or width_problem(widths, group):
        how = f"use --block-size {BLOCK}" if again is None else again.partition(": ")[2]
        raise PT2Error(
            f"the artifact has blocks of {group}, which {kind} cannot hold in "
            f"{', '.join(widths)}: quantise again, {how}"
        )


def encode_ternary(
    rows: TernaryRows, kind: gguf.GGMLQuantizationType, ggml: Ggml
) -> tuple[NDArray[Any], q2k.WeightError | None]:
    """Encode a ternary weight; the error is given for Q2_K only, the ternary types have none."""
    name = kind.name.lower()
    if name in formats.TYPES:
        exact = rows.per_block(BLOCK)
        return formats.TYPES[name].pack(exact.codes, exact.alpha, exact.mu), None
    if name == "q2_k":
        return q2k.encode(rows.codes, rows.alpha, rows.mu)
    return encode_ordinary(rows.dequantize(), kind, ggml, "a ternary weight"), None


def encode_ordinary(
    values: NDArray[np.float32], kind: gguf.GGMLQuantizationType, ggml: Ggml, name: str,
    importance: NDArray[np.float32] | None = None,
) -> NDArray[Any]:  # fmt: skip
    """Encode float32 ``[..., cols]`` with ggml's own functions; uint8, or float32 for F32.

    Args:
        importance: float32 ``[cols]``, see :meth:`Ggml.quantize`.

    Raises:
        PT2Error: NaN or infinity among the values.
    """
    if not np.isfinite(values).all():
        raise PT2Error(f"tensor {name} has NaN or Inf in it; mend the source model")
    if kind == F32_TYPE:
        return np.ascontiguousarray(values, dtype=np.float32)
    return ggml.quantize(values, kind, importance)
