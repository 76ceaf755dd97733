"""GPT-NeoX and Pythia: q, k and v of one head after the other in one tensor.

The values' rows are no range of it, so that the attention's output keeps its natural order.
"""

from pt2_core.model.folds.family import Family, below

LAYER = "gpt_neox.layers.*."
UP, DOWN = LAYER + "mlp.dense_h_to_4h", LAYER + "mlp.dense_4h_to_h"
NORMS = below(LAYER, "input_layernorm post_attention_layernorm")

FAMILY = Family(
    model_types=("gpt_neox",),
    columns=("gpt_neox.embed_in", "embed_out", LAYER + "attention.query_key_value", UP),
    rows=("gpt_neox.final_layer_norm", *NORMS, LAYER + "attention.dense", DOWN),
    free={DOWN: (UP,)},
    still=below(LAYER + "attention.", "bias masked_bias rotary_emb.inv_freq"),
)
