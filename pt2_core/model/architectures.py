"""What the project knows of each architecture: transformers' classes, the linears of a block, the
settings that transformers assumes where ``config.json`` is silent. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Site:
    """One input within a decoder block and the linears that read it.

    Attributes:
        role: ``residual`` (reads the residual stream: its column order must be the model-wide one),
            ``heads`` (reads the attention heads' outputs: an order within each head folds into
            v_proj's rows), or ``free`` (an order folds into the rows of the linears before it).
        linears: names below the block, e.g. ``self_attn.q_proj``.
        stream: the norm whose input is the residual stream that the linears' output is added to;
            None where it is added to none.
    """

    role: str
    linears: tuple[str, ...]
    stream: str | None = None


@dataclass(frozen=True)
class Adapter:
    """An architecture.

    Attributes:
        module: where its classes are, below ``transformers.models``.
        prefix: of the classes' names.
        sites: in the order they run.
        model_type: its name in ``config.json``.
        defaults: transformers' values of settings that the project reads, where they are missing.
    """

    module: str
    prefix: str
    sites: tuple[Site, ...]
    model_type: str
    defaults: dict[str, Any]


LLAMA_SITES = (
    Site("residual", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Site("heads", ("self_attn.o_proj",), "input_layernorm"),
    Site("residual", ("mlp.gate_proj", "mlp.up_proj")),
    Site("free", ("mlp.down_proj",), "post_attention_layernorm"),
)
ADAPTERS = {
    "LlamaForCausalLM": Adapter("llama.modeling_llama", "Llama", LLAMA_SITES, "llama", {}),
    "MistralForCausalLM": Adapter(
        "mistral.modeling_mistral", "Mistral", LLAMA_SITES, "mistral", {"num_key_value_heads": 8}
    ),
    "Qwen2ForCausalLM": Adapter(
        "qwen2.modeling_qwen2", "Qwen2", LLAMA_SITES, "qwen2", {"num_key_value_heads": 32}
    ),
    "Qwen3ForCausalLM": Adapter(
        "qwen3.modeling_qwen3", "Qwen3", LLAMA_SITES, "qwen3",
        {"num_key_value_heads": 32, "head_dim": 128},
    ),
}  # fmt: skip
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"
