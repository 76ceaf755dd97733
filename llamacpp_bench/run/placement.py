"""Where llama.cpp did the work on each weight, read from the log of its scheduler."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from llamacpp_bench.results import Placement
from llamacpp_bench.run.llama_bench import bench_command
from llamacpp_bench.run.load import Load
from llamacpp_bench.run.process import run_tool
from llamacpp_bench.run.tools import ToolBox
from pt2_core import formats
from pt2_core.errors import PT2Error
from pt2_core.gguf_info import GGUFInfo

_NODE = re.compile(
    r"^node #\s*\d+ \(\s*(\S+)\):\s*(.*?) \(\s*\S+\) \[\s*(\S+)\s[^\]]*\][^:]*:(.*)$"
)
_REJECTED = re.compile(r"resolve_fused_ops: .* not supported, set to disabled")
_SOURCE = re.compile(r"\s*(.{1,20}?) \(\s*\S+\) \[\s*\S+\s[^\]]*\]")
_REPACK = re.compile(r"repack tensor (\S+) (?:with|of type) (\S+)")
_BUFFER = re.compile(
    r"(\S+)\s+(model|KV|compute|output|RS) buffer size\s*=\s*([\d.]+) MiB", re.MULTILINE
)
_NAME_WIDTH = 20  # the scheduler prints tensor names cut to this
_WEIGHT_OPS = ("MUL_MAT", "MUL_MAT_ID", "GET_ROWS")


def probe_placement(
    tools: ToolBox, info: GGUFInfo, load: Load, log: Path
) -> tuple[Placement, dict[str, float]]:
    """Run the model once for a few tokens and read from the log where each weight's work was done.

    The backend scheduler prints, under GGML_SCHED_DEBUG=2, every node of the graph with its backend
    and its inputs: that is what ran, not what was hoped for. The CPU backend says which weights it
    repacked.

    Returns:
        The placement, and the sizes of llama.cpp's buffers in MiB (`CPU model`, `CUDA0 KV`, ...).
    """
    prompt = min(load.prompt, 64) if load.prompt else 8
    small = replace(load, prompt=prompt, gen=1, pg=(), depths=(0,))
    argv = [*bench_command(tools, info.path, small), "--no-warmup", "-v"]
    run_tool(argv, {**tools.env, "GGML_SCHED_DEBUG": "2"}, log, timeout=load.tool_timeout)
    text = log.read_text("utf-8", "replace")
    placement = parse_placement(text, info)
    ours = [k for k, ops in placement.ops.items() if k in formats.NAMES and on_cpu(ops)]
    if ours and (path := tools.ternary_path()):
        placement.kernels = dict.fromkeys(ours, path)
    if not placement.ops:
        raise PT2Error(
            f"llama.cpp's log does not say where the tensors ran (log: {log}); "
            "use a build of pt2-llama, or --placement none"
        )
    return placement, parse_buffers(text)


def on_cpu(ops: dict[str, dict[str, int]]) -> bool:
    """Whether any multiplication is done by the CPU backend."""
    return any("CPU" in backends for op, backends in ops.items() if op.startswith("MUL_MAT"))


def parse_buffers(log: str) -> dict[str, float]:
    """Largest size in MiB of each buffer that the log names."""
    sizes: dict[str, float] = {}
    for backend, kind, mib in _BUFFER.findall(log):
        key = f"{backend} {kind}"
        sizes[key] = max(sizes.get(key, 0.0), float(mib))
    return sizes


def parse_placement(log: str, info: GGUFInfo) -> Placement:
    """Read the scheduler's nodes and the repacking from a verbose log of llama.cpp."""
    type_of: dict[str, str] = {}
    for t in info.tensors:
        type_of[t.name[:_NAME_WIDTH]] = t.type.name
    full = {t.name: t.type.name for t in info.tensors}
    seen: dict[tuple[str, str, str], set[str]] = {}
    elsewhere: dict[str, None] = {}
    expected: dict[str, None] = {}
    accelerated = False
    for match in _graph_nodes(log):
        op, node, backend, sources = match[1], match[2].strip(), match[3], match[4]
        weight = _weight_of(sources, type_of)
        if op in _WEIGHT_OPS and weight is not None:
            seen.setdefault((type_of[weight], op, backend), set()).add(weight)
        if backend != "CPU":
            accelerated = True
        elif op == "GET_ROWS" and weight is not None and weight.startswith("token_embd"):
            expected[f"{op} of {weight} ({type_of[weight]})"] = None
        else:
            of = f" of {weight} ({type_of[weight]})" if weight else ""
            elsewhere[f"{op} {node}{of}"] = None
    ops: dict[str, dict[str, dict[str, int]]] = {}
    for (kind, op, backend), names in sorted(seen.items()):
        ops.setdefault(kind, {}).setdefault(op, {})[backend] = len(names)
    repacked = _count_repacked(log, full)
    if not accelerated:
        return Placement(ops, repacked, {})
    return Placement(ops, repacked, {}, list(elsewhere), list(expected))


def _graph_nodes(log: str) -> list[re.Match[str]]:
    """The nodes of all graphs, without those that were drawn up as a question only.

    To learn whether the devices have fused attention, llama.cpp plans a graph with it and, if some
    of it would land elsewhere, says so and never runs that graph.
    """
    graphs: list[list[re.Match[str]]] = [[]]
    for line in log.splitlines():
        if line.startswith("graph_reserve:"):
            graphs.append([])
        elif _REJECTED.match(line):
            graphs[-1].clear()
        elif match := _NODE.match(line):
            graphs[-1].append(match)
    return [node for graph in graphs for node in graph]


def _weight_of(sources: str, type_of: dict[str, str]) -> str | None:
    """The first input of a node that is a tensor of the file (by its shortened name)."""
    for name in _SOURCE.findall(sources):
        if name.strip() in type_of:
            return str(name.strip())
    return None


def _count_repacked(log: str, type_of: dict[str, str]) -> dict[str, dict[str, int]]:
    layouts: dict[str, dict[str, set[str]]] = {}
    for name, layout in _REPACK.findall(log):
        if name in type_of:
            layouts.setdefault(type_of[name], {}).setdefault(layout, set()).add(name)
    return {k: {n: len(s) for n, s in v.items()} for k, v in layouts.items()}
