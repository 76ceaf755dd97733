"""``config.json`` made true to the files beside it. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pt2_core.errors import PT2Error
from pt2_core.files import read_json
from pt2_core.model.tokenizer_files import refuse_code

CONFIG = "config.json"
TIE = "tie_word_embeddings"
FLOAT_TAG = "__float__"  # transformers' mark of a float that JSON has not
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id")
_QUANTISED = ("quantization_config", "compression_config", "quantization")


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` as it stands.

    Raises:
        PT2Error: it is missing, broken, or asks for Python code of the folder.
    """
    if not (path / CONFIG).is_file():
        if (path / "adapter_config.json").is_file():
            raise PT2Error(
                f"{path} is an adapter, not a model: merge it into its base model first "
                "(peft: merge_and_unload, then save_pretrained)"
            )
        raise PT2Error(f"{path} has no {CONFIG}: it is not a Hugging Face model")
    config = read_json(path / CONFIG)
    if not isinstance(config, dict):
        raise PT2Error(f"{path / CONFIG} does not hold a model's settings")
    refuse_code(path / CONFIG)
    return {key: _plain_floats(value) for key, value in config.items()}


def _plain_floats(value: Any) -> Any:
    """A value with the floats that transformers writes as ``{"__float__": "Infinity"}``."""
    if isinstance(value, list):
        return [_plain_floats(v) for v in value]
    if isinstance(value, dict):
        if set(value) == {FLOAT_TAG} and isinstance(value[FLOAT_TAG], str):
            return float(value[FLOAT_TAG])
        return {k: _plain_floats(v) for k, v in value.items()}
    return value


def architecture_of(config: Mapping[str, Any]) -> str:
    """The first entry of ``architectures``; empty if there is none."""
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else ""
    return first if isinstance(first, str) else ""


def clean_settings(path: Path, raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings that count, and one line for each thing that was dropped or filled in.

    The tie flag is left for :func:`pt2_core.model.tied_tables.decide_tied`.
    """
    settings, notes = dict(raw), []
    for key in _QUANTISED:
        if settings.pop(key, None):
            notes.append(f"dropped {key} of {CONFIG}: the weights are not quantised")
    settings.pop("auto_map", None)
    if not isinstance(settings.get("_name_or_path", ""), str):
        notes.append(f"dropped _name_or_path of {CONFIG}: not text")
        del settings["_name_or_path"]
    vocab = settings.get("vocab_size")
    for key in _TOKEN_IDS:
        if key in settings:
            kept = _valid_ids(settings[key], vocab)
            if kept != settings[key]:
                notes.append(
                    f"dropped {key} {settings[key]} of {CONFIG}: no id in a vocabulary of {vocab}"
                )
                settings[key] = kept
    return settings, notes


def tie_flag(path: Path, config: Mapping[str, Any]) -> bool | None:
    """Whether ``config.json`` asks for one table; None where it is silent.

    Raises:
        PT2Error: it is neither true nor false.
    """
    flag = config.get(TIE)
    if flag is not None and not isinstance(flag, bool):
        raise PT2Error(f"{path / CONFIG}: {TIE} must be true or false, not {flag!r}")
    return flag


def _valid_ids(value: Any, vocab: Any) -> Any:
    """An id, or a list of ids, without those that no token has; None where none is left."""
    if isinstance(value, list):
        return [v for v in value if _valid_ids(v, vocab) is not None] or None
    if value is None or not isinstance(value, int) or isinstance(value, bool):
        return None
    if value < 0 or (isinstance(vocab, int) and value >= vocab):
        return None
    return value
