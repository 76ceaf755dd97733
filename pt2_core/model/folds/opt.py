"""OPT: LayerNorms before attention and MLP, learned positions, biases everywhere."""

from pt2_core.model.folds.family import Family, below

DECODER = "model.decoder."
LAYER = DECODER + "layers.*."
ATTENTION = LAYER + "self_attn."

FAMILY = Family(
    model_types=("opt",),
    columns=(
        *below(DECODER, "embed_tokens embed_positions"), "lm_head",
        *below(ATTENTION, "q_proj k_proj v_proj"), LAYER + "fc1",
    ),
    rows=(
        DECODER + "final_layer_norm", *below(LAYER, "self_attn_layer_norm final_layer_norm"),
        ATTENTION + "out_proj", LAYER + "fc2",
    ),
    heads={ATTENTION + "out_proj": ATTENTION + "v_proj"},
    free={LAYER + "fc2": (LAYER + "fc1",)},
)  # fmt: skip
