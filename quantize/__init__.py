"""Ternarise Hugging Face language models: ``quantize.ternarize(model_dir, out_dir, config)``.

The names below are loaded when first used, so that importing a light module of this package does
not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pt2_core.artifact.folder import Artifact
    from quantize.config import Config, load_recipe
    from quantize.pipeline import ternarize

__all__ = ["Artifact", "Config", "load_recipe", "ternarize"]

_HOME = {
    "Artifact": "pt2_core.artifact.folder",
    "Config": "quantize.config",
    "load_recipe": "quantize.config",
    "ternarize": "quantize.pipeline",
}


def __getattr__(name: str) -> Any:  # PEP 562
    if name not in _HOME:
        raise AttributeError(f"module 'quantize' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
