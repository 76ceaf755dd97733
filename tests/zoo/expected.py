"""Which classes do not go through the whole path, and why: every other one must."""

from __future__ import annotations

AT_LEAST = 60

DRAFT = "a draft model: it runs on the hidden states of the model that it drafts for"
INDEXER = "its blocks hand on the indexer's choice too, which is not streamed yet"
REASONS: dict[str, str] = {
    "BambaForCausalLM": "the converter orders rows for whole heads; Bamba turns half of each",
    "BitNetForCausalLM": "the converter knows other names than transformers' (mlp.ffn_sub_norm)",
    "DeepseekV32ForCausalLM": "the converter asks the tokenizer for add_bos_token, which "
                              "transformers 5 does not keep",
    "DeepseekV4ForCausalLM": "its integer table of experts by token is taken for quantised",
    "Dots3NoteForCausalLM": "no tiny config yet: heads and ranks differ by kind of layer",
    "Gemma3nForCausalLM": "its last blocks use keys and values of earlier ones: not streamed yet",
    "Gemma3nForConditionalGeneration": "its vision tower needs the package timm",
    "Gemma4AssistantForCausalLM": DRAFT,
    "Gemma4UnifiedAssistantForCausalLM": DRAFT,
    "GlmMoeDsaForCausalLM": INDEXER,
    "HYV4ForCausalLM": INDEXER,
    "MiMoV2FlashForCausalLM": "the converter reads rope and window settings by names that "
                              "transformers 5 does not write",
    "Qwen4ExpForCausalLM": "no tiny config yet: its n-gram tables and hyper-connections",
}  # fmt: skip

# A dozen that between them have nearly everything: for make quick.
QUICK = (
    "LlamaForCausalLM", "Qwen3MoeForCausalLM", "MixtralForCausalLM", "Gemma2ForCausalLM",
    "Phi3ForCausalLM", "GPT2LMHeadModel", "CohereForCausalLM", "GPTNeoXForCausalLM",
    "Olmo2ForCausalLM", "Qwen3_5ForCausalLM", "GptOssForCausalLM", "DeepseekV2ForCausalLM",
)  # fmt: skip
