"""Granite's experts: one tensor of three dimensions for gate and up, one for down."""

from pt2_core.model.folds.family import Family
from pt2_core.model.folds.llama import HEADS, LAYER, READERS, STILL, WRITERS

MOE = LAYER + "block_sparse_moe."
FUSED, SHARED = MOE + "input_linear", LAYER + "shared_mlp."

FAMILY = Family(
    model_types=("granitemoe", "granitemoeshared"),
    columns=(*READERS, MOE + "router.layer", FUSED, SHARED + "input_linear"),
    rows=(*WRITERS, MOE + "output_linear", SHARED + "output_linear"),
    heads=HEADS,
    free={
        MOE + "output_linear": (FUSED + ":1/2", FUSED + ":2/2"),
        SHARED + "output_linear": (SHARED + "input_linear:1/2", SHARED + "input_linear:2/2"),
    },
    still=STILL,
)
