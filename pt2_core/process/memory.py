"""Recognise that memory ran out, by what torch, NumPy and the system call it; imports none of them.

An allocation that fails is a MemoryError, a RuntimeError of torch, an ImportError of a library that
cannot be mapped, or an OSError, depending on who asked.
"""

from __future__ import annotations

import errno
import re

_NAMES = ("OutOfMemoryError", "_ArrayMemoryError")
_GPU = re.compile(r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|"
                  r"CUDNN_STATUS_ALLOC_FAILED|HIP out of memory")  # fmt: skip
_CPU = re.compile(
    r"can't allocate memory|not enough memory|[Cc]annot allocate memory|std::bad_alloc|"
    r"failed to map segment from shared object|can't start new thread"
)


def out_of_memory(error: BaseException) -> str | None:
    """``cpu`` or ``gpu`` where an exception, or the one behind it, says that memory ran out."""
    at: BaseException | None = error
    for _ in range(20):
        if at is None:
            break
        if (where := _where(at)) is not None:
            return where
        at = at.__cause__
    return None


def _where(error: BaseException) -> str | None:
    text = str(error)
    if type(error).__name__ == _NAMES[0] or (isinstance(error, RuntimeError) and _GPU.search(text)):
        return "gpu"
    if isinstance(error, MemoryError) or type(error).__name__ in _NAMES:
        return "cpu"
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return "cpu"
    if isinstance(error, RuntimeError | ImportError | OSError) and _CPU.search(text):
        return "cpu"
    return None
