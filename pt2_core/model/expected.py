"""Which tensors a model must have: what transformers' own class for it expects.

The class is built on the meta device, where it costs no memory; its parameters' names and shapes
are the rule. What the files hold beyond them is dropped where it stands apart from the model (a
head of another task), and refused where it would take part in the arithmetic.
"""

from __future__ import annotations

from typing import Any

from pt2_core.errors import PT2Error
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.model.settings import CONFIG


def load_config(checkpoint: Checkpoint) -> Any:
    """transformers' config of the settings that count.

    Raises:
        PT2Error: transformers cannot use them, or sizes are no whole numbers above 0.
    """
    from transformers import AutoConfig

    where = checkpoint.path / CONFIG
    kind = str(checkpoint.settings.get("model_type"))
    try:
        config = type(AutoConfig.for_model(kind)).from_dict(dict(checkpoint.settings))
        config._attn_implementation = "sdpa"
        sizes = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads,
                 config.vocab_size, config.num_key_value_heads)  # fmt: skip
    except Exception as e:  # transformers raises whatever its fields' checks raise
        raise PT2Error(f"transformers cannot use {where}: {e}") from e
    if not all(isinstance(s, int) and s > 0 for s in sizes):
        raise PT2Error(
            f"{where}: layers, widths, heads and vocabulary must be whole numbers above 0"
        )
    return config


def expected_tensors(config: Any) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape of transformers' class for a config, the tied head left out."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = model.all_tied_weights_keys
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    return {n: s for n, s in shapes.items() if n not in tied}


def settle(checkpoint: Checkpoint, config: Any) -> None:
    """Let exactly those tensors count that transformers' class expects; idempotent.

    Raises:
        PT2Error: one is missing or of another shape, or there is one more in the model itself.
    """
    where = checkpoint.path / CONFIG
    try:
        expected = expected_tensors(config)
    except Exception as e:  # a class of transformers raises whatever its layers' checks raise
        raise PT2Error(f"transformers cannot build the model of {where}: {e}") from e
    for name, shape in expected.items():
        info = checkpoint.info(name)
        if info.shape != shape:
            raise PT2Error(
                f"tensor {name} in {checkpoint.path / checkpoint.home[name]} has shape "
                f"{list(info.shape)}, but config.json asks for {list(shape)}"
            )
    roots = {name.partition(".")[0] for name in expected}
    extra = [n for n in checkpoint.tensors if n not in expected]
    for name in extra:
        if name.partition(".")[0] in roots:
            raise PT2Error(
                f"{checkpoint.path} holds {name}, which {checkpoint.architecture} as {where.name} "
                f"describes it does not use: give the {where.name} that belongs to the weights"
            )
    checkpoint.drop(dict.fromkeys(extra, f"{checkpoint.architecture} does not use it"))
