"""Choose a type for every tensor, and encode one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from numpy.typing import NDArray

from export import q2k
from export.config import ORDINARY_TYPES, ExportConfig
from export.converter import Carrier, CarrierTensor
from export.ggml import Ggml, type_of
from pt2_core import formats, upstream
from pt2_core.errors import PT2Error
from pt2_core.formats import BLOCK, weights
from pt2_core.model.fold_edges import tensor_names
from pt2_core.model.widths import width_problem

if TYPE_CHECKING:
    from pt2_core.formats import F16, U8

F32_TYPE = gguf.GGMLQuantizationType.F32
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# Parts of the names of tensors that llama.cpp's own quantiser never rounds (src/llama-quant.cpp,
# tensor_allows_quantization), beside those that its converter writes as F32 whatever is asked for.
FULL_PRECISION = (
    "_norm.weight", "ffn_gate_inp", "ffn_gate_tid2eid", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv", "indexer.", "time_mix_", "attn_rel_b", "position_embd",
    "token_types",
)  # fmt: skip
_VALUES_AT_ONCE = 1 << 25


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
    group_of: Callable[[CarrierTensor], int], mixed: Callable[[CarrierTensor], str | None],
    tables: Mapping[str, str],
) -> list[Item]:  # fmt: skip
    """Choose the types.

    Args:
        carrier: the converter's output.
        kept: matrix -> reason, those that the quantiser left alone.
        group_of: columns that share an alpha and mu in a ternary tensor.
        mixed: the type that was chosen for a ternary tensor to fit a size; None: ``config``'s.
        tables: ``embedding`` and ``head`` -> the type chosen to fit a size.

    Raises:
        PT2Error: with ``strict``, the first linear that would not be ternary.
    """
    planner = _Planner(
        config, tied=all(t.name != HEAD for t in carrier.tensors), tables=tables,
        kept={n: why for matrix, why in kept.items() for n in tensor_names(matrix)},
        fallbacks=carrier.fallbacks,
    )  # fmt: skip
    items = []
    for tensor in carrier.tensors:
        if tensor.ternary:
            item = planner.ternary(tensor, group_of(tensor), mixed(tensor))
        else:
            item = planner.ordinary(tensor)
        fitting = _fit(item.type, tensor.shape[-1], ggml) if tensor.shape else item.type
        if fitting != item.type:
            note = f"{tensor.shape[-1]} columns are no whole {item.type.name} blocks"
            item.reason = f"{item.reason}; {note}" if item.reason else note
            item.type = fitting
        if item.fallback and config.strict:
            name = tensor.sources[0] if tensor.sources else tensor.name
            raise PT2Error(f"--strict: {name} would not be ternary ({item.reason})")
        cols = tensor.shape[-1] if tensor.shape else 1
        item.nbytes = (item.elements // cols) * ggml.row_size(item.type, cols)
        items.append(item)
    return items


@dataclass(frozen=True)
class _Planner:
    """Chooses one tensor's type.

    Attributes:
        kept: the checkpoint's tensor -> why the quantiser left it alone.
        fallbacks: the checkpoint's tensor -> why its ternary matrices come as values.
    """

    config: ExportConfig
    tied: bool
    tables: Mapping[str, str]
    kept: Mapping[str, str]
    fallbacks: Mapping[str, str]

    def ternary(self, tensor: CarrierTensor, group: int, better: str | None) -> Item:
        """The type of a tensor that is made of ternary matrices alone."""
        kind, cols = self.config.type, tensor.shape[-1]
        if better is not None:
            return _item(tensor, better, "original weights, chosen for the target size")
        unit, least = (q2k.SUPER, q2k.SUB) if kind == "q2_k" else (BLOCK, BLOCK)
        if kind in upstream.TYPES:
            unit = least = upstream.TYPES[kind].block
        why = None
        if cols % unit:
            why = f"{cols} columns are no whole {kind} blocks of {unit}"
        elif group % least:
            why = f"blocks of {group} columns do not fit {kind}, which holds blocks of {least}"
        if why is None:
            return _item(tensor, kind, None)
        return _item(tensor, self.config.fallback_type, why, fallback=True)

    def ordinary(self, tensor: CarrierTensor) -> Item:
        """The type of any other tensor."""
        fallback = self.config.fallback_type
        if lost := next((self.fallbacks[n] for n in tensor.sources if n in self.fallbacks), None):
            kind = fallback if tensor.free and len(tensor.shape) > 1 else "f32"
            return _item(tensor, kind, lost, fallback=True)
        if len(tensor.shape) < 2:
            return _item(tensor, "f32", "norm, bias or constant")
        if tensor.name == EMBEDDING:
            what = "token embeddings and head" if self.tied else "token embeddings"
            kind = self.tables.get("embedding") or self.config.embeddings(self.tied)
            return _item(tensor, kind, what)
        if tensor.name == HEAD:
            return _item(tensor, self.tables.get("head") or self.config.head(), "head")
        if not tensor.free or any(word in tensor.name for word in FULL_PRECISION):
            return _item(tensor, "f32", "kept in full precision by llama.cpp")
        if kept := next((self.kept[n] for n in tensor.sources if n in self.kept), None):
            return _item(tensor, fallback, f"kept: {kept}", fallback=True)
        if tensor.name.endswith(".weight") and len(tensor.shape) <= 3:
            return _item(tensor, fallback, "not a linear that pt2-quantize knows", fallback=True)
        return _item(tensor, "f32", "not a matrix")


def _item(tensor: CarrierTensor, kind: str, reason: str | None, fallback: bool = False) -> Item:
    return Item(tensor, type_of(kind), 0, reason, fallback)


def _fit(kind: gguf.GGMLQuantizationType, cols: int, ggml: Ggml) -> gguf.GGMLQuantizationType:
    """``kind``, or the next type whose blocks fit into a row."""
    while cols % ggml.block_size(kind):
        substitute = ORDINARY_TYPES.get(kind.name.lower()) or "f16"
        kind = type_of(substitute)
    return kind


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

    def dequantize(self) -> NDArray[np.float32]:
        """What is meant: float32 ``[rows, cols]``."""
        return weights(self.codes, self.alpha, self.mu)

    def per_block(self, size: int) -> TernaryRows:
        """The same with an alpha and mu for every ``size`` columns, g being a multiple of it."""
        repeats = self.codes.shape[1] // self.alpha.shape[1] // size
        alpha, mu = (np.repeat(x, repeats, axis=1) for x in (self.alpha, self.mu))
        return TernaryRows(self.codes, alpha, mu)


def check_group_size(group: int, kind: str, columns: Mapping[str, int]) -> None:
    """Raise PT2Error when a type cannot hold blocks of ``group`` columns in any matrix.

    Args:
        columns: matrix -> number of columns, of those with such blocks.
    """
    if group % BLOCK == 0 or kind in upstream.TYPES:
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


def encode_parts(
    item: Item, rows: Callable[[Item, slice], TernaryRows], ggml: Ggml
) -> tuple[NDArray[Any], q2k.WeightError | None]:
    """Encode a ternary tensor, some of its rows in memory at a time; as :func:`encode_ternary`.

    Args:
        rows: gives rows of an item, counted over all leading dimensions.

    Returns:
        uint8 or float32 ``[..., row bytes]``, and the error.
    """
    shape = item.tensor.shape
    total, step = math.prod(shape[:-1]), max(1, _VALUES_AT_ONCE // shape[-1])
    parts, errors = [], []
    for first in range(0, total, step):
        some = rows(item, slice(first, min(first + step, total)))
        data, error = encode_ternary(some, item.type, ggml)
        parts.append(data)
        errors += [] if error is None else [error]
    data = np.concatenate(parts) if len(parts) > 1 else parts[0]
    return data.reshape(*shape[:-1], -1), sum(errors, q2k.WeightError()) if errors else None


def encode_ternary(
    rows: TernaryRows, kind: gguf.GGMLQuantizationType, ggml: Ggml
) -> tuple[NDArray[Any], q2k.WeightError | None]:
    """Encode a ternary weight; the error is given for Q2_K only, the ternary types have none."""
    name = kind.name.lower()
    if name in formats.TYPES:
        exact = rows.per_block(BLOCK)
        return formats.TYPES[name].pack(exact.codes, exact.alpha, exact.mu), None
    if name in upstream.TYPES:
        other = upstream.TYPES[name]
        return other.pack(rows.codes, rows.per_block(other.block).alpha), None
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
