"""Tile form of our types (the CUDA backend's): layout and kernels, without a GPU.

The kernels of tq-tile.cu need no shuffles and no barriers, so that their source runs on the CPU one
thread after the other (tests/c/cuda_on_host.h). It is held against NumPy, which packs with
pt2_core/formats.py and permutes as the comment at the top of tq-kernels.cuh says.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pt2_core import formats
from pt2_core.formats import BLOCK, TQ1_1
from pt2_llama import api

ROOT = Path(__file__).parents[1]
OVERLAY = ROOT / "third_party" / "llama.cpp" / "overlay"
KERNELS = OVERLAY / "ggml" / "src" / "ggml-cuda" / "tq" / "kernels"
TILE_ROWS, TILE_BYTES, SCALES = 16, 576, 512
KINDS = pytest.mark.parametrize("kind", formats.TYPES.values(), ids=lambda k: k.name)
U8 = NDArray[np.uint8]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """tq-tile.cu as a shared library for the CPU."""
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler, "these tests need a C++ compiler"
    folder = tmp_path_factory.mktemp("tiles")
    for name in ("cuda_fp16.h", "cuda_bf16.h", "cuda_runtime.h"):
        (folder / name).write_text('#include "cuda_on_host.h"\n')
    source = (KERNELS / "tq-tile.cu").read_text()
    launch = re.compile(r"(\w+(?:<[\w, ]+>)?)<<<(.*?)>>>\((.*?)\);\n", re.DOTALL)
    source, launches = launch.subn(r"launch_on_host(\2, [&] { \1(\3); });\n", source)
    assert launches == 3
    (folder / "tile.cpp").write_text(source)
    command = [
        compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-fno-strict-aliasing",
        f'-DTQ_TILE_SOURCE="{folder / "tile.cpp"}"', f"-I{folder}", f"-I{ROOT / 'tests' / 'c'}",
        f"-I{KERNELS}", str(ROOT / "tests" / "c" / "tq_tile_host.cpp"), "-o",
        str(folder / "tile.so"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "tile.so"))
    library.tile_bytes.restype = ctypes.c_size_t
    return library


def matrices(kind, rng: np.random.Generator, count: int, rows: int, blocks: int) -> U8:
    """Random tensor in the file's form, uint8 (count, rows, blocks, bytes of a block)."""
    codes = rng.integers(0, 3, (count * rows, blocks * BLOCK), dtype=np.uint8)
    alpha = rng.uniform(0.0, 2.0, (count * rows, blocks)).astype(np.float16)
    mu = rng.normal(size=(count * rows, blocks)).astype(np.float16)
    return kind.pack(codes, alpha, mu).reshape(count, rows, blocks, kind.nbytes)


