"""``pt2-llama doctor``: what is there, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

from rich.table import Table

from pt2_core import formats
from pt2_core.commands import command
from pt2_core.errors import PT2Error
from pt2_core.files import human_bytes
from pt2_core.words import screen
from pt2_llama import builds, pinned, programs, source, toolchain
from pt2_llama.bindings import installed_version
from pt2_llama.build import NO_CUDA_KERNELS
from pt2_llama.builds import Build
from pt2_llama.cache import Places, folder_bytes
from pt2_llama.overlay import load_overlay, stamp_digest


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: "tools", "machine", "cache" or "builds".
        name: what was looked at.
        value: what was found.
        state: "ok", "missing" (needed; the exit status tells) or "note".
        advice: what to do, when there is something to do.
    """

    topic: str
    name: str
    value: str
    state: str = "ok"
    advice: str = ""


def tool_findings(where: Places) -> list[Finding]:
    """Programs that a build needs or profits from."""
    found = []
    try:
        _, cxx = toolchain.find_compilers()
        found.append(
            Finding("tools", "C++ compiler", f"{cxx}: {toolchain.first_line([cxx, '--version'])}")
        )
    except PT2Error as e:
        found.append(Finding("tools", "compiling", "not possible", "missing", str(e)))
    own, needed = programs.fetched(where), programs.missing(where)
    cmake, ninja = toolchain.find_cmake(own["cmake"]), toolchain.find_ninja(own["ninja"])
    fetches = "pt2-llama build fetches it into the cache"
    if cmake is None or "cmake" in needed:
        old = f"{cmake} is too old" if cmake else "no"
        found.append(Finding("tools", "cmake", old, "note", fetches))
    else:
        version = ".".join(map(str, toolchain.cmake_version(cmake)))
        found.append(Finding("tools", "cmake", f"{cmake}: {version}"))
    if ninja:
        found.append(Finding("tools", "ninja", ninja))
    elif "ninja" in needed:
        found.append(Finding("tools", "ninja", "no", "note", fetches))
    else:
        advice = "pip install ninja makes small rebuilds quicker"
        found.append(Finding("tools", "ninja", "no, make is used", "note", advice))
    if ccache := shutil.which("ccache"):
        found.append(Finding("tools", "ccache", ccache))
    else:
        advice = "optional: makes a second build from nothing quick"
        found.append(Finding("tools", "ccache", "no", "note", advice))
    return found + python_findings()


def python_findings() -> list[Finding]:
    """What this Python has of pip and of the bindings."""
    found = []
    if importlib.util.find_spec("pip") is None:
        advice = f"{command(sys.executable, '-m', 'ensurepip')}, or build with --source"
        found.append(Finding("tools", "pip", "no (fetches the source)", "note", advice))
    bindings = installed_version()
    if bindings == pinned.VERSION:
        found.append(Finding("tools", pinned.PACKAGE, bindings))
    else:
        advice = "pt2-eval needs it for GGUF files: pt2-llama bindings"
        value = f"{bindings}, not {pinned.VERSION}" if bindings else "no"
        found.append(Finding("tools", pinned.PACKAGE, value, "note", advice))
    return found


def machine_findings() -> list[Finding]:
    """CPU, memory, GPU, CUDA."""
    flags = set(toolchain.cpu_flags())
    known = "avx2 avx_vnni avx512f avx512_vnni avx512vbmi amx_int8 asimd asimddp i8mm sve"
    shown = " ".join(f for f in known.split() if f in flags) or "no vector extensions listed"
    cpus, memory = toolchain.cpu_count(), human_bytes(toolchain.available_memory())
    found = [
        Finding("machine", "CPU", f"{cpus} x {toolchain.cpu_model()}: {shown}"),
        Finding("machine", "free memory", memory),
    ]
    gpus = toolchain.gpus()
    names = ", ".join(f"{name} (sm_{capability})" for name, capability in gpus)
    found.append(Finding("machine", "GPU", names or "none visible", "ok" if gpus else "note"))
    nvcc = toolchain.find_nvcc()
    if nvcc is None:
        found.append(Finding("machine", "CUDA", "no nvcc", "note", "only build --cuda needs it"))
        return found
    found.append(Finding("machine", "CUDA", f"{nvcc} {toolchain.nvcc_version(nvcc)}"))
    try:
        found.append(Finding("machine", "cuBLAS", toolchain.find_cublas(nvcc).origin))
    except PT2Error as e:
        found.append(Finding("machine", "cuBLAS", "missing", "note", str(e)))
    return found


