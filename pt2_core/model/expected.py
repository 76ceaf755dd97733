"""Which tensors a model must have: what transformers' own class for it expects.

The class is built on the meta device, where it costs no memory; its parameters' names and shapes
are the rule, and transformers' own conversion of checkpoints says which tensors they are made of
(:mod:`pt2_core.model.layout`). What the files hold beyond them is dropped where it stands apart
from the model (a head of another task, the tower of a model that sees), and refused where it would
take part in the arithmetic.
"""

from __future__ import annotations

import re
from typing import Any

from pt2_core.errors import PT2Error
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.model.layout import TEXT_PART, Layout
from pt2_core.model.settings import CONFIG, TIE

SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size",
         "num_key_value_heads")  # fmt: skip


def load_config(checkpoint: Checkpoint) -> Any:
    """transformers' config of the settings that count; of a model of parts, that of its text.

    Raises:
        PT2Error: transformers knows no such model or cannot use the settings, or sizes are no whole
            numbers above 0.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    where = checkpoint.path / CONFIG
    kind = str(checkpoint.settings.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise PT2Error(
            f"{where} names the architecture {checkpoint.architecture or '(none)'} of model_type "
            f"{kind!r}, which transformers does not know"
        )
    try:
        whole = type(AutoConfig.for_model(kind)).from_dict(dict(checkpoint.settings))
        config = whole.get_text_config(decoder=True)
        if config is not whole and TIE in checkpoint.settings:
            config.tie_word_embeddings = checkpoint.settings[TIE]
        config._experts_implementation = "eager"  # each expert by itself, so that it can be seen
        sizes = [getattr(config, n, 1) for n in SIZES]
    except Exception as e:  # transformers raises whatever its fields' checks raise
        raise PT2Error(f"transformers cannot use {where}: {e}") from e
    if not all(_positive(s) for s in sizes):
        raise PT2Error(
            f"{where}: layers, widths, heads and vocabulary must be whole numbers above 0"
        )
    return config


def _positive(value: Any) -> bool:
    """A size, or one a layer."""
    if isinstance(value, list | tuple):
        return all(_positive(v) for v in value)
    return value is None or (isinstance(value, int) and value > 0)


def meta_model(config: Any, where: Any) -> Any:
    """transformers' causal LM for a config, without memory for its weights.

    Attention is sdpa's; eager where the class does not have it.

    Raises:
        PT2Error: transformers has no causal LM for it, or cannot build it.
    """
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise PT2Error(
            f"{where} has the model_type {config.model_type!r}, for which transformers has no "
            "causal language model"
        )
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    kind = kind[0] if isinstance(kind, tuple) else kind
    config._attn_implementation = "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    except Exception as e:  # a class of transformers raises whatever its layers' checks raise
        raise PT2Error(f"transformers cannot build the model of {where}: {e}") from e


def settle(checkpoint: Checkpoint, config: Any, model: Any = None) -> Layout:
    """Let exactly those tensors count that transformers' class takes; idempotent.

    Args:
        model: of :func:`meta_model`, where it is there already.

    Raises:
        PT2Error: one is missing or of another shape, or there is one more in the model itself.
    """
    where = checkpoint.path / CONFIG
    model = meta_model(config, where) if model is None else model
    try:
        layout = Layout(model, {n: t.shape for n, t in checkpoint.tensors.items()})
    except PT2Error as e:
        raise PT2Error(f"{checkpoint.path}: {e}") from e
    parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    ignored = _patterns(model, "_keys_to_ignore_on_load_missing")
    lost = [n for n in layout.missing if n in parameters and not ignored(n)]
    if lost:
        _refuse_missing(checkpoint, model, lost[0])
    _drop_extra(checkpoint, model, layout)
    return layout


def _refuse_missing(checkpoint: Checkpoint, model: Any, name: str) -> None:
    head = model.get_output_embeddings()
    if head is not None and name.startswith(_name_of(model, head) + "."):
        raise PT2Error(
            f"{checkpoint.path} has no tensor {name}, and config.json does not tie the head to the "
            "embeddings (tie_word_embeddings): give the missing file, or set it to true if "
            "the model was trained so"
        )
    raise PT2Error(f"{checkpoint.path} has no tensor {name}")


def _name_of(model: Any, module: Any) -> str:
    return next((n for n, m in model.named_modules() if m is module), "")


def _drop_extra(checkpoint: Checkpoint, model: Any, layout: Layout) -> None:
    """Drop what stands apart, refuse what does not."""
    kind = type(model).__name__
    unused = _patterns(model, "_keys_to_ignore_on_load_unexpected")
    parts = "text_config" in checkpoint.settings
    taken = [n for n in checkpoint.tensors if n not in set(layout.extra)]
    roots = {n.partition(".")[0] for n in taken}
    text = any(TEXT_PART in n for n in taken)
    gone: dict[str, str] = {}
    for name in layout.extra:
        if parts and (TEXT_PART not in name if text else name.partition(".")[0] not in roots):
            gone[name] = "it is not of the text model, which alone is ternarised"
        elif unused(name) or name.partition(".")[0] not in roots:
            gone[name] = f"{checkpoint.architecture or kind} does not use it"
        else:
            raise PT2Error(
                f"{checkpoint.path} holds {name}, which {checkpoint.architecture or kind} as "
                f"{CONFIG} describes it does not use: give the {CONFIG} that belongs to the weights"
            )
    checkpoint.drop(gone)


def _patterns(model: Any, attribute: str) -> Any:
    """Whether a name is among those that a class lists in one of its attributes."""
    patterns = [re.compile(p) for p in getattr(model, attribute, None) or ()]
    return lambda name: any(p.search(name) for p in patterns)
