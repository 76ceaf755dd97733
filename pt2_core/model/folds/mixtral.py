"""Llama's attention and Mixtral's experts: w1 and w3 make the input of w2."""

from pt2_core.model.folds.family import Family, below
from pt2_core.model.folds.llama import HEADS, LAYER, READERS, STILL, WRITERS

MOE = LAYER + "block_sparse_moe."
GATED = below(MOE + "experts.*.", "w1 w3")

FAMILY = Family(
    model_types=("mixtral", "phimoe", "minimax_m2"),
    columns=(*READERS, MOE + "gate", *GATED),
    rows=(*WRITERS, MOE + "experts.*.w2"),
    heads=HEADS,
    free={MOE + "experts.*.w2": GATED},
    still=(*STILL, MOE + "e_score_correction_bias"),
)
