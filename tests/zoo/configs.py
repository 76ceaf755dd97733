"""A small config for each class: the same sizes under whatever names its config has them.

:data:`SIZES` is offered to every config, which takes the fields that it has;
:mod:`tests.zoo.exceptions` says what a class needs besides. Widths are whole multiples of 256, so
that every type fits every linear.
"""

from __future__ import annotations

from typing import Any

from tests.zoo.exceptions import SPECIALS, Special
from tests.zoo.tokenizers import VOCAB

WINDOW = 64

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 512, "sliding_window": WINDOW,
    "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2,
    # Experts.
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256, "n_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    # Linear attention.
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    # Older names.
    "ffn_dim": 512, "word_embed_proj_dim": 256,
}  # fmt: skip


def tiny_config(name: str, kind: str) -> Any:
    """The small config of a class.

    Args:
        name: of the class.
        kind: transformers' model type.
    """
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[kind]
    known = made()
    config = made(**_settings(known, special(name).config))
    config.architectures = [name]
    return config


def _settings(known: Any, more: dict[str, Any]) -> dict[str, Any]:
    """The sizes that a config has, and what is special; the text model's are inside, if there."""
    found = {k: v for k, v in SIZES.items() if _has(known, k)} | more
    if isinstance(found.get("text_config"), dict):
        inner = type(known.get_text_config())()
        found["text_config"] = _settings(inner, found["text_config"])
    return {k: v for k, v in found.items() if v is not ...}


def special(name: str) -> Special:
    """What a class needs besides."""
    return SPECIALS.get(name, Special())


def _has(config: Any, field: str) -> bool:
    """Whether a config has a field; one that differs by layer is there, and refuses to be read."""
    try:
        return hasattr(config, field)
    except Exception:
        return True
