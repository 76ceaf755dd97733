"""Tiny random models of any decoder that transformers has, for tests that must not know one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

BLOCKS, VOCAB = 4, 512
SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=BLOCKS,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
    num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=128, shared_expert_intermediate_size=128, n_group=1, topk_group=1,
    first_k_dense_replace=1, ffn_dim=256, n_shared_experts=1, linear_num_key_heads=2,
    linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=32, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, sliding_window=16, word_embed_proj_dim=128,
    n_embd=128, n_head=4, n_layer=BLOCKS, n_positions=512, n_inner=256,
)  # fmt: skip
# Streamed without knowing any of them.
_NAMES = """
llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 smollm3 olmo olmo2 olmo3 granite
cohere cohere2 glm glm4 starcoder2 gpt_neox gpt2 opt stablelm exaone4 seed_oss nemotron helium
arcee hunyuan_v1_dense ernie4_5 mixtral qwen2_moe qwen3_moe olmoe gpt_oss granitemoe glm4_moe
phimoe hunyuan_v1_moe ernie4_5_moe minimax_m2 llama4_text qwen3_next qwen3_5_text
qwen3_5_moe_text lfm2 ministral3 apertus
"""
FAMILIES = _NAMES.split()
# One of each kind: post-norms, parallel, fused, transposed, experts of every layout, hybrid.
QUICK = ("gemma2", "phi", "phi3", "gpt2", "mixtral", "gpt_oss", "llama4_text", "qwen3_5_moe_text",
         "lfm2")  # fmt: skip


def small_config(kind: str, **changes: Any) -> Any:
    """A config of one of transformers' model types, made small."""
    from transformers import CONFIG_MAPPING

    make = CONFIG_MAPPING[kind]
    known = make()
    settings = {k: v for k, v in SMALL.items() if hasattr(known, k)}
    types = getattr(known, "layer_types", None)
    if types:
        settings["layer_types"] = (list(dict.fromkeys(types)) * BLOCKS)[:BLOCKS]
    config = make(**{**settings, **changes})
    config._experts_implementation = "eager"
    return config


def small_model(kind: str, folder: Path | None = None, **changes: Any) -> Any:
    """A random model of a model type, float32; written to ``folder`` as bf16 if there is one."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(kind, **changes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.normal_(std=0.08)
            parameter.copy_(parameter.bfloat16())
    if folder is not None:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    return model.eval()
