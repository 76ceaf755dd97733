"""What this machine can build with: compilers, CMake, Ninja, ccache, CUDA, cuBLAS, and its CPU."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pt2_core.errors import PT2Error
from pt2_core.process import children

MIN_CMAKE = (3, 18)
BYTES_PER_JOB = {"cpu": 1_500_000_000, "cuda": 3_000_000_000}


@dataclass(frozen=True)
class Toolchain:
    """Programs for a build. ``ninja`` is None where make is used."""

    cmake: str
    ninja: str | None
    cc: str
    cxx: str
    cxx_version: str
    ccache: str | None
    nvcc: str | None = None
    nvcc_version: str | None = None

    @property
    def generator(self) -> str:
        """What CMake calls the build program."""
        return "Ninja" if self.ninja else "Unix Makefiles"


@dataclass(frozen=True)
class Cublas:
    """Where cuBLAS is. ``include`` is None when the toolkit's own folder has it."""

    include: Path | None
    library: Path | None
    origin: str


def first_line(command: Sequence[str]) -> str:
    """First line a program prints, or "" when it cannot be run."""
    try:
        done = children.run(command, timeout=30)
    except children.CannotRun:
        return ""
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0].strip() if lines and done.returncode == 0 else ""


def cmake_version(cmake: str) -> tuple[int, ...]:
    """``(3, 25, 1)`` from ``cmake --version``; empty when it says something else."""
    match = re.search(r"cmake version (\d+)\.(\d+)(?:\.(\d+))?", first_line([cmake, "--version"]))
    return tuple(int(x or 0) for x in match.groups()) if match else ()


def _program(variable: str, names: Sequence[str]) -> str | None:
    own = os.environ.get(variable, "").strip()
    return next((p for name in ([own] if own else names) if (p := shutil.which(name))), None)


def _beside_python(name: str) -> str | None:
    """A program that pip put beside this Python: a virtual environment need not be active."""
    return shutil.which(name, path=sysconfig.get_path("scripts"))


def new_enough(cmake: str) -> bool:
    """Whether llama.cpp can be configured with this CMake."""
    return cmake_version(cmake) >= MIN_CMAKE


def find_cmake(fetched: Path | None = None) -> str | None:
    """CMake on PATH, beside this Python, or ``fetched``: the first that is new enough.

    Where all are too old, the first of them.
    """
    places = [shutil.which("cmake"), _beside_python("cmake")]
    if fetched is not None and fetched.is_file():
        places.append(str(fetched))
    found = [place for place in places if place]
    return next((f for f in found if new_enough(f)), found[0] if found else None)


def find_ninja(fetched: Path | None = None) -> str | None:
    """Ninja on PATH, beside this Python, or ``fetched``."""
    own = str(fetched) if fetched is not None and fetched.is_file() else None
    on_path = shutil.which("ninja") or shutil.which("ninja-build")
    return on_path or _beside_python("ninja") or own


def find_compilers() -> tuple[str, str]:
    """The C and the C++ compiler of CC and CXX, else of PATH.

    Raises:
        PT2Error: one is missing, and how to get it.
    """
    cc = _program("CC", ("cc", "gcc", "clang"))
    cxx = _program("CXX", ("c++", "g++", "clang++"))
    if cc is None or cxx is None:
        which = "C" if cc is None else "C++"
        raise PT2Error(
            f"no {which} compiler: apt install build-essential, or set CC and CXX to one"
        )
    return cc, cxx


def find_toolchain(cuda: bool = False, fetched: Mapping[str, Path] | None = None) -> Toolchain:
    """Find everything a build needs.

    Args:
        fetched: paths of "cmake" and "ninja" that count where the machine has none; they need not
            exist.

    Raises:
        PT2Error: what is missing, and how to get it.
    """
    fetched = fetched or {}
    cc, cxx = find_compilers()
    cmake = find_cmake(fetched.get("cmake"))
    if cmake is None:
        raise PT2Error("cmake is missing: apt install cmake, or pip install cmake ninja")
    if not new_enough(cmake):
        shown = ".".join(map(str, cmake_version(cmake))) or "an unknown version"
        raise PT2Error(
            f"cmake {MIN_CMAKE[0]}.{MIN_CMAKE[1]} or newer is needed, {cmake} is {shown}"
        )
    ninja = find_ninja(fetched.get("ninja"))
    if ninja is None and shutil.which("make") is None:
        raise PT2Error(
            "neither ninja nor make is there: apt install ninja-build, or pip install ninja"
        )
    nvcc = find_nvcc() if cuda else None
    if cuda and nvcc is None:
        raise PT2Error(
            "--cuda needs nvcc, which is not on PATH nor in $CUDA_HOME/bin or /usr/local/cuda/bin: "
            "install the CUDA toolkit, or build without --cuda"
        )
    return Toolchain(
        cmake=cmake,
        ninja=ninja,
        cc=cc,
        cxx=cxx,
        cxx_version=first_line([cxx, "--version"]),
        ccache=shutil.which("ccache"),
        nvcc=nvcc,
        nvcc_version=nvcc_version(nvcc) if nvcc else None,
    )


def find_nvcc() -> str | None:
    """nvcc on PATH, in ``$CUDA_HOME``/``$CUDA_PATH``, or in /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.path.join(home, "bin") for home in homes if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(places))


def nvcc_version(nvcc: str) -> str:
    """``13.0.88`` from ``nvcc --version``, "" when it cannot be read."""
    try:
        done = children.run([nvcc, "--version"], timeout=30)
    except children.CannotRun:
        return ""
    match = re.search(r"\bV(\d+\.\d+\.\d+)", done.stdout)
    return match.group(1) if match else ""


def toolkit_root(nvcc: str) -> Path:
    """The CUDA toolkit's folder, as nvcc itself names it (it may be a wrapper or a link)."""
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    try:
        done = children.run(command, timeout=30)
    except children.CannotRun:
        done = None
    match = re.search(r"^#\$ TOP=(.+)$", done.stderr + done.stdout, re.M) if done else None
    return Path(match.group(1)).resolve() if match else Path(nvcc).resolve().parents[1]


