"""Fused projections: gate and up in one tensor (Phi-3, GLM), and q, k and v in one (Phi-3)."""

from pt2_core.model.folds.family import Family
from pt2_core.model.folds.llama import ATTENTION, LAYER, STILL, TABLES, WRITERS

MLP = LAYER + "mlp."
QKV, FUSED = ATTENTION + "qkv_proj", MLP + "gate_up_proj"

FAMILY = Family(
    model_types=("phi3",),
    columns=(*TABLES, QKV, FUSED),
    rows=(*WRITERS, MLP + "down_proj"),
    heads={ATTENTION + "o_proj": QKV + ":v"},
    free={MLP + "down_proj": (FUSED + ":1/2", FUSED + ":2/2")},
    still=STILL,
)
