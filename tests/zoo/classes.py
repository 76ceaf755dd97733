"""Which causal language models both transformers and the pinned llama.cpp's converter know.

The list is read off their sources, so that a new llama.cpp or transformers brings its classes by
itself: the names that ``conversion/*.py`` registers for text models, and the classes of
transformers' mapping for causal language models.
"""

from __future__ import annotations

import ast
from pathlib import Path

REGISTER = "register"
TEXT_MAP = "TEXT_MODEL_MAP"


def registered(source: Path) -> set[str]:
    """The class names for which the converter has a text model.

    Args:
        source: llama.cpp's source tree, with ``conversion``.
    """
    found: set[str] = set()
    for file in sorted((source / "conversion").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found.update(_names(node))
    return found & _text_models(source / "conversion" / "__init__.py")


def _names(node: ast.ClassDef) -> list[str]:
    """The arguments of ``@ModelBase.register(...)`` over a class."""
    calls = [d for d in node.decorator_list if isinstance(d, ast.Call)]
    calls = [d for d in calls if isinstance(d.func, ast.Attribute) and d.func.attr == REGISTER]
    return [a.value for d in calls for a in d.args
            if isinstance(a, ast.Constant) and isinstance(a.value, str)]  # fmt: skip


def _text_models(file: Path) -> set[str]:
    """The keys of the converter's map of text models."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == TEXT_MAP:
            assert isinstance(node.value, ast.Dict)
            return {str(ast.literal_eval(key)) for key in node.value.keys if key is not None}
    raise LookupError(f"{file} has no {TEXT_MAP}")


def causal_classes(source: Path) -> dict[str, str]:
    """Class name -> transformers' model type, of every class that both sides know, sorted.

    A class that several model types share is listed under the type of its own config class.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = registered(source)
    types: dict[str, list[str]] = {}
    for kind, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        for name in names if isinstance(names, list | tuple) else (names,):
            if name in known:
                types.setdefault(name, []).append(kind)
    found = {}
    for name, kinds in sorted(types.items()):
        own = getattr(getattr(transformers, name).config_class, "model_type", kinds[0])
        found[name] = own if own in kinds else kinds[0]
    return found
