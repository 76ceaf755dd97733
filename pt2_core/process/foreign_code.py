"""Python code of a model's folder is never run: said in words, and enforced.

A checkpoint may name classes of its own (``auto_map``) that transformers loads with
``trust_remote_code=True``, which libraries pass on without asking. :func:`forbid` makes that
impossible in this process, whoever passes what; :func:`check_folder` says what a folder asks for.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

from pt2_core.errors import PT2Error

# Names that stand for "whatever tokenizer.json says" in one version of transformers or another.
GENERIC_TOKENIZERS = (
    "PreTrainedTokenizer", "PreTrainedTokenizerFast", "PreTrainedTokenizerBase",
    "TokenizersBackend", "PythonBackend", "SentencePieceBackend",
)  # fmt: skip
_LOADERS = ("get_class_from_dynamic_module", "get_class_in_module", "get_cached_module_file")


class ForeignCode(ValueError):
    """transformers was about to import a module of the model's folder."""


def forbid() -> None:
    """Make transformers of this process refuse every module of a model's folder (idempotent).

    Its loaders of such modules raise :class:`ForeignCode`, the question on the terminal is answered
    with no, and ``trust_remote_code`` is False in every ``from_pretrained`` and ``from_config``.
    """
    from transformers import dynamic_module_utils as utils

    if getattr(utils, "_pt2_forbidden", False):
        return
    replacements: dict[Any, Any] = {getattr(utils, n): _refuse for n in _LOADERS}
    replacements[utils.resolve_trust_remote_code] = _resolve
    for module in [m for n, m in sys.modules.items() if n.split(".")[0] == "transformers"]:
        for name, value in list(vars(module).items()):
            if callable(value) and _in(value, replacements):
                setattr(module, name, replacements[value])
    utils._pt2_forbidden = True  # type: ignore[attr-defined]
    for owner, name in _entrances():
        _without_trust(owner, name)


def _in(value: Any, replacements: dict[Any, Any]) -> bool:
    try:
        return value in replacements
    except TypeError:  # not hashable
        return False


def _entrances() -> list[tuple[Any, str]]:
    """Where a caller may pass ``trust_remote_code``: classes and the names of their methods."""
    import transformers
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    owners = [
        transformers.AutoConfig, transformers.AutoTokenizer, transformers.PretrainedConfig,
        transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase,
        transformers.GenerationConfig, _BaseAutoModelClass,
    ]  # fmt: skip
    for name in ("AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor"):
        try:
            owners.append(getattr(transformers, name))
        except (ImportError, AttributeError):  # without the libraries that these need
            continue
    names = ("from_pretrained", "from_config")
    return [(o, n) for o in owners for n in names if n in vars(o)]


def _without_trust(owner: Any, name: str) -> None:
    given = vars(owner)[name]
    inner = given.__func__ if isinstance(given, classmethod | staticmethod) else given

    @functools.wraps(inner)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "trust_remote_code" in kwargs or owner.__name__.startswith("Auto"):
            kwargs["trust_remote_code"] = False
        return inner(*args, **kwargs)

    kind = type(given) if isinstance(given, classmethod | staticmethod) else None
    setattr(owner, name, kind(call) if kind else call)


def _refuse(*_args: Any, **_kwargs: Any) -> Any:
    raise ForeignCode("the model's folder asks for Python code of its own, which is never run")


def _resolve(
    trust_remote_code: Any = None, model_name: Any = None, has_local_code: bool = False,
    has_remote_code: bool = False, *_args: Any, **_kwargs: Any,
) -> bool:  # fmt: skip
    if has_remote_code and not has_local_code:
        raise ForeignCode(
            f"{model_name} can only be loaded with Python code of its own folder (auto_map), which "
            "is never run: give a model whose classes transformers itself has"
        )
    return False


def check_folder(folder: Path, *, tokenizer: bool = True) -> list[str]:
    """What the settings of a folder ask of its own Python code.

    Args:
        tokenizer: also look at the tokenizer's settings.

    Returns:
        Notes on entries that are ignored because transformers itself has the class.

    Raises:
        PT2Error: a model type or tokenizer that only code in the folder defines.
    """
    notes = []
    config = _settings(folder / "config.json")
    if config.get("auto_map"):
        kind = config.get("model_type")
        if not _knows_model(kind):
            raise PT2Error(
                f"{folder / 'config.json'}: model_type {kind!r} is defined only by Python code of "
                "the folder (auto_map), which is never run: give a model that transformers knows"
            )
        notes.append(_ignored(folder / "config.json", f"transformers has {kind} itself"))
    settings = _settings(folder / "tokenizer_config.json") if tokenizer else {}
    name, wanted = settings.get("tokenizer_class"), settings.get("auto_map")
    if isinstance(wanted, dict):
        wanted = wanted.get("AutoTokenizer")
    if wanted:
        if isinstance(name, str) and not _knows_tokenizer(name):
            raise PT2Error(
                f"{folder / 'tokenizer_config.json'}: tokenizer_class {name!r} is defined only by "
                "Python code of the folder (auto_map), which is never run; if tokenizer.json alone "
                'is right, set "tokenizer_class": "PreTrainedTokenizerFast" and remove auto_map'
            )
        file = folder / "tokenizer_config.json"
        notes.append(_ignored(file, "transformers has the tokenizer itself"))
    return notes


def _ignored(file: Path, why: str) -> str:
    return f"auto_map in {file.name} is ignored: {why}, and Python code of the folder is never run"


def _settings(file: Path) -> dict[str, Any]:
    """A JSON object, or nothing: who needs the file says what is wrong with it."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _knows_model(kind: Any) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return isinstance(kind, str) and kind in CONFIG_MAPPING


def _knows_tokenizer(name: str) -> bool:
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    stem = name.removesuffix("Fast")
    if name in GENERIC_TOKENIZERS:
        return True
    return any(tokenizer_class_from_name(n) is not None for n in (name, stem, stem + "Fast"))
