"""Our types' C functions through ctypes, for the tests of the llama.cpp overlay.

Run as a program it is one check in a process of its own, because the CPU path is chosen once per
process: ``python c_support.py LIB_DIR mul-mat`` compares MUL_MAT and MUL_MAT_ID with the portable
dot product under whatever GGML_TQ_CPU says; ``head`` does so for the types of heads, with
llama.cpp's own dot products.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pt2_core import formats

F32, I32 = 0, 26
TERNARY = tuple(t.id for t in formats.TYPES.values())
Q8_T = formats.Q8_T.id
NAMES = {t.id: t.ggml_name for t in formats.ALL}
SIZES = {t.id: t.nbytes for t in formats.ALL}
BLOCK = formats.BLOCK
# types of heads: ggml's number, its dot product and what makes the other factor of that
HEADS = {
    8: ("ggml_vec_dot_q8_0_q8_0", "quantize_row_q8_0"),
    12: ("ggml_vec_dot_q4_K_q8_K", "quantize_row_q8_K"),
    13: ("ggml_vec_dot_q5_K_q8_K", "quantize_row_q8_K"),
    14: ("ggml_vec_dot_q6_K_q8_K", "quantize_row_q8_K"),
}

_P, _I64, _SIZE, _BOOL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t, ctypes.c_bool


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", _SIZE), ("mem_buffer", _P), ("no_alloc", _BOOL))


@dataclass(frozen=True)
class Libs:
    """libggml-base and libggml-cpu of a build."""

    base: ctypes.CDLL
    cpu: ctypes.CDLL

    def quantize(
        self, kind: int, x: NDArray[np.float32], imatrix: NDArray[np.float32] | None = None
    ) -> NDArray[np.uint8]:
        """Rows (rows, k) float32 to (rows, bytes) by the reference quantiser."""
        x = np.ascontiguousarray(x, dtype=np.float32)
        rows, k = x.shape
        out = np.zeros((rows, k // BLOCK * SIZES[kind]), np.uint8)
        if kind == Q8_T:
            self.base.quantize_row_q8_t_ref(x.ctypes.data, out.ctypes.data, x.size)
            return out
        weights = None if imatrix is None else np.ascontiguousarray(imatrix, np.float32)
        done = getattr(self.base, f"quantize_{NAMES[kind]}")(
            x.ctypes.data,
            out.ctypes.data,
            rows,
            k,
            None if weights is None else weights.ctypes.data,
        )
        assert done == out.size
        return out

    def dequantize(self, kind: int, data: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(rows, bytes) to (rows, k) float32."""
        data = np.ascontiguousarray(data)
        out = np.full((len(data), data.shape[1] // SIZES[kind] * BLOCK), np.nan, np.float32)
        function = getattr(self.base, f"dequantize_row_{NAMES[kind]}")
        function(data.ctypes.data, out.ctypes.data, out.size)
        return out

    def valid(self, kind: int, data: NDArray[np.uint8]) -> bool:
        """ggml_validate_row_data."""
        data = np.ascontiguousarray(data)
        return bool(self.base.ggml_validate_row_data(kind, data.ctypes.data, data.size))

    def paths(self) -> list[str]:
        """Names of the CPU paths in this build that this processor can run."""
        names, found = self.cpu.ggml_tq_path_names(), []
        while names[len(found)]:
            found.append(names[len(found)])
        return [n.decode() for n in found if self.cpu.ggml_tq_test_supported(n)]

    def gemv(
        self, path: str, kind: int, w: NDArray[np.uint8], y: NDArray[np.uint8]
    ) -> NDArray[np.float32]:
        """Products (cols, rows) of quantised rows and Q8_T columns, column by column."""
        k = w.shape[1] // SIZES[kind] * BLOCK
        out = np.full((len(y), len(w)), np.nan, np.float32)
        for column, result in zip(y, out, strict=True):
            assert self.cpu.ggml_tq_test_gemv(
                path.encode(), kind, k, len(w), w.ctypes.data, w.shape[1], column.ctypes.data,
                result.ctypes.data,
            )  # fmt: skip
        return out


@cache
def load(lib_dir: Path) -> Libs:
    """The libraries in ``lib_dir``, with the argument types of what the tests call."""
    base = ctypes.CDLL(str(lib_dir / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(lib_dir / "libggml-cpu.so"))
    row = ([_P, _P, _I64], None)
    quantize = ([_P, _P, _I64, _I64, _P], _SIZE)
    tensor = [_P, ctypes.c_int]
    vec_dot = [ctypes.c_int, _P, _SIZE, _P, _SIZE, _P, _SIZE, ctypes.c_int]
    gemv = [ctypes.c_char_p, ctypes.c_int, _I64, _I64, _P, _SIZE, _P, _P]
    signatures = {
        base: {
            **{f"quantize_row_{name}_ref": row for name in NAMES.values()},
            **{f"dequantize_row_{name}": row for name in NAMES.values()},
            **{f"quantize_{NAMES[kind]}": quantize for kind in TERNARY},
            "ggml_validate_row_data": ([ctypes.c_int, _P, _SIZE], _BOOL),
            "ggml_init": ([_InitParams], _P), "ggml_free": ([_P], None),
            "ggml_new_tensor_2d": ([*tensor, _I64, _I64], _P),
            "ggml_new_tensor_3d": ([*tensor, _I64, _I64, _I64], _P),
            "ggml_new_tensor_4d": ([*tensor, _I64, _I64, _I64, _I64], _P),
            "ggml_mul_mat": ([_P, _P, _P], _P), "ggml_mul_mat_id": ([_P, _P, _P, _P], _P),
            "ggml_get_data": ([_P], _P), "ggml_new_graph": ([_P], _P),
            "ggml_build_forward_expand": ([_P, _P], None),
            "ggml_row_size": ([ctypes.c_int, _I64], _SIZE),
            "ggml_quantize_chunk": ([ctypes.c_int, _P, _P, _I64, _I64, _I64, _P], _SIZE),
        },
        cpu: {
            "ggml_cpu_init": ([], None),
            "ggml_graph_compute_with_ctx": ([_P, _P, ctypes.c_int], ctypes.c_int),
            "ggml_tq_path_names": ([], ctypes.POINTER(ctypes.c_char_p)),
            "ggml_tq_active_name": ([], ctypes.c_char_p),
            "ggml_tq_test_supported": ([ctypes.c_char_p], _BOOL),
            "ggml_tq_test_gemv": (gemv, _BOOL),
            **{dot: (vec_dot, None) for dot, _ in HEADS.values()},
            **{to_q8: row for _, to_q8 in HEADS.values()},
        },
    }  # fmt: skip
    for library, functions in signatures.items():
        for name, (arguments, result) in functions.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, result
    cpu.ggml_cpu_init()
    return Libs(base, cpu)


def random_payload(
    kind: int, rows: int, blocks: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Valid random bytes (rows, blocks * size): any codes, scales of the size that models have."""
    data = formats.TYPES[NAMES[kind]].random_blocks(rows * blocks, rng, 0.03)
    return data.reshape(rows, -1)


def graph_product(
    libs: Libs,
    kind: int,
    w: NDArray[np.uint8],
    x: NDArray[np.float32],
    threads: int,
    ids: NDArray[np.int32] | None = None,
) -> NDArray[np.float32]:
    """MUL_MAT (or MUL_MAT_ID with ``ids``) by ggml's CPU backend.

    Args:
        w: (matrices, rows, bytes); all share ``x``'s k.
        x: MUL_MAT: (matrices of x, cols, k), a multiple of w's number of matrices.
            MUL_MAT_ID: (tokens, slots or 1, k).
        threads: 1 or more.
        ids: (tokens, slots) of matrices, or None.

    Returns:
        (matrices of x, cols, rows), or (tokens, slots, rows).
    """
    base = libs.base
    shape = (*x.shape[:2], w.shape[1]) if ids is None else (*ids.shape, w.shape[1])
    need = w.nbytes + 4 * x.nbytes + 4 * int(np.prod(shape)) + (8 << 20)
    ctx = base.ggml_init(_InitParams(need, None, False))

    def put(tensor: int, data: NDArray) -> int:
        ctypes.memmove(
            base.ggml_get_data(tensor), np.ascontiguousarray(data).ctypes.data, data.nbytes
        )
        return tensor

    k = x.shape[2]
    a = put(base.ggml_new_tensor_3d(ctx, kind, k, w.shape[1], w.shape[0]), w)
    b = put(base.ggml_new_tensor_3d(ctx, F32, k, x.shape[1], x.shape[0]), x)
    if ids is None:
        out = base.ggml_mul_mat(ctx, a, b)
    else:
        c = put(base.ggml_new_tensor_2d(ctx, I32, ids.shape[1], ids.shape[0]), ids)
        out = base.ggml_mul_mat_id(ctx, a, b, c)
    graph = base.ggml_new_graph(ctx)
    base.ggml_build_forward_expand(graph, out)
    assert libs.cpu.ggml_graph_compute_with_ctx(ctx, graph, threads) == 0
    result = np.empty(shape, np.float32)
    ctypes.memmove(result.ctypes.data, base.ggml_get_data(out), result.nbytes)
    base.ggml_free(ctx)
    return result


def _assert_close(got: NDArray[np.float32], want: NDArray[np.float32], what: str) -> None:
    scale = np.abs(want).max() + 1e-3
    worst = np.abs(got - want).max() / scale
    assert worst < 2e-5, f"{what}: off by {worst:.2g} of {scale:.3g}"  # NaN fails too


def check_mul_mat(libs: Libs) -> int:
    """Odd shapes of MUL_MAT and MUL_MAT_ID against the portable dot product; number of cases."""
    rng = np.random.default_rng(3)
    cases = 0
    shapes = [(1, 1, 1), (3, 1, 2), (7, 5, 1), (16, 3, 3), (31, 2, 5), (33, 8, 1), (65, 9, 2),
              (130, 17, 1), (67, 129, 1), (1, 131, 4)]  # fmt: skip
    for kind in TERNARY:
        for rows, cols, blocks in shapes:
            for mats, repeat in ((1, 1), (2, 3)) if rows * cols < 1000 else ((1, 1),):
                w = np.stack([random_payload(kind, rows, blocks, rng) for _ in range(mats)])
                x = rng.standard_normal((mats * repeat, cols, blocks * BLOCK)).astype(np.float32)
                want = np.stack(
                    [
                        libs.gemv("generic", kind, w[i // repeat], libs.quantize(Q8_T, x[i]))
                        for i in range(mats * repeat)
                    ]
                )
                for threads in (1, 2):
                    got = graph_product(libs, kind, w, x, threads)
                    what = (
                        f"{NAMES[kind]} {rows}x{blocks} blocks, {cols} columns, {threads} threads"
                    )
                    _assert_close(got, want, what)
                    cases += 1
        cases += _check_mul_mat_id(libs, kind, rng)
    return cases


def _check_mul_mat_id(libs: Libs, kind: int, rng: np.random.Generator) -> int:
    cases = 0
    for tokens, shared in ((1, True), (5, True), (40, False), (150, True)):
        experts, slots, rows, blocks = 3, 2, 35, 2
        w = np.stack([random_payload(kind, rows, blocks, rng) for _ in range(experts)])
        x = rng.standard_normal((tokens, 1 if shared else slots, blocks * BLOCK)).astype(np.float32)
        ids = np.array([rng.permutation(experts)[:slots] for _ in range(tokens)], np.int32)
        want = np.empty((tokens, slots, rows), np.float32)
        for t in range(tokens):
            for s in range(slots):
                y = libs.quantize(Q8_T, x[t, [0 if shared else s]])
                want[t, s] = libs.gemv("generic", kind, w[ids[t, s]], y)[0]
        for threads in (1, 2):
            got = graph_product(libs, kind, w, x, threads, ids)
            _assert_close(
                got, want, f"{NAMES[kind]} mul_mat_id, {tokens} tokens, {threads} threads"
            )
            cases += 1
    return cases


def check_head(libs: Libs) -> int:
    """One column, types of heads: bit for bit llama.cpp's dot products; number of cases."""
    rng = np.random.default_rng(5)
    cases, k = 0, 768
    for kind, (dot, to_q8) in HEADS.items():
        for rows in (1, 3, 66, 259):
            weights = rng.standard_normal((rows, k)).astype(np.float32)
            w = np.empty((rows, libs.base.ggml_row_size(kind, k)), np.uint8)
            libs.base.ggml_quantize_chunk(
                kind, weights.ctypes.data, w.ctypes.data, 0, rows, k, None
            )
            x = rng.standard_normal(k).astype(np.float32)
            y = np.empty(2 * k, np.uint8)  # more than any type needs
            getattr(libs.cpu, to_q8)(x.ctypes.data, y.ctypes.data, k)
            want = np.empty(rows, np.float32)
            for r in range(rows):
                getattr(libs.cpu, dot)(
                    k, want[r:].ctypes.data, 0, w[r].ctypes.data, 0, y.ctypes.data, 0, 1
                )
            for threads in (1, 2, 3):
                got = graph_product(libs, kind, w[None], x[None, None], threads)[0, 0]
                assert np.array_equal(got, want), f"type {kind}, {rows} rows, {threads} threads"
                cases += 1
    return cases


if __name__ == "__main__":
    loaded = load(Path(sys.argv[1]))
    checks = {"mul-mat": check_mul_mat, "head": check_head}
    print("active", loaded.cpu.ggml_tq_active_name().decode())
    print("cases", checks[sys.argv[2]](loaded))
