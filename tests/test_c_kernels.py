"""The CPU kernels of our types: every path, MUL_MAT around them, llama.cpp's own tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from c_support import load

from pt2_core import formats
from pt2_llama import api

HERE = Path(__file__).parent
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"


def compile_harness(compiler, target, *flags, portable=()):
    """tests/c/tq_check.c with the sources that it checks, from the patched tree.

    Those named in ``portable`` are compiled with the header that replaces AVX-512 by C.
    """
    ggml = api.source_dir() / "ggml"
    sources = [HERE / "c" / "tq_check.c", ggml / "src" / "ggml-tq.c"]
    sources += sorted((ggml / "src" / "ggml-cpu" / "tq").glob("*.c"))
    includes = [f"-I{ggml / part}" for part in ("include", "src", "src/ggml-cpu")]
    options = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function"]
    options += ["-ffp-contract=off", *includes, *flags]
    objects = []
    for source in [s for s in sources if s.name in portable]:
        empty = target.parent / "empty"
        empty.mkdir(exist_ok=True)
        (empty / "immintrin.h").touch()
        objects.append(target.parent / f"{source.stem}.o")
        header = HERE / "c" / "avx512_on_any_cpu.h"
        # not -O2: the portable forms of a kernel are thousands of lines
        run = [*options, "-O1", "-w", f"-I{empty}", "-include", header, "-c", source]
        _compile([compiler, *run, "-o", objects[-1]])
    rest = [s for s in sources if s.name not in portable]
    _compile([compiler, *options, *rest, *objects, "-o", target, "-lm"])


def _compile(command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def run_harness(command, **env):
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return {path: rest for path, *rest in lines}


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    target = tmp_path_factory.mktemp("harness") / "tq_check"
    compile_harness(shutil.which("cc") or "gcc", target)
    return target


@pytest.mark.llama
def test_every_path_of_this_processor_is_right_and_stays_in_its_blocks(harness):
    result = run_harness([harness])
    for path in ("generic", *(p for p in result if p not in ("generic", "active"))):
        status = result[path]
        assert status == ["skipped"] or (status[0] == "ok" and int(status[1]) > 1000), (
            path,
            status,
        )
    assert result["generic"][0] == "ok"
    best = next(p for p, status in result.items() if status[0] == "ok")
    assert result["active"] == [best]  # paths are listed best first


@pytest.mark.llama
def test_avx512_paths_by_portable_c(tmp_path):
    """On any processor: what the two paths compute, if not what the compiler makes of them."""
    if not Path("/usr/include/simde/x86/avx512.h").is_file():
        pytest.skip("AVX-512 is not checked here by portable C: libsimde-dev is not installed")
    target = tmp_path / "tq_check"
    compiler = shutil.which("cc") or "gcc"
    compile_harness(compiler, target, portable=("tq-avx512.c", "tq-avx512-vnni.c"))
    result = run_harness([target])
    assert result["active"] == ["avx512"]
    for path in ("avx512", "avx512-vnni"):
        assert result[path][0] == "ok" and int(result[path][1]) > 1000


@pytest.mark.llama
@pytest.mark.neon
def test_neon_paths_under_emulation(tmp_path):
    for tool in (CROSS_COMPILER, EMULATOR):
        if not shutil.which(tool):
            pytest.skip(f"NEON is not checked here: {tool} is not installed")
    target = tmp_path / "tq_check"
    compile_harness(CROSS_COMPILER, target, "-static")
    result = run_harness([EMULATOR, target])
    assert result["active"] == ["neon-i8mm"]
    for path in ("neon", "neon-dotprod", "neon-i8mm"):
        assert result[path][0] == "ok" and int(result[path][1]) > 1000
    # dot product instructions, but no matrix instructions
    older = run_harness([EMULATOR, "-cpu", "neoverse-n1", target])
    assert older["neon-i8mm"] == ["skipped"] and older["active"] == ["neon-dotprod"]
    # the first 64-bit generation has neither
    first = run_harness([EMULATOR, "-cpu", "cortex-a53", target])
    assert first["neon-dotprod"] == ["skipped"] and first["active"] == ["neon"]


@pytest.mark.llama
def test_a_path_can_be_forced_and_a_wrong_name_is_an_error(harness):
    assert run_harness([harness], GGML_TQ_CPU="generic")["active"] == ["generic"]
    done = subprocess.run(
        [harness], capture_output=True, text=True, env=os.environ | {"GGML_TQ_CPU": "sse9"}
    )
    assert done.returncode == 1
    assert done.stderr == (
        "GGML_TQ_CPU=sse9: this build has no such path; unset it or set it to generic\n"
    )


@pytest.mark.llama
def test_mul_mat_and_mul_mat_id_of_odd_shapes_on_every_path():
    build = api.require_build("cpu")
    paths = load(build.lib_dir).paths()
    assert "generic" in paths
    for path in paths:
        done = subprocess.run(
            [sys.executable, HERE / "c_support.py", build.lib_dir, "mul-mat"],
            env=build.env() | {"GGML_TQ_CPU": path, "OMP_NUM_THREADS": "2"},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.split() == ["active", path, "cases", "88"]


@pytest.mark.llama
def test_heads_of_llama_cpps_types_are_products_by_its_own_functions():
    build = api.require_build("cpu")
    done = subprocess.run(
        [sys.executable, HERE / "c_support.py", build.lib_dir, "head"],
        env=build.env() | {"OMP_NUM_THREADS": "3"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[2:] == ["cases", "48"]


def upstream_test(name, *arguments):
    build = api.require_build("cpu")
    done = subprocess.run(
        [build.tool(name), *arguments], env=build.env(), capture_output=True, text=True,
        errors="replace", timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)


@pytest.mark.llama
@pytest.mark.slow
def test_upstreams_quantize_fns_know_our_types():
    out = upstream_test("test-quantize-fns", "-v")
    for name in formats.TYPES:
        assert re.search(rf"^ *{name} absolute quantization error: +ok", out, re.M)
        assert re.search(rf"^ *{name} dot product error: +ok", out, re.M)


@pytest.mark.llama
@pytest.mark.slow
@pytest.mark.parametrize("op", ["MUL_MAT", "MUL_MAT_ID", "GET_ROWS"])
def test_upstreams_backend_ops_pass_for_our_types(op):
    kinds = "type=tq[12]_1" if op == "GET_ROWS" else "type_a=tq[12]_1"
    out = upstream_test("test-backend-ops", "test", "-b", "CPU", "-o", op, "-p", kinds)
    passed = [int(a) for a, b in re.findall(r"(\d+)/(\d+) tests passed", out) if a == b]
    assert passed and passed[0] > 0, out[-2000:]
