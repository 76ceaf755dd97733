"""Phi-1 and Phi-2: attention and MLP side by side behind one LayerNorm."""

from pt2_core.model.folds.family import Family
from pt2_core.model.folds.llama import ATTENTION, LAYER, READERS, STILL

FC1, FC2, OUT = LAYER + "mlp.fc1", LAYER + "mlp.fc2", ATTENTION + "dense"

FAMILY = Family(
    model_types=("phi",),
    columns=(*READERS, FC1),
    rows=("model.final_layernorm", LAYER + "input_layernorm", OUT, FC2),
    heads={OUT: ATTENTION + "v_proj"},
    free={FC2: (FC1,)},
    still=STILL,
)
