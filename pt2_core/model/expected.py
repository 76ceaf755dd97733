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
from pt2_core.model.checkpoint import SAME_TABLE, Checkpoint
from pt2_core.model.layout import TEXT_PART, Layout
from pt2_core.model.leftovers import check_layers
from pt2_core.model.settings import CONFIG, TIE
from pt2_core.model.tied_tables import decide_tied, no_head

SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size",
         "num_key_value_heads")  # fmt: skip


def load_config(checkpoint: Checkpoint) -> Any:
    """transformers' config of the settings that count; of a model of parts, that of its text.

    Settings that the files lack, and that llama.cpp would take otherwise, are filled in.

    Raises:
        PT2Error: transformers knows no such model or cannot use the settings, or sizes are no whole
            numbers above 0.
    """
    from transformers import AutoConfig

    where = checkpoint.path / CONFIG
    kind = _model_type(checkpoint)
    try:
        whole = type(AutoConfig.for_model(kind)).from_dict(dict(checkpoint.settings))
        config = whole.get_text_config(decoder=True)
        if config is not whole and TIE in checkpoint.settings:
            config.tie_word_embeddings = checkpoint.settings[TIE]
        config._experts_implementation = "eager"  # each expert by itself, so that it can be seen
        sizes = [in_all_layers(config, n) for n in SIZES]
    except Exception as e:  # transformers raises whatever its fields' checks raise
        raise PT2Error(f"transformers cannot use {where}: {e}") from e
    if not all(_positive(s) for s in sizes):
        raise PT2Error(
            f"{where}: layers, widths, heads and vocabulary must be whole numbers above 0"
        )
    if config is whole:
        _fill_in(checkpoint, config)
    return config


def _model_type(checkpoint: Checkpoint) -> str:
    """The model's type: as ``config.json`` has it, else that of its architecture.

    Raises:
        PT2Error: transformers knows neither, or they do not belong together.
    """
    import transformers

    where, architecture = checkpoint.path / CONFIG, checkpoint.architecture
    kind = checkpoint.settings.get("model_type")
    known = getattr(transformers, architecture, None) if architecture.isidentifier() else None
    of_class = getattr(getattr(known, "config_class", None), "model_type", None)
    if kind is None and of_class is not None:
        kind = of_class
        checkpoint.fill_in({"model_type": kind})
        checkpoint.notes.append(f"{CONFIG} has no model_type: {kind}, as of its architecture")
    if str(kind) not in transformers.CONFIG_MAPPING or (architecture and of_class is None):
        raise PT2Error(
            f"{where} names the architecture {architecture or '(none)'} and the model_type "
            f"{kind!r}, which the installed transformers {transformers.__version__} does not know"
        )
    if of_class not in (None, kind):
        raise PT2Error(
            f"{where} has model_type {kind!r} and the architecture {architecture}, which do not "
            f"belong together: give the {CONFIG} that belongs to the model"
        )
    return str(kind)


def _fill_in(checkpoint: Checkpoint, config: Any) -> None:
    """Numbers of heads and their width, where they are not what follows from the other sizes."""
    heads = in_all_layers(config, "num_attention_heads")
    width = getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(width, int):
        return
    for key, plain in (("num_key_value_heads", heads), ("head_dim", width // heads)):
        value = in_all_layers(config, key)
        if checkpoint.settings.get(key) is None and value not in (None, plain):
            checkpoint.fill_in({key: value})
            checkpoint.notes.append(f"{CONFIG} has no {key}: {value}, as transformers takes it")


def in_all_layers(config: Any, name: str) -> Any:
    """A setting of a config; None where it has none, or one that differs by layer."""
    differing = getattr(config, "per_layer_attributes", None) or ()
    return None if name in differing else getattr(config, name, None)


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
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    kind = kind[0] if isinstance(kind, tuple) else kind
    config._attn_implementation = "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    except Exception as e:  # a class of transformers raises whatever its layers' checks raise
        raise PT2Error(f"transformers cannot build the model of {where}: {e}") from e


def settle(checkpoint: Checkpoint, config: Any) -> tuple[Any, Layout]:
    """Let exactly those tensors count that transformers' class takes; idempotent.

    Returns:
        (the model on the meta device, which tensors make its parameters)

    Raises:
        PT2Error: one is missing or of another shape, or there is one more in the model itself.
    """
    model = meta_model(config, checkpoint.path / CONFIG)
    layout = _layout(checkpoint, model)
    if not _tie(checkpoint, model, layout):
        config.tie_word_embeddings = False
        model = meta_model(config, checkpoint.path / CONFIG)
        layout = _layout(checkpoint, model)
    for name in (n for n in layout.shapes if n in layout.misshapen):
        tensor, problem = layout.misshapen[name]
        where = checkpoint.path / checkpoint.home[tensor]
        raise PT2Error(f"tensor {tensor} in {where} has shape {problem}")
    parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    ignored = _patterns(model, "_keys_to_ignore_on_load_missing")
    lost = [n for n in layout.missing if n in parameters and not ignored(n)]
    if lost:
        _refuse_missing(checkpoint, model, lost[0])
    _drop_extra(checkpoint, model, layout)
    return model, layout


def _layout(checkpoint: Checkpoint, model: Any) -> Layout:
    try:
        return Layout(model, {n: t.shape for n, t in checkpoint.tensors.items()})
    except PT2Error as e:
        raise PT2Error(f"{checkpoint.path}: {e}") from e


def _tie(checkpoint: Checkpoint, model: Any, layout: Layout) -> bool:
    """Say in the checkpoint whether embeddings and head are one table.

    Returns:
        False where the class ties them and the files hold two that differ.
    """
    head = model.get_output_embeddings()
    if head is None:
        return True
    name = f"{_name_of(model, head)}.weight"
    source = model.all_tied_weights_keys.get(name)
    checkpoint.tied = source is not None
    if source is None or not layout.sources(name) or not layout.sources(source):
        return True
    stored, table = layout.sources(name)[0], layout.sources(source)[0]
    if stored == table:
        return True
    tied, notes = decide_tied(
        checkpoint.path, True, checkpoint.tensors, checkpoint.home, table, stored
    )
    checkpoint.notes += notes
    checkpoint.tied = tied
    if tied:
        checkpoint.drop({stored: SAME_TABLE})
    else:
        checkpoint.settings[TIE] = False
    return tied


def _refuse_missing(checkpoint: Checkpoint, model: Any, name: str) -> None:
    head = model.get_output_embeddings()
    if head is not None and name == f"{_name_of(model, head)}.weight":
        raise PT2Error(no_head(checkpoint.path, name))
    _check_layers(checkpoint, model)
    raise PT2Error(f"{checkpoint.path} has no tensor {name}")


def _check_layers(checkpoint: Checkpoint, model: Any) -> None:
    stacks = [n for n, m in model.named_modules() if type(m).__name__ == "ModuleList"]
    layers = model.config.num_hidden_layers
    for stack in sorted(stacks, key=lambda n: n.count("."))[:1]:
        check_layers(checkpoint.path, checkpoint.tensors, stack, layers)


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
            _check_layers(checkpoint, model)
            raise PT2Error(
                f"{checkpoint.path} holds {name}, which {checkpoint.architecture or kind} as "
                f"{CONFIG} describes it does not use: give the {CONFIG} that belongs to the weights"
            )
    checkpoint.drop(gone)


def _patterns(model: Any, attribute: str) -> Any:
    """Whether a name is among those that a class lists in one of its attributes."""
    patterns = [re.compile(p) for p in getattr(model, attribute, None) or ()]
    return lambda name: any(p.search(name) for p in patterns)
