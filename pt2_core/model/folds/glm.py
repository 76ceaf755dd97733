"""GLM: Llama's attention, gate and up in one tensor, and norms behind the branches as well."""

from pt2_core.model.folds.family import Family, below
from pt2_core.model.folds.llama import HEADS, LAYER, READERS, STILL, WRITERS

MLP = LAYER + "mlp."
FUSED = MLP + "gate_up_proj"

FAMILY = Family(
    model_types=("glm", "glm4"),
    columns=(*READERS, FUSED),
    rows=(
        *WRITERS, MLP + "down_proj", *below(LAYER, "post_self_attn_layernorm post_mlp_layernorm"),
    ),
    heads=HEADS,
    free={MLP + "down_proj": (FUSED + ":1/2", FUSED + ":2/2")},
    still=STILL,
)  # fmt: skip