def gpus() -> list[tuple[str, str]]:
    """(name, compute capability as ``90``) of each visible NVIDIA GPU; empty without a driver."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        done = children.run(query, timeout=30)
    except children.CannotRun:
        return []
    found = []
    for line in done.stdout.splitlines() if done.returncode == 0 else []:
        name, _, capability = line.rpartition(",")
        if re.fullmatch(r"\s*\d+\.\d+\s*", capability):
            found.append((name.strip(), capability.strip().replace(".", "")))
    return found


def cuda_architectures(wanted: str | None) -> str:
    """The value of CMAKE_CUDA_ARCHITECTURES: what is wanted, else the visible GPUs' own.

    90 and 90-real become 90a and 90a-real, for only these have Hopper's tensor-core instructions
    (wgmma). Such code runs on compute capability 9.0 alone; 90-virtual is left as it is.

    Raises:
        PT2Error: nothing is wanted and no GPU is visible.
    """
    if wanted:
        if not re.fullmatch(r"\d+[a-z]?(-real|-virtual)?([;,]\d+[a-z]?(-real|-virtual)?)*", wanted):
            raise PT2Error(f"--cuda-arch {wanted!r}: expected numbers such as 90 or 86,90")
        return _with_hopper_features(wanted.replace(",", ";"))
    if not (found := sorted({capability for _, capability in gpus()})):
        raise PT2Error(
            "no GPU is visible (nvidia-smi), so say what to build for: --cuda-arch 90 for H100 and "
            "H200, 89 for Ada, 86 for RTX 30, 80 for A100"
        )
    return _with_hopper_features(";".join(found))


def _with_hopper_features(architectures: str) -> str:
    return re.sub(r"\b90(?=-real|;|$)", "90a", architectures)


def find_cublas(nvcc: str) -> Cublas:
    """cuBLAS of the toolkit, else of the PyPI package nvidia-cublas in this Python.

    Raises:
        PT2Error: neither has both the header and the library.
    """
    home = toolkit_root(nvcc)
    target = f"targets/{platform.machine()}-linux"
    headers = [home / "include", home / target / "include"]
    libraries = [home / "lib64", home / "lib", home / target / "lib"]
    libraries += [Path(f"/usr/lib/{platform.machine()}-linux-gnu")]
    if any((h / "cublas_v2.h").is_file() for h in headers) and any(
        (f / "libcublas.so").exists() for f in libraries
    ):
        return Cublas(None, None, f"toolkit {home}")
    for folder in _python_cublas_folders():
        found = sorted(folder.glob("lib/libcublas.so*"))
        if (folder / "include" / "cublas_v2.h").is_file() and found:
            return Cublas(folder / "include", found[0], f"Python package in {folder}")
    major = (nvcc_version(nvcc).split(".") or ["?"])[0]
    package = "nvidia-cublas" if major not in ("11", "12") else f"nvidia-cublas-cu{major}"
    raise PT2Error(
        f"{nvcc} comes without cuBLAS: install the toolkit's (apt install libcublas-dev-...), "
        f"or pip install {package}"
    )


def _python_cublas_folders() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    return [p for root in roots for p in (*sorted(root.glob("cu[0-9]*")), root / "cublas")]


def has_driver_library(nvcc: str) -> bool:
    """Whether there is a libcuda.so to link with: the toolkit's stub, or an installed driver."""
    home = toolkit_root(nvcc)
    target = f"targets/{platform.machine()}-linux"
    stubs = [home / "lib64/stubs", home / "lib/stubs", home / target / "lib/stubs"]
    system = [Path(f"/usr/lib/{platform.machine()}-linux-gnu"), Path("/usr/lib64")]
    return any((folder / "libcuda.so").exists() for folder in [*stubs, *system])


def cpu_flags() -> list[str]:
    """The CPU's feature names as the kernel lists them, sorted; empty where it does not."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return sorted(match.group(1).split()) if match else []


def cpu_model() -> str:
    """The CPU's name, else its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.machine()


def cpu_signature() -> str:
    """Twelve hex digits that change when a native build for this CPU would."""
    text = f"{platform.system()} {platform.machine()} {cpu_model()} {' '.join(cpu_flags())}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def compiler_sees_amx(cc: str) -> bool:
    """Whether ``-march=native`` makes this compiler use AMX (so that ggml does)."""
    command = [cc, "-march=native", "-dM", "-E", "-x", "c", os.devnull]
    try:
        done = children.run(command, timeout=30)
    except children.CannotRun:
        return False
    return "__AMX_INT8__" in done.stdout


def available_memory() -> int:
    """Bytes this process may still use: the lesser of the machine's and the cgroup's."""
    limits = []
    try:
        text = Path("/proc/meminfo").read_text()
        limits += [int(m) * 1024 for m in re.findall(r"^MemAvailable:\s+(\d+) kB", text, re.M)]
        top = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if top.isdigit():
            limits.append(int(top) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no such accounting here; what was found counts
    return min(limits) if limits else 4_000_000_000


def cpu_count() -> int:
    """CPUs this process may run on."""
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:
        return os.cpu_count() or 1


def default_jobs(kind: str) -> int:
    """Parallel compilers that fit the CPUs and the memory (``kind``: "cpu" or "cuda")."""
    return max(1, min(cpu_count(), available_memory() // BYTES_PER_JOB[kind]))
