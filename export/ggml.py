"""ggml's own quantisers and dequantisers, called in its library through ctypes."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from pt2_core.errors import PT2Error

_CHUNK_VALUES = 1 << 22
_LIBRARIES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")


class _Traits(ctypes.Structure):
    """``struct ggml_type_traits`` of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


class Ggml:
    """libggml-base of one build.

    Args:
        lib_dir: the folder that holds it.

    Raises:
        PT2Error: no library there, or it cannot be loaded.
    """

    def __init__(self, lib_dir: Path) -> None:
        found = [lib_dir / n for n in _LIBRARIES if (lib_dir / n).exists()]
        if not found:
            raise PT2Error(f"{lib_dir} has no {_LIBRARIES[0]}: run pt2-llama build")
        try:
            self._lib = ctypes.CDLL(str(found[0]))
        except OSError as e:
            raise PT2Error(f"cannot load {found[0]} ({e}): run pt2-llama build") from e
        size, int64, pointer = ctypes.c_size_t, ctypes.c_int64, ctypes.c_void_p
        _declare(self._lib.ggml_get_type_traits, ctypes.POINTER(_Traits), ctypes.c_int)
        _declare(self._lib.ggml_row_size, size, ctypes.c_int, int64)
        _declare(self._lib.ggml_quantize_init, None, ctypes.c_int)
        quantize = self._lib.ggml_quantize_chunk
        _declare(quantize, size, ctypes.c_int, pointer, pointer, int64, int64, int64, pointer)

    def check_type(self, type_id: int, name: str, block: int, nbytes: int) -> None:
        """Raise PT2Error unless the library knows ``type_id`` by this name and size."""
        # Ask for the symbol first: an unmodified library has no table entry to look at.
        known = hasattr(self._lib, f"dequantize_row_{name}")
        t = self._traits(type_id) if known else None
        if t is None or (t.type_name, t.blck_size, t.type_size) != (name.encode(), block, nbytes):
            raise PT2Error(
                f"this build of llama.cpp does not know type {name} ({type_id}): "
                "run pt2-llama build again"
            )

    def block_size(self, type_id: int) -> int:
        """Elements per block."""
        return int(self._traits(type_id).blck_size)

    def row_size(self, type_id: int, cols: int) -> int:
        """Bytes of a row of ``cols`` elements, a whole number of blocks."""
        return int(self._lib.ggml_row_size(type_id, cols))

    def quantize(
        self,
        values: NDArray[np.float32],
        type_id: int,
        importance: NDArray[np.float32] | None = None,
    ) -> NDArray[np.uint8]:
        """Quantise float32 ``[..., cols]`` to uint8 ``[..., row bytes]``.

        All cores work on it, on parts of several rows: the bytes do not depend on their number.

        Args:
            importance: float32 ``[cols]``, how much an error in each column counts (what
                llama.cpp calls an imatrix); None: all the same.
        """
        cols = values.shape[-1]
        rows = values.size // cols
        out = np.empty((rows, self.row_size(type_id, cols)), dtype=np.uint8)
        flat = values.reshape(rows, cols)
        self._lib.ggml_quantize_init(type_id)
        step = max(1, _CHUNK_VALUES // cols)
        matrix = None
        if importance is not None:
            if importance.shape != (cols,):
                raise ValueError(f"importance {importance.shape} for {cols} columns")
            importance = np.ascontiguousarray(importance, dtype=np.float32)
            matrix = importance.ctypes.data

        def part(first: int) -> None:
            source = np.ascontiguousarray(flat[first : first + step], dtype=np.float32)
            target = out[first : first + step]
            self._lib.ggml_quantize_chunk(
                type_id, source.ctypes.data, target.ctypes.data, 0, len(source), cols, matrix
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(part, range(0, rows, step)))
        return out.reshape(*values.shape[:-1], -1)

    def dequantize(self, data: NDArray[np.uint8], type_id: int) -> NDArray[np.float32]:
        """The library's own ``to_float``: uint8 ``[rows, row bytes]`` to float32 ``[rows, cols]``.

        Raises:
            ValueError: rows that are not whole blocks.
        """
        t = self._traits(type_id)
        rows, row_bytes = data.shape
        if row_bytes % t.type_size:
            raise ValueError(f"a row of {row_bytes} bytes is not whole blocks of {t.type_size}")
        data = np.ascontiguousarray(data)
        out = np.empty((rows, row_bytes // t.type_size * t.blck_size), dtype=np.float32)
        t.to_float(data.ctypes.data, out.ctypes.data, out.size)
        return out

    def _traits(self, type_id: int) -> Any:
        return self._lib.ggml_get_type_traits(type_id).contents


def type_of(name: str) -> gguf.GGMLQuantizationType:
    """``"q6_k"`` -> ``GGMLQuantizationType.Q6_K``."""
    return gguf.GGMLQuantizationType[name.upper()]


def _declare(function: Any, result: Any, *arguments: Any) -> None:
    function.restype, function.argtypes = result, arguments
