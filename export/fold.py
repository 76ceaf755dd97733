"""Fold the quantiser's column orders into the weights around them, exactly.

A linear quantised in the order ``perm`` computes ``W[:, perm] @ x[perm]``. llama.cpp has no gather,
so ``x`` itself must arrive in that order. What makes it:

- The residual stream (one order for the model): the columns of the embeddings and of the head, the
  norms on it, and the rows (and biases) of o and down, which write to it. RMSNorm does not care.
- The input of down: the rows (and biases) of gate and up.
- The input of o: the rows (and biases) of v. Attention mixes positions, not channels, so an order
  within a head passes through it; heads that share a key-value head share their order.

q and k rows, and the per-head norms of Qwen3, are never touched, so rotary embeddings are safe.

:func:`fold_plan` checks the orders and returns, by tensor name, the order of rows and of columns;
it is the same for the converter's tensors, for the ternary rows and for a state dict in a test.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pt2_core.errors import PT2Error
from pt2_core.schema import shown

Order = NDArray[np.int32]

_EMBED = ("model.embed_tokens.weight", "lm_head.weight")
_FINAL_NORM = "model.norm"
_STREAM_NORMS = ("input_layernorm", "post_attention_layernorm")
_LINEAR = re.compile(r"(model\.layers\.(\d+)\.)(?:self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj")
_READS_STREAM = ("q", "k", "v", "gate", "up")
_HEAD_NORM = re.compile(r"model\.layers\.\d+\.self_attn\.[qk]_norm\.weight")
_ROTARY = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_NORM = re.compile(r"model\.layers\.\d+\.(?:" + "|".join(_STREAM_NORMS) + r")\.(?:weight|bias)")
_INSTEAD = "quantise again with --order foldable"


@dataclass
class FoldPlan:
    """Orders of rows (axis 0) and columns (axis 1) by tensor name; absent means as they are."""

    rows: dict[str, Order] = field(default_factory=dict)
    cols: dict[str, Order] = field(default_factory=dict)

    def apply(self, name: str, tensor: Any) -> Any:
        """The folded tensor, for a torch tensor or an array ``[rows]`` or ``[rows, cols]``."""
        if name in self.rows:
            tensor = tensor[_as_index(self.rows[name], tensor)]
        if name in self.cols:
            tensor = tensor[:, _as_index(self.cols[name], tensor)]
        return tensor

    def _add(self, side: dict[str, Order], name: str, order: Order) -> None:
        if not _is_identity(order):
            side[name] = order


@dataclass(frozen=True)
class Heads:
    """The attention layout: ``n_head`` query heads over ``n_kv`` key-value heads of ``dim``."""

    n_head: int
    n_kv: int
    dim: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Heads:
        """From a Hugging Face ``config.json``; head_dim and n_kv default as transformers does.

        Raises:
            PT2Error: a size is missing, no whole number above 0, or does not divide another.
        """
        n_head = _config_size(config, "num_attention_heads")
        n_kv = _config_size(config, "num_key_value_heads", n_head)
        if config.get("head_dim") is not None:
            return cls._checked(n_head, n_kv, _config_size(config, "head_dim"))
        hidden = _config_size(config, "hidden_size")
        if hidden % n_head:
            raise PT2Error(f"config.json has {n_head} heads for a hidden_size of {hidden}")
        return cls._checked(n_head, n_kv, hidden // n_head)

    @classmethod
    def _checked(cls, n_head: int, n_kv: int, dim: int) -> Heads:
        if n_head % n_kv:
            raise PT2Error(f"config.json has {n_head} heads over {n_kv} key-value heads")
        return cls(n_head, n_kv, dim)


def _config_size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if value is None:
        raise PT2Error(f"config.json has no {key}: cannot fold the orders")
    if type(value) is not int or not 0 < value < 1 << 31:
        raise PT2Error(f"config.json: {key} must be a whole number above 0, not {shown(value)}")
    return value


def fold_plan(
    tensors: Iterable[str], heads: Heads, residual: Order, orders: Mapping[str, Order]
) -> FoldPlan:
    """Work out what has to move so that every linear's input arrives in its order.

    Args:
        tensors: names of all tensors of the checkpoint.
        heads: the attention layout.
        residual: int32 ``[hidden]``, the order of the residual stream.
        orders: Hugging Face module name -> int32 ``[cols]``, for every ternary linear.

    Raises:
        PT2Error: an order that cannot be folded, or a tensor of unknown role in a model with
            orders to fold.
    """
    plan = FoldPlan()
    tensors = list(tensors)
    _check_order("the residual stream", residual)
    for module, order in orders.items():
        _check_order(module, order)
    by_layer = {m: _LINEAR.fullmatch(m) for m in orders}
    if all(_is_identity(o) for o in (residual, *orders.values())):
        return plan
    for module, match in by_layer.items():
        if match is None:
            raise PT2Error(f"{module} has an order of its own, and its role is unknown: {_INSTEAD}")
    for name in tensors:
        _fold_stream(plan, name, residual)
    for module, order in orders.items():
        match = by_layer[module]
        assert match is not None
        prefix, role = match[1], match[3]
        if role in _READS_STREAM:
            _check_stream(module, order, residual)
        elif role == "down":
            _produce(plan, tensors, [f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj"], order)
        else:
            source = f"{prefix}self_attn.v_proj"
            _produce(plan, tensors, [source], _value_rows(module, order, heads))
    for module in orders:
        # An artifact's columns are in their order already: only rows are left to move.
        plan.cols.pop(f"{module}.weight", None)
    return plan


def dense_plan(plan: FoldPlan, orders: Mapping[str, Order]) -> FoldPlan:
    """``plan`` for a model whose linears are all still in the source's column order.

    It adds the columns that an artifact has permuted already: with it a whole state dict can be
    folded, which must leave the model's logits as they were.
    """
    full = FoldPlan(dict(plan.rows), dict(plan.cols))
    for module, order in orders.items():
        full._add(full.cols, f"{module}.weight", order)
    return full


def _fold_stream(plan: FoldPlan, name: str, residual: Order) -> None:
    """Fold the residual stream's order into one tensor of the checkpoint."""
    if _is_identity(residual):
        return
    linear = _LINEAR.match(name)
    if name in _EMBED:
        plan._add(plan.cols, name, residual)
    elif name.startswith(_FINAL_NORM + ".") or _NORM.fullmatch(name):
        plan._add(plan.rows, name, residual)
    elif linear and name[linear.end() :] in (".weight", ".bias"):
        if linear[3] not in _READS_STREAM:
            plan._add(plan.rows, name, residual)
        elif name.endswith(".weight"):
            plan._add(plan.cols, name, residual)
    elif name != "lm_head.bias" and not _HEAD_NORM.fullmatch(name) and not _ROTARY.fullmatch(name):
        raise PT2Error(
            f"tensor {name} is not known to the fold, so the residual stream's order cannot be "
            "folded: quantise again with --order none"
        )


