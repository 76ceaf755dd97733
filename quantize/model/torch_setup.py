"""What a run has to compute with: the device, arithmetic that repeats to the bit, versions."""

from __future__ import annotations

import quantize.model.waiting  # noqa: F401  before torch is loaded

# isort: split

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

import torch

from pt2_core.errors import PT2Error

FILL = "fill_uninitialized_memory"  # a property of torch's module that type checkers do not see


def versions() -> dict[str, str]:
    """Versions of what the bytes depend on."""
    names = ("torch", "transformers", "safetensors", "pt2-llm")
    return {"python": platform.python_version(), **{n: _version(n) for n in names}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # ourselves, run from a checkout that is not installed
        return "not installed"


@contextmanager
def arithmetic(threads: int) -> Iterator[int]:
    """Full-precision, repeatable arithmetic while inside; yields the number of CPU threads."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = (
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        getattr(torch.utils.deterministic, FILL),
    )
    try:
        if threads:
            torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Deterministic mode would fill every new tensor; ours are always written before use.
        setattr(torch.utils.deterministic, FILL, False)
        with torch.no_grad():
            yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])
        torch.use_deterministic_algorithms(before[2], warn_only=before[3])
        setattr(torch.utils.deterministic, FILL, before[4])


def pick_device(name: str) -> str:
    """``auto`` to ``cuda`` or ``cpu``; PT2Error where CUDA is asked for and missing."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise PT2Error("--device cuda: torch sees no CUDA device here; use --device cpu")
    return name
