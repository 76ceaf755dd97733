"""Tensors of our types in a backend's memory, through ggml's public functions.

A program of its own, because a backend reads its environment once per process:
``python cuda_buffers.py LIB_DIR CUDA0 tiles`` checks that what goes in comes out (whole, in pieces
at any byte, in 2D, at once and queued, through views), that copies between tensors and backends
keep it, and that CPY to floats agrees with the reference. ``CPU file`` checks the program itself.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from pathlib import Path

import numpy as np
from c_support import BLOCK, F32, NAMES, SIZES, TERNARY, load, random_payload
from numpy.typing import NDArray

F16, BF16 = 1, 30
SUCCESS = 0
P, SIZE, I64, INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int
U8 = NDArray[np.uint8]


class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", SIZE), ("mem_buffer", P), ("no_alloc", ctypes.c_bool))


SIGNATURES = {
    "ggml_backend_init_by_name": ([ctypes.c_char_p, P], P),
    "ggml_backend_free": ([P], None),
    "ggml_backend_synchronize": ([P], None),
    "ggml_backend_alloc_ctx_tensors": ([P, P], P),
    "ggml_backend_buffer_free": ([P], None),
    "ggml_backend_get_default_buffer_type": ([P], P),
    "ggml_backend_buft_get_alloc_size": ([P, P], SIZE),
    "ggml_backend_tensor_set": ([P, P, SIZE, SIZE], None),
    "ggml_backend_tensor_get": ([P, P, SIZE, SIZE], None),
    "ggml_backend_tensor_memset": ([P, ctypes.c_uint8, SIZE, SIZE], None),
    "ggml_backend_tensor_set_2d": ([P, P, SIZE, SIZE, SIZE, SIZE, SIZE], None),
    "ggml_backend_tensor_get_2d": ([P, P, SIZE, SIZE, SIZE, SIZE, SIZE], None),
    "ggml_backend_tensor_set_async": ([P, P, P, SIZE, SIZE], None),
    "ggml_backend_tensor_get_async": ([P, P, P, SIZE, SIZE], None),
    "ggml_backend_tensor_set_2d_async": ([P, P, P, SIZE, SIZE, SIZE, SIZE, SIZE], None),
    "ggml_backend_tensor_get_2d_async": ([P, P, P, SIZE, SIZE, SIZE, SIZE, SIZE], None),
    "ggml_backend_tensor_copy": ([P, P], None),
    "ggml_backend_tensor_copy_async": ([P, P, P, P], None),
    "ggml_backend_graph_compute": ([P, P], INT),
    "ggml_init": ([InitParams], P),
    "ggml_free": ([P], None),
    "ggml_new_tensor_4d": ([P, INT, I64, I64, I64, I64], P),
    "ggml_view_3d": ([P, P, I64, I64, I64, SIZE, SIZE, SIZE], P),
    "ggml_cpy": ([P, P, P], P),
    "ggml_new_graph": ([P], P),
    "ggml_build_forward_expand": ([P, P], None),
}


class Ggml:
    """The functions above, without their prefix."""

    def __init__(self, lib_dir: Path) -> None:
        libraries = [ctypes.CDLL(str(lib_dir / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)]
        libraries.append(ctypes.CDLL(str(lib_dir / "libggml.so"), mode=ctypes.RTLD_GLOBAL))
        for name, (arguments, result) in SIGNATURES.items():
            function = next(getattr(x, name) for x in libraries if hasattr(x, name))
            function.argtypes, function.restype = arguments, result
            setattr(self, name.removeprefix("ggml_"), function)


class Memory:
    """Tensors, views and nodes on one backend, all made before :meth:`allocate`."""

    def __init__(self, g: Ggml, backend: int) -> None:
        self.g, self.backend = g, backend
        self.ctx = g.init(InitParams(1 << 20, None, True))
        self.buffer = None

    def tensor(self, kind: int, *shape: int) -> int:
        return int(self.g.new_tensor_4d(self.ctx, kind, *shape, *[1] * (4 - len(shape))))

    def allocate(self) -> None:
        self.buffer = self.g.backend_alloc_ctx_tensors(self.ctx, self.backend)
        assert self.buffer

    def run(self, node: int) -> None:
        graph = self.g.new_graph(self.ctx)
        self.g.build_forward_expand(graph, node)
        assert self.g.backend_graph_compute(self.backend, graph) == SUCCESS
        self.g.backend_synchronize(self.backend)

    def free(self) -> None:
        self.g.backend_buffer_free(self.buffer)
        self.g.free(self.ctx)


def pointer(a: NDArray, at: int = 0) -> int:
    assert a.flags.c_contiguous
    return int(a.ctypes.data) + at


def fetch(g: Ggml, tensor: int, like: U8) -> U8:
    out = np.full_like(like, 0xEE)
    g.backend_tensor_get(tensor, pointer(out), 0, out.nbytes)
    return out


def equal(got: NDArray, want: NDArray, what: str) -> None:
    wrong = int((got != want).sum())
    assert wrong == 0, (
        f"{what}: {wrong} of {want.size} differ, first at {np.argwhere(got != want)[0]}"
    )
    print("ok", what)


def check_transfers(
    g: Ggml, backend: int, kind: int, rng: np.random.Generator, tiles: bool
) -> None:
    count, rows, blocks = 3, 19, 3
    row = blocks * SIZES[kind]
    m = Memory(g, backend)
    t = m.tensor(kind, blocks * BLOCK, rows, count)
    # rows 5.. of the last matrix, which begin inside a tile
    begin = (2 * rows + 5) * row
    view = g.view_3d(m.ctx, t, blocks * BLOCK, 9, 1, row, 9 * row, begin)
    m.allocate()
    old, new = (random_payload(kind, count * rows, blocks, rng).reshape(-1) for _ in range(2))
    buft = g.backend_get_default_buffer_type(backend)
    size = g.backend_buft_get_alloc_size(buft, t)
    # a tile is 16 rows x 128 columns in 576 bytes
    assert (size == count * -(-rows // 16) * blocks * 576) == tiles, size

    g.backend_tensor_set(t, pointer(old), 0, old.nbytes)
    equal(fetch(g, t, old), old, f"{NAMES[kind]} set and get")

    cuts = [0, *np.unique(rng.integers(1, old.size, 40)).tolist(), old.size]
    pieces = list(itertools.pairwise(cuts))
    rng.shuffle(pieces)
    back = np.full_like(new, 0xEE)
    for a, b in pieces:
        g.backend_tensor_set_async(backend, t, pointer(new, a), a, b - a)
    for a, b in pieces:
        g.backend_tensor_get_async(backend, t, pointer(back, a), a, b - a)
    g.backend_synchronize(backend)
    equal(back, new, f"{NAMES[kind]} in pieces, queued")

    # the middle of each row, 2D: at once and queued
    first, part = SIZES[kind] - 5, SIZES[kind] + 9
    for queued in (False, True):
        source = np.ascontiguousarray(old.reshape(-1, row)[:, first : first + part + 3])
        want = fetch(g, t, old).reshape(-1, row)
        want[:, first : first + part] = source[:, :part]
        place = (first, part, count * rows, row, part + 3)
        got = np.full((count * rows, part + 3), 0xEE, np.uint8)
        if queued:
            g.backend_tensor_set_2d_async(backend, t, pointer(source), *place)
            g.backend_tensor_get_2d_async(backend, t, pointer(got), *place)
            g.backend_synchronize(backend)
        else:
            g.backend_tensor_set_2d(t, pointer(source), *place)
            g.backend_tensor_get_2d(t, pointer(got), *place)
        equal(got[:, :part], source[:, :part], f"{NAMES[kind]} get 2D, queued: {queued}")
        equal(got[:, part:], np.full((count * rows, 3), 0xEE), "2D leaves the gaps")
        equal(fetch(g, t, old).reshape(-1, row), want, f"{NAMES[kind]} set 2D, queued: {queued}")
        g.backend_tensor_set(t, pointer(new), 0, new.nbytes)

    g.backend_tensor_memset(t, 0, 7, 3 * row)
    new[7 : 7 + 3 * row] = 0
    equal(fetch(g, t, new), new, f"{NAMES[kind]} memset")

    g.backend_tensor_set(view, pointer(old, begin), 0, 9 * row)
    new[begin : begin + 9 * row] = old[begin : begin + 9 * row]
    equal(fetch(g, t, new), new, f"{NAMES[kind]} set through a view")
    equal(fetch(g, view, new[: 9 * row]), new[begin : begin + 9 * row], "get through a view")
    m.free()


def check_large(g: Ggml, backend: int, kind: int, rng: np.random.Generator) -> None:
    """More than the backend moves at once, with rows that the parts cut anywhere."""
    blocks, rows = 40, 20011
    m = Memory(g, backend)
    t = m.tensor(kind, blocks * BLOCK, rows)
    m.allocate()
    data = random_payload(kind, rows, blocks, rng)
    g.backend_tensor_set(t, pointer(data), 0, data.nbytes)
    equal(fetch(g, t, data), data, f"{NAMES[kind]} {data.nbytes >> 20} MiB")
    row = data.shape[1]
    g.backend_tensor_set_2d(t, pointer(data, 1), 1, row - 1, rows, row, row)
    equal(fetch(g, t, data), data, f"{NAMES[kind]} {data.nbytes >> 20} MiB, 2D")
    m.free()


def check_copies(g: Ggml, name: str, backend: int, kind: int, rng: np.random.Generator) -> None:
    count, rows, blocks = 2, 21, 2
    row = blocks * SIZES[kind]
    other = g.backend_init_by_name(name.encode(), None)
    host = g.backend_init_by_name(b"CPU", None)
    sides = [Memory(g, b) for b in (backend, backend, other, host)]
    tensors = [m.tensor(kind, blocks * BLOCK, rows, count) for m in sides]
    a, b = 3 * row, (rows + 7) * row
    views = [
        g.view_3d(m.ctx, t, blocks * BLOCK, 6, 1, row, 6 * row, at)
        for m, t, at in zip(sides, tensors, (a, b), strict=False)
    ]
    for m in sides:
        m.allocate()
    data = random_payload(kind, count * rows, blocks, rng).reshape(-1)
    junk = random_payload(kind, count * rows, blocks, rng).reshape(-1)

    def copy(src: int, dst: int, queued: bool) -> None:
        g.backend_tensor_set(tensors[src], pointer(data), 0, data.nbytes)
        g.backend_tensor_set(tensors[dst], pointer(junk), 0, data.nbytes)
        if queued:
            backends = sides[src].backend, sides[dst].backend
            g.backend_tensor_copy_async(*backends, tensors[src], tensors[dst])
            g.backend_synchronize(sides[src].backend)
            g.backend_synchronize(sides[dst].backend)
        else:
            g.backend_tensor_copy(tensors[src], tensors[dst])
        equal(fetch(g, tensors[dst], data), data, f"{NAMES[kind]} copy {src} {dst} {queued}")

    for src, dst in ((0, 1), (0, 2), (0, 3), (3, 0)):
        for queued in (False, True):
            copy(src, dst, queued)
    # between views: rows 3.. to rows 7.. of the second matrix
    g.backend_tensor_set(tensors[1], pointer(junk), 0, data.nbytes)
    g.backend_tensor_copy(views[0], views[1])
    want = junk.copy()
    want[b : b + 6 * row] = data[a : a + 6 * row]
    equal(fetch(g, tensors[1], data), want, f"{NAMES[kind]} copy between views")
    for m in sides:
        m.free()
    g.backend_free(other)
    g.backend_free(host)


def check_operators(
    g: Ggml, libs, backend: int, kind: int, rng: np.random.Generator, tiles: bool
) -> None:
    """CPY between views, and to floats with two dimensions swapped."""
    count, rows, blocks = 2, 21, 3
    row, k = blocks * SIZES[kind], blocks * BLOCK
    m = Memory(g, backend)
    a, b = (m.tensor(kind, k, rows, count) for _ in range(2))
    # the CPU's CPY knows F32 only
    kinds = (F32, F16, BF16) if tiles else (F32,)
    floats = {number: m.tensor(number, k, count, rows) for number in kinds}
    views = [
        g.view_3d(m.ctx, t, k, 5, 1, row, 5 * row, at * row) for t, at in ((a, 2), (b, rows + 9))
    ]
    rows_copied = g.cpy(m.ctx, *views)
    swapped = g.view_3d(m.ctx, a, k, count, rows, rows * row, row, 0)
    made_floats = {number: g.cpy(m.ctx, swapped, t) for number, t in floats.items()}
    m.allocate()
    data = random_payload(kind, count * rows, blocks, rng)
    junk = random_payload(kind, count * rows, blocks, rng)
    g.backend_tensor_set(a, pointer(data), 0, data.nbytes)
    g.backend_tensor_set(b, pointer(junk), 0, data.nbytes)

    m.run(rows_copied)
    want = junk.copy()
    want[rows + 9 : rows + 14] = data[2:7]
    equal(fetch(g, b, data), want, f"{NAMES[kind]} CPY of rows to other rows")

    weights = libs.dequantize(kind, data).reshape(count, rows, k).swapaxes(0, 1)
    for number, t in floats.items():
        m.run(made_floats[number])
        out = np.zeros((rows, count, k), np.float32 if number == F32 else np.uint16)
        g.backend_tensor_get(t, pointer(out), 0, out.nbytes)
        got = out if number == F32 else out.view(np.float16).astype(np.float32)
        if number == BF16:
            got = (out.astype(np.uint32) << 16).view(np.float32)
        unit = {F32: 0.0, F16: 2.0**-11, BF16: 2.0**-8}[number]
        np.testing.assert_allclose(got, weights, rtol=unit, atol=2.0**-25 if unit else 0)
        print("ok", NAMES[kind], "CPY to", {F32: "f32", F16: "f16", BF16: "bf16"}[number])
    m.free()


def main(lib_dir: Path, name: str, form: str) -> None:
    g, libs = Ggml(lib_dir), load(lib_dir)
    backend = g.backend_init_by_name(name.encode(), None)
    assert backend, f"there is no backend {name}"
    rng = np.random.default_rng(6)
    for kind in TERNARY:
        check_transfers(g, backend, kind, rng, form == "tiles")
        check_large(g, backend, kind, rng)
        check_copies(g, name, backend, kind, rng)
        if form == "tiles" or name == "CPU":
            check_operators(g, libs, backend, kind, rng, form == "tiles")
    g.backend_free(backend)
    print("all right")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