def by_the_comment(kind, file: U8, background: int = 0) -> U8:
    """Tile form of a tensor in the file's form, from the words of tq-kernels.cuh.

    Args:
        file: uint8 (matrices, rows, blocks, bytes of a block).
        background: what the rows that pad a matrix hold.

    Returns:
        uint8 (matrices, rows / 16 rounded up, blocks, 576).
    """
    count, rows, blocks, _ = file.shape
    codes, _, _ = kind.unpack(file.reshape(count * rows, -1))
    codes = codes.reshape(count, rows, blocks, 4, 32)  # plane, lane
    ones = np.array([0b00, 0b01, 0b11], np.uint8)[codes]  # as many as a code's value
    qs = sum(ones[..., p, :] << (2 * p) for p in range(4))  # else the bytes that TQ2_1 has
    tile_rows = -(-rows // TILE_ROWS)
    tiles = np.full((count, tile_rows, blocks, TILE_BYTES), background, np.uint8)
    for row in range(rows):
        g, r = row % 8, row // 8 % 2
        tile = tiles[:, row // TILE_ROWS]
        for t in range(4):
            for h in range(2):
                at = 16 * (4 * g + t) + 8 * h + 4 * r
                tile[:, :, at : at + 4] = qs[:, row, :, 8 * t + 4 * h : 8 * t + 4 * h + 4]
        at = SCALES + 8 * g + 4 * r
        tile[:, :, at : at + 4] = file[:, row, :, :4]
    return tiles


def test_bytes_that_are_no_codes_have_the_cpus_value_in_tile_form(host: ctypes.CDLL) -> None:
    rng = np.random.default_rng(3)
    file = matrices(TQ1_1, rng, 1, 16, 4)
    file[..., 4:] = rng.integers(200, 256, (1, 16, 4, 26))
    tiles = np.zeros(by_the_comment(TQ1_1, file).shape, np.uint8)
    host.to_tiles(shape_of(TQ1_1, file), pointer(file), pieces(0, file.size), pointer(tiles))
    assert np.array_equal(tiles, by_the_comment(TQ1_1, file))


def shape_of(kind, file: U8) -> ctypes.Array:
    count, rows, blocks, _ = file.shape
    return (ctypes.c_int64 * 4)(kind is TQ1_1, blocks * BLOCK, rows, count)


def pieces(offset: int, size: int, count: int = 1, stride: int = 0) -> ctypes.Array:
    return (ctypes.c_size_t * 4)(offset, size, count, stride)


def pointer(array: NDArray, at: int = 0) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data + at)


@KINDS
@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 3),
    rows=st.integers(1, 35),
    blocks=st.integers(1, 3),
    background=st.sampled_from([0, 0x5A, 0xFF]),
    seed=st.integers(0, 2**32 - 1),
)
def test_uploads_in_pieces_make_tile_form(
    host: ctypes.CDLL, kind, count: int, rows: int, blocks: int, background: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    file = matrices(kind, rng, count, rows, blocks)
    want = by_the_comment(kind, file, background)
    assert host.tile_bytes(shape_of(kind, file)) == want.size
    cuts = np.unique(rng.integers(0, file.size + 1, 9))
    bounds = [0, *cuts.tolist(), file.size]
    parts = [(a, b - a) for a, b in itertools.pairwise(bounds) if b > a]
    rng.shuffle(parts)

    tiles = np.full_like(want, background)
    for at, size in parts:
        host.to_tiles(shape_of(kind, file), pointer(file, at), pieces(at, size), pointer(tiles))
    np.testing.assert_array_equal(tiles, want)

    back = np.zeros_like(file)
    for at, size in parts:
        host.from_tiles(shape_of(kind, file), pointer(tiles), pieces(at, size), pointer(back, at))
    np.testing.assert_array_equal(back, file)


@KINDS
def test_every_first_and_last_byte_of_a_piece(host: ctypes.CDLL, kind) -> None:
    rng = np.random.default_rng(2)
    old, new = (matrices(kind, rng, 1, 1, 2) for _ in range(2))
    for first in range(0, kind.nbytes):
        for last in range(first, 2 * kind.nbytes):
            mixed = old.copy().reshape(-1)
            mixed[first : last + 1] = new.reshape(-1)[first : last + 1]
            tiles = by_the_comment(kind, old)
            part = pieces(first, last + 1 - first)
            host.to_tiles(shape_of(kind, old), pointer(new, first), part, pointer(tiles))
            np.testing.assert_array_equal(tiles, by_the_comment(kind, mixed.reshape(old.shape)))


@KINDS
def test_a_part_of_every_row_in_one_call(host: ctypes.CDLL, kind) -> None:
    rng = np.random.default_rng(3)
    old, new = (matrices(kind, rng, 2, 19, 3) for _ in range(2))
    row = 3 * kind.nbytes
    first, size = kind.nbytes - 7, kind.nbytes + 5
    rows_new = np.ascontiguousarray(new.reshape(-1, row)[:, first : first + size])
    want = old.copy().reshape(-1, row)
    want[:, first : first + size] = rows_new
    part = pieces(first, size, len(want), row)
    tiles = by_the_comment(kind, old)
    host.to_tiles(shape_of(kind, old), pointer(rows_new), part, pointer(tiles))
    np.testing.assert_array_equal(tiles, by_the_comment(kind, want.reshape(old.shape)))
    back = np.zeros_like(rows_new)
    host.from_tiles(shape_of(kind, old), pointer(tiles), part, pointer(back))
    np.testing.assert_array_equal(back, rows_new)


def to_float(data: NDArray, name: str) -> NDArray[np.float32]:
    if name == "bf16":
        return (data.astype(np.uint32) << 16).view(np.float32)
    return data.astype(np.float32)


@KINDS
@pytest.mark.parametrize(
    ("number", "name", "dtype", "unit"),
    [(0, "f32", np.float32, 0.0), (1, "f16", np.float16, 2**-11), (2, "bf16", np.uint16, 2**-8)],
)
def test_rows_to_floats(
    host: ctypes.CDLL, kind, number: int, name: str, dtype, unit: float
) -> None:
    rng = np.random.default_rng(4)
    count, rows, blocks = 3, 21, 4
    file = matrices(kind, rng, count, rows, blocks)
    tiles = by_the_comment(kind, file, 0xFF)  # NaN in the rows that pad
    want = kind.dequantize(file.reshape(count * rows, -1)).reshape(count, rows, -1)
    row, k = blocks * kind.nbytes, blocks * BLOCK

    def run(r: list[int], shape: tuple[int, ...], ids: NDArray[np.int32] | None = None) -> NDArray:
        out = np.full(shape, 0x7FFF if dtype is np.uint16 else np.nan, dtype)
        host.dequantize(
            shape_of(kind, file), pointer(tiles), (ctypes.c_int64 * 14)(*r),
            None if ids is None else pointer(ids), pointer(out), number,
        )  # fmt: skip
        return to_float(out, name)

    def near(got: NDArray, expected: NDArray) -> None:
        np.testing.assert_allclose(got, expected, rtol=unit, atol=2**-25 if unit else 0)

    # all of it; rows and matrices swapped; columns 128.. of every second row
    near(run([k, rows, count, 1, 0, row, row * rows, 0, 0, 0, 0, k, k * rows, 0], want.shape), want)
    swapped = [k, count, rows, 1, 0, row * rows, row, 0, 0, 0, 0, k, k * count, 0]
    near(run(swapped, (rows, count, k)), want.swapaxes(0, 1))
    part = k - BLOCK
    view = [part, 11, count, 1, kind.nbytes, 2 * row, row * rows, 0, 0, 0, 0, part, part * 11, 0]
    near(run(view, (count, 11, part)), want[:, ::2, BLOCK:])
    # reshaped to rows of half the length, and of twice (a matrix at a time: 21 rows are 10 pairs)
    half = [k // 2, 2 * rows * count, 1, 1, 0, row // 2, 0, 0, 0, 0, 0, k // 2, 0, 0]
    near(run(half, (2 * rows * count, k // 2)), want.reshape(-1, k // 2))
    twice = [2 * k, 10, count, 1, 0, 2 * row, row * rows, 0, 0, 0, 0, 2 * k, 20 * k, 0]
    near(run(twice, (count, 10, 2 * k)), want[:, :20].reshape(count, 10, 2 * k))
    # by index, the lists of ids 7 apart, with room left between rows of y
    ids = rng.integers(0, rows, (count, 7)).astype(np.int32)
    some = [k, 5, count, 1, 0, row, row * rows, 0, 1, 7, 0, k + 3, 5 * (k + 3), 0]
    got = run(some, (count, 5, k + 3), ids)
    near(got[..., :k], np.take_along_axis(want, ids[:, :5, None].astype(np.int64), 1))
    assert np.isnan(got[..., k:]).all()


@pytest.mark.llama
def test_the_checks_of_a_backends_memory_hold_for_the_cpu() -> None:
    lib_dir = api.require_build("cpu").lib_dir
    command = [sys.executable, str(ROOT / "tests" / "cuda_buffers.py"), str(lib_dir), "CPU", "file"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "all right" in done.stdout, done.stdout + done.stderr


@pytest.mark.llama
def test_every_way_to_a_tensors_bytes_knows_tile_form() -> None:
    """In the patched backend: what copies from or to a tensor's data asks for its form."""
    path = api.source_dir() / "ggml" / "src" / "ggml-cuda" / "ggml-cuda.cu"
    functions = re.split(r"^}\n", path.read_text(), flags=re.MULTILINE)
    moves = [f for f in functions if re.search(r"tensor->data \+ offset|dst->data, .*src->data", f)]
    names = [re.findall(r"^static \w+ (ggml_\w+)\(", f, re.MULTILINE)[-1] for f in moves]
    assert len(names) == 11, names  # set, get and their 2D, twice; memset; copies of two kinds
    unaware = [n for n, f in zip(names, moves, strict=True) if "ggml_cuda_tq_" not in f]
    assert unaware == []


def test_the_header_says_what_these_tests_take_from_it() -> None:
    header = (KERNELS / "tq-kernels.cuh").read_text()
    constants = dict(re.findall(r"constexpr int (TQ_\w+)\s*= (\d+);", header))
    found = [
        constants[f"TQ_{name}"] for name in ("BLOCK", "TILE_ROWS", "TILE_BYTES", "TILE_SCALES")
    ]
    assert found == [str(n) for n in (BLOCK, TILE_ROWS, TILE_BYTES, SCALES)]
    assert "16*(4g + t) + 8h + 4r + i   qs[8t + 4h + i]" in header
    assert "512 + 8g + 4r               alpha, mu" in header
    assert "00, 01, 11 for c = 0, 1, 2" in header


def test_kernels_need_no_header_of_ggml_and_templates_none_of_the_kernels() -> None:
    """What lets benchmarks/cuda_lab compile each kernel alone: CUDA's headers and their own."""
    included = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
    folder = KERNELS.parent
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".cu", ".cuh"))
    assert {p.parent.name for p in files} == {"glue", "kernels", "templates"}
    for path in files:
        for name in included.findall(path.read_text()):
            target = (path.parent / name).resolve()
            if path.parent.name == "kernels":
                assert target.is_file() and target.parent == KERNELS, f"{path.name}: {name}"
            if path.parent.name == "templates":
                assert KERNELS not in target.parents, f"{path.name}: {name}"
