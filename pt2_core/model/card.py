"""Model card and ``generation_config.json``, cleaned for llama.cpp's converter.

Neither is needed to convert a model, and both are written by hand: a value that the converter could
not store is dropped and named, and a file that cannot be read is left out.
"""

from __future__ import annotations

import json
import math
from typing import Any

import yaml

CARD, GENERATION = "README.md", "generation_config.json"
_BASES = ("base_model", "base_models", "base_model_sources")
_DATASETS = ("datasets", "dataset", "dataset_sources")
_LISTS = ("tags", "pipeline_tag", "languages", "language")
_OWN = ("name", "author", "version", "organization", "description", "finetune", "basename",
        "size_label", "url", "doi", "uuid", "repo_url")  # fmt: skip
_TEXTS = (*_OWN, *(f"model_{k}" for k in _OWN), "model_creator", "model_type", "license",
          "license_name", "license_link")  # fmt: skip
_COUNTS = ("top_k", "penalty_last_n", "mirostat")
_REALS = ("top_p", "min_p", "xtc_probability", "xtc_threshold", "temperature", "penalty_repeat",
          "repetition_penalty", "mirostat_tau", "mirostat_eta")  # fmt: skip
_NULLS = ("", "~", "null", "Null", "NULL")
_MAX_REAL = 3.4e38  # float32's largest


def clean_card(raw: bytes) -> tuple[str | None, list[str]]:
    """The card with the entries of its head that the converter reads, and what was dropped.

    Every scalar is taken as the text that stands there, so that "no" stays a language and 1.10 a
    version. The text below the head stays as it is.

    Returns:
        (None, reasons) where the card cannot be read at all.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        return None, [f"ignored {CARD}: it is not UTF-8 text (byte {e.start})"]
    lines = text.splitlines()
    if not lines or lines[0].rstrip() != "---":
        return text, []
    ends = [i for i, line in enumerate(lines) if i and line.rstrip() == "---"]
    end = ends[0] if ends else len(lines)
    body = "\n".join(lines[end + 1 :]) + "\n"
    head = "\n".join(lines[1:end]).replace("\t", "  ")
    try:
        # The base loader makes text of every scalar and runs nothing.
        values = yaml.load(head, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        mark = getattr(e, "problem_mark", None)
        where = f" (line {mark.line + 2})" if mark is not None else ""
        return body, [f"ignored the head of {CARD}: it is not valid YAML{where}"]
    if not isinstance(values, dict):
        given = values not in (None, *_NULLS)
        return body, [f"ignored the head of {CARD}: it is no list of entries"] * given
    kept: dict[str, Any] = {}
    notes: list[str] = []
    for key in (*_TEXTS, *_LISTS, *_BASES, *_DATASETS):
        if key not in values:
            continue
        value, whole = _entry(key, values[key])
        if value:
            kept[key] = value
        if not whole:
            notes.append(f"dropped {'a part of ' * bool(value)}{key} in {CARD}: not text")
    if not kept:
        return body, notes
    dumped = "".join(f"{k}: {json.dumps(v, ensure_ascii=False)}\n" for k, v in kept.items())
    return f"---\n{dumped}---\n{body}", notes


def clean_generation(raw: bytes) -> tuple[dict[str, Any] | None, list[str]]:
    """``generation_config.json`` without values that the converter could not store.

    Returns:
        (None, reasons) where it cannot be read at all.
    """
    try:
        values = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None, [f"ignored {GENERATION}: it is not valid JSON"]
    if not isinstance(values, dict):
        return None, [f"ignored {GENERATION}: it holds no settings"]
    kept, notes = dict(values), []
    for key in (*_COUNTS, *_REALS, "sequence"):
        if key not in values:
            continue
        value = values[key]
        good = _setting(key, value)
        if good is None:
            del kept[key]
            if value is not None:
                notes.append(f"dropped {key} {value!r:.40} in {GENERATION}: no usable value")
        else:
            kept[key] = good
    return kept, notes


def _setting(key: str, value: Any) -> Any:
    if key == "sequence":
        return _clean(value) if isinstance(value, str) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    if key in _COUNTS:
        return int(value) if value == int(value) and abs(value) < 1 << 31 else None
    return float(value) if abs(value) < _MAX_REAL else None


def _entry(key: str, value: Any) -> tuple[Any, bool]:
    """What the converter can store of an entry, and whether that is all of it."""
    many = value if isinstance(value, list) else [value]
    given = [v for v in many if v not in _NULLS]
    if key in (*_BASES, *_DATASETS):
        kept = [v for v in map(_described, given) if v]
        return kept, kept == given
    texts = [_clean(v) for v in given if isinstance(v, str)]
    whole = len(texts) == len(given)
    if key in _LISTS or (key == "license" and isinstance(value, list)):
        return texts, whole
    if isinstance(value, list):
        return None, not given
    return (texts[0] if texts else None), whole


def _described(value: Any) -> Any:
    """A model or data set by its name, or described by entries that are text."""
    if isinstance(value, str):
        return _clean(value)
    if not isinstance(value, dict):
        return None
    return {str(k): _clean(v) for k, v in value.items() if isinstance(v, str) and v not in _NULLS}


def _clean(text: str) -> str:
    """Text that survives YAML: line ends and control characters as blanks."""
    return "".join(c if c.isprintable() else " " for c in text).strip()
