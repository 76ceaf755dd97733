"""The C code of the types, and gguf.cpp, built with AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pt2_core import formats
from pt2_llama import api

from . import gguf_file, mutate

C = Path(__file__).parent.parent / "c"
FLAGS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
CONTROLS = ("short-weights", "short-activations", "short-result")
KINDS = (*formats.TYPES, "q2_k")


def has_sanitizers(compiler: str, folder: Path) -> bool:
    """Whether a program that the compiler makes with the sanitizers runs here."""
    source = folder / "probe.c"
    source.write_text("int main(void) { return 0; }\n")
    made = subprocess.run(
        [compiler, *FLAGS, source, "-o", folder / "probe"], capture_output=True, check=False
    )
    return made.returncode == 0 and _run([folder / "probe"]).returncode == 0


def build_kernels(folder: Path, *, compiler: str = "cc") -> Path:
    """tests/c/tq_asan.c with the sources of the types, from the patched tree."""
    ggml = api.source_dir() / "ggml"
    sources = [C / "tq_asan.c", ggml / "src" / "ggml-tq.c"]
    sources += sorted((ggml / "src" / "ggml-cpu" / "tq").glob("*.c"))
    includes = [f"-I{ggml / part}" for part in ("include", "src", "src/ggml-cpu")]
    target = folder / "tq_asan"
    _compile([compiler, "-std=gnu11", *FLAGS, *includes, *sources, "-o", target, "-lm"])
    return target


def build_gguf(folder: Path, *, compiler: str = "c++") -> Path:
    """tests/c/gguf_asan.cpp with gguf.cpp; what that calls of ggml is the build's.

    UBSan's check of enums is off: gguf.cpp (upstream's) reads a file's number into one first, and
    looks whether it is one of them then.
    """
    ggml, lib = api.source_dir() / "ggml", api.require_build().lib_dir
    target = folder / "gguf_asan"
    sources = [C / "gguf_asan.cpp", ggml / "src" / "gguf.cpp"]
    includes = [f"-I{ggml / part}" for part in ("include", "src")]
    link = [f"-L{lib}", f"-Wl,-rpath,{lib}", "-lggml-base"]
    flags = [*FLAGS, "-fno-sanitize=enum", "-std=c++17"]
    _compile([compiler, *flags, *includes, *sources, "-o", target, *link])
    return target


def check_kernels(program: Path, shapes: int, seed: int) -> str:
    """Random calls on so many random shapes; what was counted.

    Raises:
        AssertionError: a sanitizer found something; its report.
    """
    done = _run([program, str(shapes), str(seed)], 300 + shapes)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout.strip()


def check_controls(program: Path) -> None:
    """A buffer that is one byte short must be found, whichever it is."""
    for what in CONTROLS:
        done = _run([program, what])
        assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, (what, done)


def check_gguf(program: Path, files: int, seed: int) -> str:
    """Changed GGUF files of our types through gguf.cpp; what was counted."""
    folder = Path(tempfile.mkdtemp(prefix="pt2-fuzz-"))
    try:
        seeds = [gguf_file.tiny_file(kind, layers=1) for kind in KINDS]
        names = []
        for i in range(files):
            names.append(folder / f"{i}.gguf")
            names[-1].write_bytes(mutate.mutate_gguf(seeds[i % 3], random.Random(f"{seed}/c/{i}")))
        done = _run([program], 600, "".join(f"{n}\n" for n in names))
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout.strip()
    finally:
        shutil.rmtree(folder)


def run_kernels(shapes: int, seed: int) -> int:
    """The command: build, controls, random calls, changed headers."""
    with tempfile.TemporaryDirectory(prefix="pt2-fuzz-") as name:
        folder = Path(name)
        if not has_sanitizers("cc", folder):
            print("skipped: cc has no AddressSanitizer and UBSan here", file=sys.stderr)
            return 1
        try:
            kernels = build_kernels(folder)
            check_controls(kernels)
            print(f"controls: {len(CONTROLS)} of {len(CONTROLS)} found")
            print(f"kernels: {check_kernels(kernels, shapes, seed)}")
            print(f"gguf.cpp: {check_gguf(build_gguf(folder), shapes, seed)}")
        except AssertionError as e:
            print(e)
            return 1
    return 0


def _compile(command: list) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def _run(command: list, seconds: float = 60, text: str = "") -> subprocess.CompletedProcess[str]:
    # A refusal by the size of an allocation is llama.cpp's own to handle, as without a sanitizer.
    options = {"ASAN_OPTIONS": "allocator_may_return_null=1"}
    return subprocess.run(
        command, input=text, capture_output=True, text=True, errors="replace", timeout=seconds,
        env=os.environ | options, check=False,
    )  # fmt: skip
