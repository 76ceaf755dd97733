"""Which tensors of a model's files do not count, from their names and dtypes alone.

The rule in full is what transformers' class for the model expects (:mod:`pt2_core.model.expected`);
this is the part that needs no torch: remains of adapters and of quantisers are refused, buffers and
heads of other tasks are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from pt2_core.errors import PT2Error
from pt2_core.safetensors_file import TensorInfo

FLOATS = ("F32", "F16", "BF16")
# Last parts of the names that quantisers give to what they store beside or in place of a weight.
_PACKED = re.compile(
    r"(^|[._])(qweight|qzeros|scales|scales?_inv|g_idx|zero_points?|"
    r"weight_(packed|scales?|scale_inv|scale_2|shape|zero_point|format|g_idx|global_scale)|"
    r"(?<=\.)(input|output|k|v)_scales?(_ub|_inv)?|input_(global_scale|zero_point)|"
    r"(nested_)?(absmax|quant_map)|quant_state(\..*)?|SCB|codebooks?|W_q|"
    r"(proj|weight|lm_head)[._]_?(scales?|zeros|codes|data|qdata|packed|blocks|trellis|su|sv|suh|"
    r"svh|mcg|mul1|CB|SZ|meta))$"
)
_ADAPTER = re.compile(
    r"(^|[._])(lora_[A-Za-z_]+|lora|ia3_l|hada_w\d_[ab]|lokr_w\d(_[ab])?|oft_[rs]|boft_[rs]|"
    r"vera_lambda_[bd]|base_layer|modules_to_save|adapters?|prompt_encoder|prompt_embeddings|"
    r"prefix_encoder)(\.|$)"
)
_BUFFER = re.compile(
    r"(^|\.)(inv_freq|original_inv_freq|cos_cached|sin_cached|freqs_cis|position_ids|masked_bias|"
    r"causal_mask|rotary_emb\.[^.]+)$"
)
_OTHER_HEAD = re.compile(
    r"(v_head|value_head|reward_head|rank_head|regression_head|score|classifier|qa_outputs|"
    r"summary|medusa_head|mtp|eagle|draft)s?(\.|$)"
)


def check_leftovers(path: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Tensor name -> why it does not count.

    Raises:
        PT2Error: parts of an adapter, weights that are quantised already, or weights that are not
            of a floating type.
    """
    dropped: dict[str, str] = {}
    for name, info in tensors.items():
        if _ADAPTER.search(name):
            raise PT2Error(
                f"{path} holds parts of an adapter ({name}): merge it into the model first "
                "(peft: merge_and_unload, then save_pretrained)"
            )
        if is_buffer(name):
            dropped[name] = "a buffer that transformers computes"
        elif _OTHER_HEAD.match(name.removeprefix("model.").removeprefix("pretrained_model.")):
            dropped[name] = "a head of another task"
        elif _PACKED.search(name) or info.dtype not in (*FLOATS, "F64"):
            what = name if info.dtype in FLOATS else f"{name} of type {info.dtype}"
            raise PT2Error(
                f"{path} is already quantised ({what}): give the 16-bit model that it was made from"
            )
        elif info.dtype == "F64":
            raise PT2Error(
                f"tensor {name} in {path} is F64; only {', '.join(FLOATS)} can be ternarised: save "
                "the model in one of these first"
            )
    return dropped


def is_buffer(name: str) -> bool:
    """Whether a name is that of a buffer, which transformers computes and does not load."""
    return _BUFFER.search(name) is not None


def check_layers(path: Path, names: Iterable[str], stack: str, layers: int) -> None:
    """Raise PT2Error unless the files hold as many decoder blocks as ``num_hidden_layers`` says.

    Args:
        names: of the files' tensors.
        stack: the list of decoder blocks, ``model.layers``.
    """
    pattern = re.compile(rf"(^|\.){re.escape(stack)}\.(\d+)\.")
    found = {int(m[2]) for n in names if (m := pattern.search(n))}
    missing = [i for i in range(layers) if i not in found]
    if not found or (not missing and max(found) < layers):
        return
    says = f"{path / 'config.json'} says num_hidden_layers {layers}, but the files hold"
    if max(found) + 1 > layers:
        raise PT2Error(
            f"{says} {max(found) + 1} decoder blocks: give the config.json that belongs to them"
        )
    raise PT2Error(f"{says} {len(found)} decoder blocks: {stack}.{missing[0]} is missing")


def in_words(dropped: Mapping[str, str]) -> list[str]:
    """One line for each reason: how many tensors, and one of their names."""
    lines = []
    for why in dict.fromkeys(dropped.values()):
        names = [n for n, w in dropped.items() if w == why]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"dropped {names[0]}{more}: {why}")
    return lines
