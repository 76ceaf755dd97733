"""Configure and compile a source tree with CMake, with progress, a log, and failures explained."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pt2_core.errors import PT2Error
from pt2_core.process import children
from pt2_core.progress import Reporter, open_reporter, say
from pt2_llama import pinned
from pt2_llama.toolchain import Cublas, Toolchain

TOOLS: tuple[str, ...] = (
    "llama-cli",
    "llama-completion",
    "llama-bench",
    "llama-batched-bench",
    "llama-quantize",
    "llama-perplexity",
    "llama-imatrix",
    "llama-server",
    "llama-gguf-split",
    "llama-tokenize",
)
# `stock` is there to be measured and to prove that our Q2_K files need no patch.
STOCK_TOOLS: tuple[str, ...] = (
    "llama-completion",
    "llama-bench",
    "llama-quantize",
    "llama-perplexity",
    "llama-tokenize",
)
TEST_TOOLS: tuple[str, ...] = ("test-backend-ops", "test-quantize-fns")

NO_AMX_FILE = "no-amx.cmake"
# GGML_AMX_* only matter without GGML_NATIVE; with it, -march=native defines the compiler's own
# macros, and ggml asks those. They are undefined for ggml alone, so little is compiled again.
NO_AMX_CMAKE = "add_compile_options(-U__AMX_TILE__ -U__AMX_INT8__ -U__AMX_BF16__)\n"

_STEP = re.compile(r"^\[\s*(\d+)(?:/(\d+)|%)\]\s*(.*)$")
_ERROR = re.compile(r"(\berror\b[: ]|\bError \d|FAILED:|undefined reference|No space left|Killed)")


def base_flags() -> list[str]:
    """CMake options of every build: a release without network access or host-dependent numbers."""
    return [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DBUILD_SHARED_LIBS=ON",
        "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
        "-DLLAMA_BUILD_APP=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF",
        "-DLLAMA_BUILD_TESTS=ON",
        "-DLLAMA_BUILD_UI=OFF",
        "-DLLAMA_USE_PREBUILT_UI=OFF",
        "-DLLAMA_OPENSSL=OFF",
        "-DLLAMA_BUILD_NUMBER=1",
        f"-DLLAMA_BUILD_COMMIT={pinned.LLAMA_COMMIT}",
        "-DGGML_CCACHE=OFF",
        "-DGGML_METAL=OFF",
        "-DGGML_NATIVE=ON",
    ]


def cuda_flags(architectures: str, nvcc: str, cublas: Cublas, driver: bool) -> list[str]:
    """CMake options of a CUDA build.

    Args:
        architectures: value of CMAKE_CUDA_ARCHITECTURES, such as ``90a`` or ``86;90a``.
        cublas: from :func:`toolchain.find_cublas`.
        driver: whether there is a libcuda.so to link with; only the virtual memory pool needs it.
    """
    flags = [
        "-DGGML_CUDA=ON",
        f"-DCMAKE_CUDA_ARCHITECTURES={architectures}",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        "-DGGML_CUDA_NCCL=OFF",
        f"-DGGML_CUDA_NO_VMM={'OFF' if driver else 'ON'}",
    ]
    if cublas.include is not None and cublas.library is not None:
        folder = cublas.library.parent
        flags += [
            f"-DCUDA_cublas_LIBRARY={cublas.library}",
            f"-DCMAKE_CUDA_FLAGS=-I{cublas.include}",
            f"-DCMAKE_CXX_FLAGS=-I{cublas.include}",
            f"-DCMAKE_BUILD_RPATH={folder}",
            f"-DCMAKE_EXE_LINKER_FLAGS=-Wl,-rpath-link,{folder}",
        ]
    return flags


def toolchain_flags(tc: Toolchain) -> list[str]:
    """CMake options that name the programs found."""
    flags = [f"-DCMAKE_C_COMPILER={tc.cc}", f"-DCMAKE_CXX_COMPILER={tc.cxx}"]
    if tc.ccache:
        languages = ("C", "CXX", "CUDA") if tc.nvcc else ("C", "CXX")
        flags += [f"-DCMAKE_{lang}_COMPILER_LAUNCHER={tc.ccache}" for lang in languages]
    return flags


def amx_flags(objects: Path, amx: bool) -> list[str]:
    """CMake options that leave AMX as it is, or keep ggml from using it.

    Either way the setting is given, so that an object folder which has the other one changes.
    """
    if amx:
        return ["-UCMAKE_PROJECT_ggml_INCLUDE"]
    file = objects / NO_AMX_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.is_file() or file.read_text() != NO_AMX_CMAKE:
        file.write_text(NO_AMX_CMAKE)
    off = [f"-DGGML_AMX_{unit}=OFF" for unit in ("TILE", "INT8", "BF16")]
    return [f"-DCMAKE_PROJECT_ggml_INCLUDE={file}", *off]


def build_environment(tree: Path) -> dict[str, str]:
    """Environment for CMake and ninja.

    The cache may lie inside a git repository of somebody else: CMake must not take its commit for
    llama.cpp's.
    """
    return os.environ | {
        "NINJA_STATUS": "[%f/%t] ",
        "GIT_CEILING_DIRECTORIES": str(tree.parent),
        "CCACHE_BASEDIR": str(tree.parent),
        "CCACHE_SLOPPINESS": "time_macros",
        "LC_ALL": "C",
    }


def configure(tc: Toolchain, tree: Path, objects: Path, flags: Sequence[str], log: Path) -> None:
    """Run CMake.

    Raises:
        PT2Error: with the reason and the log's path.
    """
    objects.mkdir(parents=True, exist_ok=True)
    command = [tc.cmake, "-S", str(tree), "-B", str(objects), "-G", tc.generator, *flags]
    if tc.ninja:  # it need not be on PATH
        command.append(f"-DCMAKE_MAKE_PROGRAM={tc.ninja}")
    with open_reporter().phase("configuring"):
        status = run_logged(command, build_environment(tree), log)
        if status != 0:
            raise PT2Error(explain_failure("configuring", log))


def compile_targets(
    tc: Toolchain, tree: Path, objects: Path, targets: Sequence[str], jobs: int, log: Path
) -> None:
    """Compile the targets with a progress bar.

    Raises:
        PT2Error: with the reason and the log's path.
    """
    command = [tc.cmake, "--build", str(objects), "--parallel", str(jobs), "--target", *targets]
    with open_reporter().phase("compiling", unit="steps", every=5) as bar:
        status = run_logged(command, build_environment(tree), log, bar)
        if status != 0:
            raise PT2Error(explain_failure("compiling", log))


def parse_step(line: str) -> tuple[int, int, str] | None:
    """``[12/230] Building x`` -> (12, 230, ...); make's ``[ 45%] ...`` -> (45, 100, ...)."""
    match = _STEP.match(line)
    if match is None:
        return None
    return int(match.group(1)), int(match.group(2) or 100), match.group(3)


