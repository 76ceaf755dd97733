"""How a family's file says what its column orders fold into (docs/howto/architecture.md).

Names are those of modules in the files, with ``*`` for a number:

    model.layers.*.mlp.down_proj             its .weight, and its .bias where rows are meant
    model.layers.*.self_attn.qkv_proj:v      of its rows only the values' (queries, keys, values)
    model.layers.*.mlp.gate_up_proj:1/2      of its rows only the first half

What an entry names need not be in every model of the family. What a model has and no entry names
makes :func:`pt2_core.model.fold_edges.edges_for` answer that it knows nothing of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """The fold edges of models with the same names and the same shape of block.

    Attributes:
        model_types: what ``config.json`` calls them.
        columns: modules that read the residual stream (embedding tables too: their columns are the
            stream's channels).
        rows: modules that write to the stream, and norms on it.
        heads: a reader of the attention heads' outputs -> the module whose rows make the values.
            Query heads that follow each other share a key-value head.
        free: a reader of an elementwise product or activation -> the modules whose rows make it.
        still: modules that no order moves (norms of single heads, for one).
    """

    model_types: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    heads: Mapping[str, str] = field(default_factory=dict)
    free: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    still: tuple[str, ...] = ()


def below(prefix: str, names: str) -> tuple[str, ...]:
    """``prefix`` with each of some names behind it.

    >>> below("model.layers.*.mlp.", "gate_proj up_proj")
    ('model.layers.*.mlp.gate_proj', 'model.layers.*.mlp.up_proj')
    """
    return tuple(prefix + name for name in names.split())
