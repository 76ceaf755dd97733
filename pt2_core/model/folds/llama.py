"""Blocks of Llama's names: attention of four projections, a gated MLP or a plain one, any norms.

Norms before a branch, behind it, or both; q and k norms, of a head or over all heads, stand still
because q and k do. RMSNorm, LayerNorm and norms of ``1 + weight`` treat every channel alike.
"""

from pt2_core.model.folds.family import Family, below

LAYER = "model.layers.*."
ATTENTION = LAYER + "self_attn."
NORMS = (
    "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm "
    "attention_layernorm feedforward_layernorm"
)
TABLES = ("model.embed_tokens", "lm_head")
READERS = (*TABLES, *below(ATTENTION, "q_proj k_proj v_proj"))
WRITERS = ("model.norm", ATTENTION + "o_proj", *below(LAYER, NORMS))
HEADS = {ATTENTION + "o_proj": ATTENTION + "v_proj"}
STILL = below(ATTENTION, "q_norm k_norm query_layernorm key_layernorm rotary_emb.inv_freq")
GATED = below(LAYER + "mlp.", "gate_proj up_proj")

FAMILY = Family(
    model_types=(
        "llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "gemma", "gemma2",
        "gemma3_text", "olmo", "olmo2", "olmo3", "cohere", "cohere2", "stablelm", "exaone4",
        "seed_oss", "helium", "hunyuan_v1_dense", "ernie4_5", "ministral3", "arcee", "nemotron",
        "apertus",
    ),
    columns=(*READERS, *GATED),
    rows=(*WRITERS, LAYER + "mlp.down_proj"),
    heads=HEADS,
    free={LAYER + "mlp.down_proj": GATED},
    still=(*STILL, *below(LAYER + "mlp.act_fn.", "alpha_n alpha_p beta eps")),
)  # fmt: skip