def cache_findings(where: Places) -> list[Finding]:
    """What the cache holds, and whether the patched tree is current."""
    free = shutil.disk_usage(_existing_parent(where)).free
    found = [Finding("cache", "folder", f"{where.root} ({human_bytes(free)} free)")]
    for folder in (where.pristine, where.patched, where.objects, where.builds):
        size = folder_bytes(folder)
        found.append(Finding("cache", folder.name, human_bytes(size) if size else "empty"))
    digest = load_overlay(where.overlay).digest()
    done = stamp_digest(where.patched)
    if done is not None and done != digest:
        advice = "the next build or source_dir() patches again"
        found.append(Finding("cache", "patched source", "of an older overlay", "note", advice))
    found.append(Finding("cache", "source", source.describe_pin()))
    found.append(Finding("cache", "current overlay", digest[:8]))
    return found


def _existing_parent(where: Places) -> str:
    folder = where.root
    while not folder.exists():
        folder = folder.parent
    return str(folder)


def build_findings(where: Places, ask: Callable[[Build], str] | None = None) -> list[Finding]:
    """The builds, whether they match, and which kernels our types use in them.

    Args:
        ask: returns the kernel path of a build (tests put their own in).
    """
    found = []
    current = {v: b for v in builds.VARIANTS if (b := builds.find_build(where, v))}
    for variant in builds.VARIANTS:
        command = f"run: {builds.build_command(variant)}"
        if build := current.get(variant):
            found.append(Finding("builds", variant, build.describe()))
            found += [Finding("builds", f"{variant} note", n, "note") for n in build.stamp.notes]
            if variant != "stock":
                found.append(_kernel_finding(build, ask or kernel_words))
        else:
            older = any(b.variant == variant for b in builds.all_builds(where))
            value = "does not match the current overlay or CPU" if older else "not built"
            needed = variant == "cpu" and "cuda" not in current
            found.append(
                Finding("builds", variant, value, "missing" if needed else "note", command)
            )
    if not load_overlay(where.overlay).has_cuda_kernels():
        found.append(Finding("builds", "cuda types", NO_CUDA_KERNELS, "note"))
    return found


def _kernel_finding(build: Build, ask: Callable[[Build], str]) -> Finding:
    name = f"{build.variant} kernels of {', '.join(formats.NAMES)}"
    forced = os.environ.get("GGML_TQ_CPU")
    try:
        value = ask(build) + (f" (GGML_TQ_CPU={forced})" if forced else "")
        return Finding("builds", name, value)
    except PT2Error as e:
        return Finding("builds", name, "unknown", "missing", str(e))


def kernel_words(build: Build) -> str:
    """A build's CPU path for our types, and those this machine runs.

    Raises:
        PT2Error: the library cannot be asked, or has none of our types.
    """
    path = build.kernel_path()
    if path is None:
        raise PT2Error(f"the CPU backend in {build.lib_dir} has no kernels of ours")
    return f"{path.active} on the CPU (this machine runs {', '.join(path.supported)})"


def doctor(where: Places, as_json: bool = False) -> int:
    """Print the report on stdout; returns 1 when something needed is missing, else 0."""
    findings = [
        *tool_findings(where),
        *machine_findings(),
        *cache_findings(where),
        *build_findings(where),
    ]
    missing = [f for f in findings if f.state == "missing"]
    if as_json:
        print(json.dumps([asdict(f) for f in findings], indent=1))
        return 1 if missing else 0
    table = Table(box=None, pad_edge=False, show_header=False)
    for column in ("topic", "name"):
        table.add_column(column, no_wrap=True)
    table.add_column("value", overflow="fold")
    colours = {"ok": "", "note": "yellow", "missing": "red"}
    topic = ""
    for f in findings:
        mark = {"ok": "", "note": "- ", "missing": "! "}[f.state]
        text = f"{mark}{f.value}" + (f"; {f.advice}" if f.advice else "")
        table.add_row(f.topic if f.topic != topic else "", f.name, text, style=colours[f.state])
        topic = f.topic
    console = screen(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    if missing:
        console.print(f"{len(missing)} needed: {'; '.join(f.advice or f.name for f in missing)}")
    return 1 if missing else 0
