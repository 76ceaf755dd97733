"""What single classes need besides the common sizes of :mod:`tests.zoo.configs`. Data only.

``config`` goes to the config class; ``...`` takes a common size away. ``raw`` is added to
``config.json``, as the published models have it there: transformers drops such keys, and the
converter reads them. ``tokenizer`` is the kind, ``settings`` are added to tokenizer_config.json.
``renamed`` are parts of tensors' names that transformers does not write as the published files have
them, and what they are there. ``gain``: linears give outputs of about this size for inputs of size
1; a state space model makes more of an error, the larger it is. ``factors``: what parameters whose
name holds a part are multiplied by.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Special:
    """What one class needs."""

    config: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = "bpe"
    settings: dict[str, Any] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    gain: float = 1.3
    factors: dict[str, float] = field(default_factory=dict)


def _mamba(prefix: str = "mamba_") -> dict[str, Any]:
    """Eight heads of 64 channels and 64 states in the names of the Granite-like."""
    return {f"{prefix}n_heads": 8, f"{prefix}d_head": 64, f"{prefix}d_state": 64,
            f"{prefix}chunk_size": 32}  # fmt: skip


# Attention through low ranks: the rotary part apart from the rest, as many heads for the keys.
MLA: dict[str, Any] = {
    "head_dim": ..., "num_key_value_heads": 4, "q_lora_rank": 256, "kv_lora_rank": 256,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64,
}  # fmt: skip
INDEXED: dict[str, Any] = {"index_topk": 512, "index_head_dim": 128, "index_n_heads": 4}
# llama.cpp scales the queries by the heads' width.
GEMMA: dict[str, Any] = {"query_pre_attn_scalar": 64}
# The published ones scale everywhere; queries times 1, the default, would look at one token only.
GRANITE: dict[str, Any] = {
    "attention_multiplier": 0.125, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}  # fmt: skip
GEMMA4: dict[str, Any] = {
    "num_hidden_layers": 6, "vocab_size_per_layer_input": 512, "global_head_dim": 128,
    "num_experts": None, "final_logit_softcapping": 2.0,
}  # fmt: skip
# Its attention has no scale of its own: the trained norm of the queries has it.
QUERIES = {"q_norm": 0.125}
VISION: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
SIGMOID = {"scoring_func": "sigmoid"}
NO_WINDOW: dict[str, Any] = {"sliding_window": None}

SPECIALS: dict[str, Special] = {
    "AfmoeForCausalLM": Special({"mup_enabled": True}, {"route_norm": True}),
    "BambaForCausalLM": Special(
        {**_mamba(), "attn_layer_indices": [1, 3]}, {"attn_rotary_emb": 32}
    ),
    "BitNetForCausalLM": Special({"tie_word_embeddings": True}, tokenizer="spm"),
    # The default makes a tiny model's predictions next to even.
    "CohereForCausalLM": Special({"logit_scale": 1.0}),
    "Cohere2ForCausalLM": Special({"logit_scale": 1.0}),
    "Cohere2MoeForCausalLM": Special({"logit_scale": 1.0}),
    "DbrxForCausalLM": Special({
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 512, "moe_num_experts": 4, "moe_top_k": 2},
        "d_model": 256, "n_heads": 4, "n_layers": 4, "max_seq_len": 512,
        "hidden_size": ..., "num_attention_heads": ..., "num_hidden_layers": ...,
        "max_position_embeddings": ...,
    }),
    "DeepseekV2ForCausalLM": Special({**MLA, "topk_method": "greedy"}),
    "DeepseekV3ForCausalLM": Special(MLA, SIGMOID),
    "DeepseekV32ForCausalLM": Special(
        {**MLA, **INDEXED}, SIGMOID, settings={"add_bos_token": True}
    ),
    "Dots1ForCausalLM": Special({"num_key_value_heads": 4}, SIGMOID),
    "Ernie4_5_MoeForCausalLM": Special({"moe_num_shared_experts": 1}),
    "Exaone4ForCausalLM": Special({**NO_WINDOW, "layer_types": ["full_attention"] * 4}),
    "ExaoneMoeForCausalLM": Special({}, SIGMOID),
    "FalconForCausalLM": Special({"head_dim": ..., "num_kv_heads": 1}),
    "FalconH1ForCausalLM": Special({**_mamba(), "mamba_d_ssm": 512}, {"head_dim": 64}),
    "Gemma2ForCausalLM": Special(GEMMA, tokenizer="gemma"),
    "Gemma3ForCausalLM": Special({**GEMMA, "num_hidden_layers": 6}, tokenizer="gemma"),
    "Gemma3ForConditionalGeneration": Special(
        {"text_config": {**GEMMA, "num_hidden_layers": 6}, "vision_config": VISION,
         "mm_tokens_per_image": 4}, tokenizer="gemma"
    ),
    "Gemma4ForConditionalGeneration": Special(
        {"text_config": GEMMA4, "vision_config": VISION, "audio_config": None}, tokenizer="gemma",
        gain=1.0, factors=QUERIES,
    ),
    "Gemma4UnifiedForConditionalGeneration": Special(
        {"text_config": GEMMA4}, {"moe_intermediate_size": None, "num_kv_shared_layers": 0},
        tokenizer="gemma", gain=1.0, factors=QUERIES,
    ),
    "Gemma3nForCausalLM": Special({
        "num_hidden_layers": 10, "num_kv_shared_layers": 5, "vocab_size_per_layer_input": 512,
        "hidden_size_per_layer_input": 256, "laurel_rank": 64,
    }, tokenizer="gemma"),
    "Gemma4ForCausalLM": Special(GEMMA4, tokenizer="gemma", gain=1.0, factors=QUERIES),
    "GemmaForCausalLM": Special(tokenizer="gemma"),
    "Glm4MoeLiteForCausalLM": Special(MLA, {**SIGMOID, "first_k_dense_replace": 1}),
    "GlmMoeDsaForCausalLM": Special({**MLA, **INDEXED}, {**SIGMOID, "first_k_dense_replace": 1}),
    "GraniteForCausalLM": Special(GRANITE),
    "GraniteMoeForCausalLM": Special(GRANITE),
    "GraniteMoeSharedForCausalLM": Special({**GRANITE, "shared_intermediate_size": 256}),
    "GraniteMoeSWAForCausalLM": Special(GRANITE),
    "GraniteSWAForCausalLM": Special(GRANITE),
    "GraniteMoeHybridForCausalLM": Special({
        **GRANITE, **_mamba(), "layer_types": ["mamba", "attention", "mamba", "attention"],
        "shared_intermediate_size": 512,
    }),
    "HYV4ForCausalLM": Special(
        {**MLA, **INDEXED}, renamed={
            "hc_pre.hc_head.": "hc_head.", "hc_pre.hc_attn_layer.hc_": "hc_attn_layer.hc_pre.hc_",
            "hc_pre.hc_mlp_layer.hc_": "hc_mlp_layer.hc_pre.hc_",
            "mlp.linear_gate": "mlp.gate_proj",
            "shared_experts.linear_gate": "shared_experts.gate_proj",
        }
    ),
    "HunYuanMoEV1ForCausalLM": Special(raw={
        "moe_intermediate_size": [512] * 4, "moe_topk": [2] * 4, "num_shared_expert": [1] * 4,
    }),
    "KimiLinearForCausalLM": Special({
        **MLA, "q_lora_rank": None, "linear_head_dim": 64, "linear_num_heads": 4,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    }, {"linear_attn_config": {"full_attn_layers": [4], "kda_layers": [1, 2, 3], "head_dim": 64,
                               "num_heads": 4, "short_conv_kernel_size": 4},
        "num_shared_experts": 1, "first_k_dense_replace": 1,
        "moe_router_activation_func": "sigmoid"},
        renamed={"layers.0.block_sparse_moe.": "layers.0.mlp."}),
    "Lfm2ForCausalLM": Special({
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    }),
    "Lfm2MoeForCausalLM": Special({
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    }),
    "LlamaForCausalLM": Special(tokenizer="spm"),
    "MambaForCausalLM": Special(gain=0.8),
    "NemotronForCausalLM": Special(gain=1.0),  # its activation is a square
    "Mamba2ForCausalLM": Special({"num_heads": 8, "n_groups": 1, "state_size": 64,
                                  "chunk_size": 32}),
    "MiniCPM3ForCausalLM": Special(MLA, tokenizer="spm"),
    "MistralForCausalLM": Special(NO_WINDOW, tokenizer="spm"),
    "MixtralForCausalLM": Special(NO_WINDOW, tokenizer="spm"),
    "NemotronHForCausalLM": Special({
        "mamba_num_heads": 8, "n_groups": 1, "ssm_state_size": 64, "chunk_size": 32,
        "moe_shared_expert_intermediate_size": 512,
        "hybrid_override_pattern": "MEM*E",
    }),
    "OlmoeForCausalLM": Special({"num_key_value_heads": 4}),
    "PhiForCausalLM": Special({"num_key_value_heads": 4, "intermediate_size": 1024}),
    "Qwen3MoeForCausalLM": Special({"norm_topk_prob": True}),
    "SolarOpenForCausalLM": Special(
        raw={"partial_rotary_factor": 1.0, "first_k_dense_replace": 0}
    ),
    "Ministral3ForCausalLM": Special(NO_WINDOW),
    "Starcoder2ForCausalLM": Special(NO_WINDOW),
    "JambaForCausalLM": Special({"attn_layer_period": 2, "attn_layer_offset": 1}),
    "LagunaForCausalLM": Special({"layer_types": ["full_attention"] + ["sliding_attention"] * 3}),
    "MellumForCausalLM": Special({
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        # llama.cpp has one base for all layers.
        "rope_parameters": {k: {"rope_type": "default", "rope_theta": 10000.0}
                            for k in ("sliding_attention", "full_attention")},
    }),
    "MiniMaxM2ForCausalLM": Special(raw={"rotary_dim": 64, **SIGMOID}),
    "Phi3ForCausalLM": Special(NO_WINDOW, settings={"tokenizer_class": "GPT2Tokenizer"}),
    "YoutuForCausalLM": Special(MLA),
}  # fmt: skip
