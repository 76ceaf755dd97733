"""Which classes do not go through the whole path, and why: every other one must."""

from __future__ import annotations

AT_LEAST = 60

REASONS: dict[str, str] = {}

# A dozen that between them have nearly everything: for make quick.
QUICK = (
    "LlamaForCausalLM", "Qwen3MoeForCausalLM", "MixtralForCausalLM", "Gemma2ForCausalLM",
    "Phi3ForCausalLM", "GPT2LMHeadModel", "CohereForCausalLM", "GPTNeoXForCausalLM",
    "Olmo2ForCausalLM", "Qwen3_5ForCausalLM", "GptOssForCausalLM", "DeepseekV2ForCausalLM",
)  # fmt: skip
