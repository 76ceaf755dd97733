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
    "HrmTextForCausalLM": "its blocks are two stacks that are run in turns: not one list of blocks",
    "MiMoV2FlashForCausalLM": "the converter reads rope and window settings by names that "
                              "transformers 5 does not write",
    "Qwen4ExpForCausalLM": "no tiny config yet: its n-gram tables and hyper-connections",
}  # fmt: skip

# A dozen that between them have nearly everything: for make quick.
QUICK = (
    "LlamaForCausalLM", "Phi3ForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel",
    "CohereForCausalLM", "GPTNeoXForCausalLM", "Exaone4ForCausalLM", "GptOssForCausalLM",
    "DbrxForCausalLM", "Glm4MoeForCausalLM", "FalconH1ForCausalLM", "GraniteMoeForCausalLM",
)  # fmt: skip
