"""Llama's attention, and experts of their own gate, up and down beside shared ones and a router.

Every expert has an order of its own for the input of its down projection.
"""

from pt2_core.model.folds.family import Family, below
from pt2_core.model.folds.llama import HEADS, LAYER, READERS, STILL, WRITERS

MLP = LAYER + "mlp."
BLOCKS = ("experts.*.", "shared_expert.", "shared_experts.", "shared_mlp.", "")
GATED = {f"{MLP}{b}down_proj": below(MLP + b, "gate_proj up_proj") for b in BLOCKS}

FAMILY = Family(
    model_types=(
        "olmoe", "qwen2_moe", "qwen3_moe", "glm4_moe", "dots1", "hunyuan_v1_moe", "ernie4_5_moe",
    ),
    columns=(
        *READERS, *below(MLP, "gate gate.wg shared_expert_gate"),
        *(writer for writers in GATED.values() for writer in writers),
    ),
    rows=(*WRITERS, *GATED),
    heads=HEADS,
    free=GATED,
    still=(*STILL, *below(MLP, "gate.e_score_correction_bias moe_statics.e_score_correction_bias")),
)  # fmt: skip