def _produce(plan: FoldPlan, tensors: list[str], modules: list[str], order: Order) -> None:
    for module in modules:
        plan._add(plan.rows, f"{module}.weight", order)
        if f"{module}.bias" in tensors:
            plan._add(plan.rows, f"{module}.bias", order)


def _check_stream(module: str, order: Order, residual: Order) -> None:
    if not np.array_equal(order, residual):
        raise PT2Error(
            f"{module} has a column order of its own, not the residual stream's, and llama.cpp "
            f"cannot reorder activations while it runs: {_INSTEAD}"
        )


def _value_rows(module: str, order: Order, heads: Heads) -> Order:
    """The order of v's rows, int32 ``[n_kv * dim]``, that an order of o's columns asks for."""
    if len(order) != heads.n_head * heads.dim:
        raise PT2Error(
            f"{module} has {len(order)} columns, not {heads.n_head} heads of {heads.dim}: "
            "the artifact does not fit this model's config.json"
        )
    per_head = order.reshape(heads.n_head, heads.dim)
    within = per_head - np.arange(heads.n_head, dtype=np.int32)[:, None] * heads.dim
    if within.min() < 0 or within.max() >= heads.dim:
        raise PT2Error(f"{module} moves columns from one head to another: {_INSTEAD}")
    shared = within.reshape(heads.n_kv, -1, heads.dim)
    if not (shared == shared[:, :1]).all():
        raise PT2Error(
            f"{module} orders query heads that share a key-value head differently: {_INSTEAD}"
        )
    first = np.arange(heads.n_kv, dtype=np.int32)[:, None] * heads.dim
    return (shared[:, 0] + first).reshape(-1).astype(np.int32)


def _check_order(what: str, order: Order) -> None:
    if not np.array_equal(np.sort(order), np.arange(len(order))):
        raise PT2Error(f"the order of {what} is not a permutation: the artifact is damaged")


def _is_identity(order: Order) -> bool:
    return bool(np.array_equal(order, np.arange(len(order))))


def _as_index(order: Order, tensor: Any) -> Any:
    if isinstance(tensor, np.ndarray):
        return order
    import torch

    return torch.from_numpy(order.astype(np.int64))
