"""What the converter's process mends in the model's settings before and after conversion.

Runs in the process of :mod:`export.converter_driver` (see there); needs NumPy and torch only inside
of functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from export.settings import COMMON, KEPT, TABLES, examine, judge

# Settings that the converter reads under a name that transformers no longer writes -> the value.
_OLDER: dict[str, Callable[[dict[str, Any]], Any]] = {
    "n_ctx": lambda h: h.get("n_positions") or h.get("max_position_embeddings"),
    "rotary_pct": lambda h: _rope_of(h).get("partial_rotary_factor", 1.0),
}
# Kinds of layers that transformers has renamed, by the model type whose converter knows them by
# their old names.
_OLDER_LAYERS = {
    "granitemoehybrid": {"linear_attention": "mamba", "full_attention": "attention"},
}


def with_older_names(hparams: dict[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as the converter knows them.

    transformers renames settings of older files, and writes none that it has no use for; the
    converter was written for the files as they were published.

    Args:
        hparams: as ``ModelBase.load_hparams`` gives them.
        raw: ``config.json`` itself; what only it has is added.
    """
    known = {**raw, **hparams}
    published, written = raw.get("text_config"), hparams.get("text_config")
    if isinstance(published, Mapping) and isinstance(written, Mapping):
        known["text_config"] = {**published, **written}
    more: dict[str, Any] = {
        name: value(known) for name, value in _OLDER.items() if known.get(name) is None
    }
    layers = _OLDER_LAYERS.get(str(known.get("model_type")))
    if layers and isinstance(known.get("layer_types"), list):
        more["layer_types"] = [layers.get(kind, kind) for kind in known["layer_types"]]
    return {**known, **{name: value for name, value in more.items() if value is not None}}


def has_table(hparams: Mapping[str, Any]) -> bool:
    """Whether :mod:`export.settings` knows every setting of the model."""
    return hparams.get("model_type") in TABLES


def _rope_of(hparams: dict[str, Any]) -> dict[str, Any]:
    return hparams.get("rope_parameters") or {}


def settings(
    hparams: dict[str, Any], raw: Iterable[str], max_context: int
) -> tuple[dict[str, Any], list[str]]:
    """Check the settings and leave those that the model has.

    Args:
        hparams: as ``ModelBase.load_hparams`` gives them.
        raw: the keys of ``config.json``.
        max_context: 0, or the tokens that the file is meant for.

    Returns:
        (the settings that the converter is given, notes)

    Raises:
        Unsupported: a setting with which the file would be wrong.
    """
    kind = hparams.get("model_type")
    if kind not in TABLES:
        return hparams, []
    findings, unknown = examine(hparams, raw)
    notes = judge(findings, int(hparams.get("max_position_embeddings") or 0), max_context)
    if unknown:
        some = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if unknown[5:] else "")
        notes.append(f"config.json has settings that the table does not know, ignored: {some}")
    known = {*COMMON, *TABLES[kind], *KEPT}
    kept = {k: v for k, v in hparams.items() if k in known}
    if max_context and kept.get("max_position_embeddings"):
        kept["max_position_embeddings"] = min(kept["max_position_embeddings"], max_context)
    return kept, notes


def attention_factor(rope: dict[str, Any], max_position: int) -> float:
    """The factor on cos and sin that transformers applies (1 where there is none)."""
    kind, given = rope.get("rope_type"), rope.get("attention_factor")
    original = rope.get("original_max_position_embeddings") or max_position
    factor = rope.get("factor") or max_position / original
    if kind not in ("yarn", "longrope"):
        return 1.0
    if given is not None:
        return float(given)
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    up, down = rope.get("mscale"), rope.get("mscale_all_dim")
    return _yarn(factor, up) / _yarn(factor, down) if up and down else _yarn(factor, 1)


def _yarn(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def mend(model: Any, max_position: int) -> list[str]:
    """Write the factor on cos and sin, and longrope's short factors, where llama.cpp reads them.

    Args:
        model: the converter's model, not yet written.
        max_position: ``max_position_embeddings`` as in ``config.json``.

    Returns:
        Notes on what was done.
    """
    if model.hparams.get("model_type") not in TABLES:
        return []
    rope = dict(model.rope_parameters)
    kind = rope.get("rope_type")
    wanted = attention_factor(rope, max_position)
    # llama.cpp makes 1 + 0.1 ln(factor) of YaRN by itself and multiplies by this key.
    own = _yarn(rope["factor"], 1) if kind == "yarn" and rope.get("factor") else 1.0
    notes = []
    if abs(wanted / own - 1) > 1e-6:
        _then(model, "set_gguf_parameters", lambda: _attn_factor(model, wanted / own))
        notes.append(f"rotary embeddings are scaled by {wanted:.6g} (rope.scaling.attn_factor)")
    if kind == "longrope":
        factors = rope["short_factor"]
        model.rope_parameters = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        _extra_factors(model, factors)
        notes.append("longrope: its short factors are written as rope_freqs")
    return notes


def _attn_factor(model: Any, value: float) -> None:
    model.gguf_writer.add_rope_scaling_attn_factors(value)


def _then(model: Any, name: str, more: Callable[[], None]) -> None:
    """Make a method of this one model do something more."""
    first = getattr(model, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        result = first(*args, **kwargs)
        more()
        return result

    setattr(model, name, both)


def _extra_factors(model: Any, factors: list[float]) -> None:
    import gguf
    import torch

    first = model.generate_extra_tensors

    def tensors() -> Any:
        yield from first()
        name = model.format_tensor_name(gguf.MODEL_TENSOR.ROPE_FREQS)
        yield name, torch.tensor(factors, dtype=torch.float32)

    model.generate_extra_tensors = tensors
