"""Turn an artifact of ``pt2-quantize`` into a GGUF file for llama.cpp.

``export_gguf(artifact_dir, out_path, config)`` does the whole of it; the command is
``pt2-export``. Names are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.config import ExportConfig
    from export.pipeline import ExportReport, export_gguf

__all__ = ["ExportConfig", "ExportReport", "export_gguf"]

_HOME = {
    "ExportConfig": "export.config",
    "ExportReport": "export.pipeline",
    "export_gguf": "export.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'export' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
