"""StarCoder 2: Llama's attention and an MLP of two layers under GPT's names."""

from pt2_core.model.folds.family import Family
from pt2_core.model.folds.llama import HEADS, LAYER, READERS, STILL, WRITERS

FAMILY = Family(
    model_types=("starcoder2",),
    columns=(*READERS, LAYER + "mlp.c_fc"),
    rows=(*WRITERS, LAYER + "mlp.c_proj"),
    heads=HEADS,
    free={LAYER + "mlp.c_proj": (LAYER + "mlp.c_fc",)},
    still=STILL,
)