def run_logged(
    command: Sequence[str], env: Mapping[str, str], log: Path, bar: Reporter | None = None
) -> int:
    """Run a program, append what it prints to ``log``, and feed its steps to ``bar``.

    Returns its exit status. The program and its children stop when this process is interrupted.
    """
    with log.open("a", encoding="utf-8", errors="replace") as out:
        out.write("$ " + " ".join(command) + "\n")
        out.flush()
        # The whole tree: a ninja that lives on would write into the next build's objects.
        with children.child(
            command,
            env=env,
            tree=True,
            stdout=children.PIPE,
            stderr=children.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                out.write(line)
                if bar is not None and (step := parse_step(line)):
                    bar.reach(step[0], _object_name(step[2]), step[1])
            return process.wait()


def _object_name(action: str) -> str:
    name = action.split()[-1] if action.split() else ""
    return name.rsplit("/", 1)[-1].removesuffix(".o")[:32]


_REASONS = (
    (
        "No space left on device",
        "the disk is full; free some space or set PT2_CACHE to a larger one",
    ),
    ("Killed signal terminated program", "the compiler ran out of memory; use fewer --jobs"),
    ("fatal error: Killed", "the compiler ran out of memory; use fewer --jobs"),
    (
        "cublas_v2.h",
        "cuBLAS's headers are missing; install the toolkit's or pip install nvidia-cublas",
    ),
    (
        "CUDA_cublas_LIBRARY",
        "cuBLAS is missing; install the toolkit's or pip install nvidia-cublas",
    ),
    ("unsupported GNU version", "this nvcc does not take this gcc; set CC and CXX to an older one"),
    ("is not able to compile a simple test program", "the compiler does not work"),
    ("CMAKE_CUDA_COMPILER", "CMake cannot use nvcc"),
    ("CMAKE_CXX_COMPILER", "CMake finds no working C++ compiler; apt install build-essential"),
)


def explain_failure(doing: str, log: Path, shown: int = 12) -> str:
    """Show the log's last error lines on stderr; return one line with the reason and the path."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    run = text[text.rfind("\n$ ") + 1 :]
    lines = run.splitlines()
    errors = [line for line in lines if _ERROR.search(line)]
    for line in (errors or lines)[-shown:]:
        say(f"  {line[:300]}")
    reason = next((why for sign, why in _REASONS if sign in run), "see the lines above")
    return f"{doing} llama.cpp failed: {reason}; the whole log is {log}"
