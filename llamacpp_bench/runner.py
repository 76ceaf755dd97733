"""llama-bench: its command, its JSON, the order of the runs, and where the work was done.

The runs are interleaved: each round calls llama-bench once per model, and each round begins with
the next model, so that a machine that warms up, throttles or gets company slows all models alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamacpp_bench.gguf_info import GGUFInfo
from llamacpp_bench.process import Finished, run_tool
from llamacpp_bench.results import Placement
from llamacpp_bench.tools import ToolBox
from pt2_core import formats
from pt2_core.errors import PT2Error

# Tools with a log thread may exit before it has written the last line (docs/design.md).
LOST_LINE_TRIES = 4


@dataclass(frozen=True)
class Load:
    """What one llama-bench call times.

    `prompt`, `gen`: lengths in tokens, 0 leaves the test out; `pg`: pairs (prompt, generated)
    timed together; `depths`: tokens already in the KV cache when the clock starts;
    `batches`: numbers of sequences decoded at once (by llama-batched-bench), `batch_gen` tokens
    each after `batch_prompt`. `repeats`: passes of each test in one call of llama-bench, whose mean
    is the call's figure. `timeout`: seconds after which one call is stopped.
    """

    prompt: int = 128
    gen: int = 256
    pg: tuple[tuple[int, int], ...] = ((128, 256),)
    depths: tuple[int, ...] = (0,)
    threads: int | None = None
    gpu_layers: int | None = None
    repack: bool = True
    batches: tuple[int, ...] = ()
    batch_prompt: int = 128
    batch_gen: int = 256
    repeats: int = 1
    timeout: float | None = None

    @property
    def plain(self) -> bool:
        """Whether llama-bench has anything to time."""
        return bool(self.prompt or self.gen or self.pg)

    def arguments(self) -> list[str]:
        """llama-bench's options for this load (no model, no repetitions)."""
        args = ["-p", str(self.prompt), "-n", str(self.gen)]
        for p, n in self.pg:
            args += ["-pg", f"{p},{n}"]
        if self.depths != (0,):
            args += ["-d", ",".join(map(str, self.depths))]
        if self.threads is not None:
            args += ["-t", str(self.threads)]
        if self.gpu_layers is not None:
            args += ["-ngl", str(self.gpu_layers)]
        if not self.repack:
            args += ["--repack", "0"]
        return args


def bench_command(tools: ToolBox, model: Path, load: Load) -> list[str]:
    fixed = ["-r", str(load.repeats), "-o", "json"]
    return [str(tools.tool("llama-bench")), "-m", str(model), *load.arguments(), *fixed]


def test_name(entry: dict[str, Any]) -> str:
    """`pp128`, `tg256`, `pp128+tg256`; `@d4096` is added for a depth."""
    parts = []
    if entry["n_prompt"]:
        parts.append(f"pp{entry['n_prompt']}")
    if entry["n_gen"]:
        parts.append(f"tg{entry['n_gen']}")
    depth = f"@d{entry['n_depth']}" if entry.get("n_depth") else ""
    return "+".join(parts) + depth


def parse_bench_json(text: str, log: Path) -> list[dict[str, Any]]:
    """The entries of llama-bench's `-o json`.

    Raises:
        PT2Error: not the JSON expected, or no speed in it.
    """
    try:
        entries = json.loads(text)
        good = [e for e in entries if test_name(e) and min(map(float, e["samples_ts"])) > 0]
    except (ValueError, KeyError, TypeError, IndexError) as e:
        raise PT2Error(f"llama-bench gave something that is not its JSON (log: {log})") from e
    if not good or len(good) != len(entries):
        raise PT2Error(f"llama-bench gave no speed (log: {log})")
    return good


def run_bench(
    tools: ToolBox, model: Path, load: Load, log: Path
) -> tuple[list[dict[str, Any]], Finished]:
    """One call of llama-bench: its entries, and how the program ended."""
    done = run_tool(bench_command(tools, model, load), tools.env, log, timeout=load.timeout)
    return parse_bench_json(done.stdout, log), done


def batched_command(tools: ToolBox, model: Path, load: Load) -> list[str]:
    """llama-batched-bench: decoded tokens after a prompt, for every number of sequences."""
    prompt, gen = max(1, load.batch_prompt), load.batch_gen
    args = [str(tools.tool("llama-batched-bench")), "-m", str(model), "--output-format", "jsonl"]
    args += ["-npp", str(prompt), "-ntg", str(gen), "-npl", ",".join(map(str, load.batches))]
    args += ["-c", str(max(load.batches) * (prompt + gen))]
    args += ["-t", str(load.threads)] if load.threads is not None else []
    args += ["-ngl", str(load.gpu_layers)] if load.gpu_layers is not None else []
    return args if load.repack else [*args, "--no-repack"]


def parse_batched(text: str, batches: Sequence[int]) -> dict[str, float] | None:
    """`{"tg256@b8": tokens/s of all sequences together}`; None unless every batch is there."""
    speeds: dict[str, float] = {}
    for line in text.splitlines():
        start = line.find("{")
        try:
            entry = json.loads(line[start:]) if start >= 0 else {}
            if "speed_tg" in entry:
                speeds[f"tg{entry['tg']}@b{entry['pl']}"] = float(entry["speed_tg"])
        except ValueError:
            continue
    return speeds if len(speeds) == len(set(batches)) else None


def run_batched(tools: ToolBox, model: Path, load: Load, log: Path) -> tuple[dict[str, float], int]:
    """Decode speed per number of sequences, and the peak memory in bytes."""
    argv = batched_command(tools, model, load)
    for _ in range(LOST_LINE_TRIES):
        done = run_tool(argv, tools.env, log, timeout=load.timeout)
        speeds = parse_batched(done.stdout + log.read_text("utf-8", "replace"), load.batches)
        if speeds:
            return speeds, done.peak_rss
    raise PT2Error(f"llama-batched-bench gave no speed for some batch (log: {log})")


def interleave(n_models: int, rounds: int) -> list[tuple[int, int]]:
    """The order of the runs as (round, model): every round has each model once, and starts one on.

    >>> interleave(2, 2)
    [(0, 0), (0, 1), (1, 1), (1, 0)]
    """
    return [(r, (r + i) % n_models) for r in range(rounds) for i in range(n_models)]


# ------------------------------------------------------------------------- where the work was done

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
    run_tool(argv, {**tools.env, "GGML_SCHED_DEBUG": "2"}, log, timeout=load.timeout)
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


def shown_command(argv: Sequence[str | Path]) -> str:
    """A command as it is written into the results: programs and files by name, without folders."""
    return " ".join(Path(a).name if "/" in str(a) else str(a) for a in argv)
