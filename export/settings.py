"""Which settings of ``config.json`` llama.cpp's graph of an architecture has.

Data: :data:`TABLES` classes every field of transformers' config classes by what becomes of it in a
file, read from the pinned source (``src/models/*.cpp``, ``src/llama-model.cpp``,
``src/llama-context.cpp``, ``conversion/*.py``):

- ``INERT``: it changes nothing of what the model computes at inference.
- ``CARRIED``: the converter writes it into the metadata, or it is seen in the tensors.
- :class:`Must`: the graph computes as with these values and as with no other.
- :class:`Check`: a function says what is wrong with the value.

:func:`examine` gives the findings for a config, and :func:`judge` decides: what always matters is
refused by name; what only matters beyond N tokens is accepted with ``--max-context``. No part of
this needs torch; the configs are plain dictionaries as ``config.to_dict()`` gives them.

There is a table for the architectures of which somebody has read all that. Of any other nothing is
refused here: the proof compares what the file predicts with what the model does, and catches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

INERT, CARRIED = "inert", "carried"


@dataclass(frozen=True)
class Finding:
    """A setting that the graph does not have.

    Attributes:
        setting: its name, with dots for what is inside of another.
        said: what is wrong with it, as the end of a sentence that begins with the name.
        within: tokens up to which it changes nothing; 0 where it always does.
        extends: whether it is there to go on beyond the context that the model states, so that
            this context alone limits nothing.
    """

    setting: str
    said: str
    within: int = 0
    extends: bool = False


@dataclass(frozen=True)
class Must:
    """The only values with which the graph computes the same; ``graph`` is what it does instead."""

    values: tuple[Any, ...]
    graph: str


@dataclass(frozen=True)
class Check:
    """A rule that needs more of the config than the value itself."""

    find: Callable[[Mapping[str, Any], Graph], Iterable[Finding]]


@dataclass(frozen=True)
class Graph:
    """What is particular to llama.cpp's graph of an architecture.

    Attributes:
        name: its file in ``src/models``, without the ending.
        rope_factors: it reads a tensor of factors on the rotary frequencies (rope_freqs).
    """

    name: str
    rope_factors: bool


class Unsupported(Exception):
    """A setting that makes a file wrong; one line with the setting and, if there is one, a way."""


def _sliding(config: Mapping[str, Any], graph: Graph) -> Iterable[Finding]:
    """Attention to the last tokens only, in some layers or in all."""
    window, layers = config.get("sliding_window"), config.get("layer_types")
    if isinstance(layers, list | tuple):
        others = sorted({str(t) for t in layers} - {"full_attention", "sliding_attention"})
        if others:
            yield Finding("layer_types", f"has {others[0]!r}, {_graph(graph)} full attention only")
        if "sliding_attention" not in layers:
            return
        if window is None:
            yield Finding("layer_types", "has 'sliding_attention', but there is no sliding_window")
            return
    if window is not None:
        said = f"is {window}, {_graph(graph)} no such window"
        yield Finding("sliding_window", said, within=window if _whole(window) else 0)


def _one_config(config: Mapping[str, Any], graph: Graph) -> Iterable[Finding]:
    if config.get("per_layer_config"):
        yield Finding("per_layer_config", f"differs by layer, {_graph(graph)} one for all layers")


def _own_width(config: Mapping[str, Any], graph: Graph) -> Iterable[Finding]:
    """qwen2.cpp takes q's and o's other side to be as wide as the residual stream."""
    dim, heads = config.get("head_dim"), config.get("num_attention_heads")
    hidden = config.get("hidden_size")
    if dim is not None and heads and dim * heads != hidden:
        yield Finding("head_dim", f"is {dim}, {_graph(graph)} hidden_size / heads only")


def _rope(config: Mapping[str, Any], graph: Graph) -> Iterable[Finding]:
    """Rotary embeddings: the kind of scaling and everything in it."""
    rope = config.get("rope_parameters") or {}
    nested = [k for k, v in rope.items() if isinstance(v, Mapping)]
    if nested:
        yield Finding("rope_parameters", f"differs by layer, {_graph(graph)} one for all layers")
        return
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    if kind not in ROPE:
        yield Finding("rope_parameters.rope_type", f"is {kind!r}, {_graph(graph)} no such scaling")
        return
    for name, rule in ROPE[kind].items():
        if isinstance(rule, Must) and rope.get(name) not in rule.values:
            said = f"is {rope.get(name)!r}, {rule.graph}"
            yield Finding(f"rope_parameters.{name}", said)
        elif isinstance(rule, Check):
            yield from rule.find(config, graph)


def _factor(config: Mapping[str, Any], graph: Graph) -> Iterable[Finding]:
    factor = config["rope_parameters"].get("factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or factor <= 0:
        yield Finding("rope_parameters.factor", f"is {factor!r}, and must be a number above 0")


def _dynamic(config: Mapping[str, Any], graph: Graph) -> Iterable[Finding]:
    limit = config.get("max_position_embeddings") or 0
    said = f"is 'dynamic', {_graph(graph)} no frequencies that change with the length"
    yield Finding("rope_parameters.rope_type", said, within=limit, extends=True)


def _factors(config: Mapping[str, Any], graph: Graph) -> Iterable[Finding]:
    if not graph.rope_factors:
        kind = config["rope_parameters"].get("rope_type")
        said = f"is {kind!r}, {_graph(graph)} no factors on single frequencies"
        yield Finding("rope_parameters.rope_type", said)


def _longrope(config: Mapping[str, Any], graph: Graph) -> Iterable[Finding]:
    """The short factors can be written as rope_freqs; the change to the long ones cannot."""
    if not graph.rope_factors:
        yield from _factors(config, graph)
        return
    limit = config["rope_parameters"].get("original_max_position_embeddings") or 0
    said = "is 'longrope', and a file has room for the short factors only"
    yield Finding("rope_parameters.rope_type", said, within=limit)


def _graph(graph: Graph) -> str:
    return f"and llama.cpp's {graph.name} has"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


# What each kind of rotary scaling holds.
_WHOLE_HEAD = Must((None, 1, 1.0), "and llama.cpp turns whole heads here")
_PLAIN = {"rope_type": CARRIED, "type": INERT, "rope_theta": CARRIED,
          "partial_rotary_factor": _WHOLE_HEAD}  # fmt: skip
_MENDED = CARRIED  # written as rope.scaling.attn_factor, see export/converter_metadata.py
ROPE: dict[str, dict[str, Any]] = {
    "default": {**_PLAIN, "factor": INERT, "original_max_position_embeddings": INERT,
                "max_position_embeddings": INERT},
    "linear": {**_PLAIN, "factor": Check(_factor), "original_max_position_embeddings": INERT},
    "dynamic": {**_PLAIN, "factor": Check(_dynamic), "original_max_position_embeddings": INERT},
    "yarn": {
        **_PLAIN, "factor": Check(_factor), "original_max_position_embeddings": CARRIED,
        "attention_factor": _MENDED, "mscale": _MENDED, "mscale_all_dim": _MENDED,
        # 0 and null are read as the default in transformers too.
        "beta_fast": Must((None, 0, 32, 32.0), "and llama.cpp reads no other than 32 here"),
        "beta_slow": Must((None, 0, 1, 1.0), "and llama.cpp reads no other than 1 here"),
        "truncate": Must((None, True), "and llama.cpp always rounds the range"),
        "extrapolation_factor": INERT, "attn_factor": INERT, "finetuned": INERT,
    },
    "llama3": {
        **_PLAIN, "factor": Check(_factor), "low_freq_factor": Check(_factors),
        "high_freq_factor": CARRIED, "original_max_position_embeddings": CARRIED,
    },
    "longrope": {
        **_PLAIN, "factor": Check(_longrope), "short_factor": CARRIED, "long_factor": INERT,
        "attention_factor": _MENDED, "original_max_position_embeddings": CARRIED,
    },
}  # fmt: skip

# Fields of every config, and keys that transformers reads though no class lists them.
COMMON: dict[str, Any] = {
    "transformers_version": INERT, "architectures": CARRIED, "model_type": CARRIED,
    "output_hidden_states": INERT, "output_attentions": INERT, "return_dict": INERT,
    "dtype": INERT, "torch_dtype": INERT, "chunk_size_feed_forward": INERT,
    "is_encoder_decoder": INERT, "id2label": INERT, "label2id": INERT, "num_labels": INERT,
    "problem_type": INERT, "per_layer_config": Check(_one_config),
    "is_causal": Must((None, True), "and only causal attention is exported"),
    "_name_or_path": INERT, "name_or_path": INERT, "attn_implementation": INERT,
    "_attn_implementation": INERT, "auto_map": INERT, "quantization_config": INERT,
    "rope_theta": CARRIED, "rope_scaling": CARRIED, "partial_rotary_factor": CARRIED,
    "original_max_position_embeddings": CARRIED, "tokenizer_class": CARRIED,
    "unsloth_version": INERT, "unsloth_fixed": INERT, "task_specific_params": INERT,
    "use_mrope": INERT,
}  # fmt: skip
_SILU = Must(("silu", "swish"), "and llama.cpp's graph has SiLU")
_MODEL: dict[str, Any] = {
    "vocab_size": CARRIED, "hidden_size": CARRIED, "intermediate_size": CARRIED,
    "num_hidden_layers": CARRIED, "num_attention_heads": CARRIED, "num_key_value_heads": CARRIED,
    "head_dim": CARRIED, "hidden_act": _SILU, "max_position_embeddings": CARRIED,
    "initializer_range": INERT, "rms_norm_eps": CARRIED, "use_cache": INERT,
    "pad_token_id": CARRIED, "bos_token_id": CARRIED, "eos_token_id": CARRIED,
    "tie_word_embeddings": CARRIED, "rope_parameters": Check(_rope), "attention_dropout": INERT,
}  # fmt: skip
_QWEN: dict[str, Any] = {
    **_MODEL, "use_sliding_window": INERT, "max_window_layers": INERT,
    "sliding_window": Check(_sliding), "layer_types": Check(_sliding),
}  # fmt: skip
_NO_BIAS = Must((None, False), "and llama.cpp's qwen3 has no bias at the attention's output")

GRAPHS = {
    "llama": Graph("llama", rope_factors=True),
    "mistral": Graph("llama", rope_factors=True),
    "qwen2": Graph("qwen2", rope_factors=False),
    "qwen3": Graph("qwen3", rope_factors=False),
}
# transformers' model_type -> field -> what becomes of it.
TABLES: dict[str, dict[str, Any]] = {
    # Biases of attention and MLP are tensors that llama.cpp's llama loads where they are.
    "llama": {**_MODEL, "attention_bias": CARRIED, "mlp_bias": CARRIED, "pretraining_tp": INERT},
    "mistral": {**_MODEL, "sliding_window": Check(_sliding), "layer_types": INERT},
    "qwen2": {**_QWEN, "head_dim": Check(_own_width)},
    "qwen3": {**_QWEN, "attention_bias": _NO_BIAS},
}
# What stays in the converter's copy of the config: a stray key (num_experts, n_layers, text_config)
# would otherwise be taken for a setting of the model, which transformers does not do.
KEPT = ("quantization_config",)


def examine(config: Mapping[str, Any], raw: Iterable[str] = ()) -> tuple[list[Finding], list[str]]:
    """The settings that llama.cpp's graph does not have, and those that no table knows.

    Args:
        config: as transformers normalises it (``config.to_dict()``).
        raw: the keys of ``config.json`` itself.

    Returns:
        (findings, names of unknown settings); nothing for an architecture without a table.
    """
    kind = config.get("model_type")
    if kind not in TABLES:
        return [], []
    table, graph = {**COMMON, **TABLES[kind]}, GRAPHS[kind]
    if kind == "mistral":
        config = {k: v for k, v in config.items() if k != "layer_types"}
    findings: list[Finding] = []
    for name, rule in table.items():
        if isinstance(rule, Must) and config.get(name) not in rule.values:
            findings.append(Finding(name, f"is {config.get(name)!r}, {rule.graph}"))
        elif isinstance(rule, Check):
            findings.extend(rule.find(config, graph))
    unknown = sorted({*raw} - {*table})
    rope = config.get("rope_parameters") or {}
    known = ROPE.get(str(rope.get("rope_type") or "default"), rope)
    unknown += [f"rope_parameters.{k}" for k in rope if k not in known]
    return list(dict.fromkeys(findings)), unknown


def judge(findings: Iterable[Finding], context: int, max_context: int) -> list[str]:
    """Refuse what makes the file wrong; say what is accepted within ``--max-context``.

    Args:
        context: tokens that the model is made for (``max_position_embeddings``).
        max_context: tokens that the file is to be used with; 0 for all of ``context``.

    Raises:
        Unsupported: the first setting that matters within the file's context.
    """
    used = min(context, max_context) if max_context else context
    notes = []
    for f in findings:
        if not f.within:
            raise Unsupported(f"{f.setting} {f.said}: the file would compute something else")
        if used and used <= f.within and (max_context or not f.extends):
            if used < context or f.extends:
                notes.append(f"{f.setting} {f.said}: right up to {used} tokens (--max-context)")
            continue
        raise Unsupported(
            f"{f.setting} {f.said}: the file would be right up to {f.within} tokens only; "
            f"accept that with --max-context {f.within}"
        )
    return notes
