"""llama-bench and llama-batched-bench: their commands, their output, the order of the runs.

The runs are interleaved: each round calls llama-bench once per model, and each round begins with
the next model, so that a machine that warms up, throttles or gets company slows all models alike.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamacpp_bench.run.load import Load
from llamacpp_bench.run.process import Finished, run_tool
from llamacpp_bench.run.tools import ToolBox
from pt2_core.errors import PT2Error
from pt2_llama.perplexity import until_told


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
    done = run_tool(bench_command(tools, model, load), tools.env, log, timeout=load.tool_timeout)
    return parse_bench_json(done.stdout, log), done


def batched_command(tools: ToolBox, model: Path, load: Load) -> list[str]:
    """llama-batched-bench: decoded tokens after a prompt, for every number of sequences."""
    prompt = max(1, load.prompt if load.batch_prompt is None else load.batch_prompt)
    gen = load.gen if load.batch_gen is None else load.batch_gen
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

    def once() -> tuple[dict[str, float] | None, int]:
        done = run_tool(argv, tools.env, log, timeout=load.tool_timeout)
        output = done.stdout + log.read_text("utf-8", "replace")
        return parse_batched(output, load.batches), done.peak_rss

    speeds, peak = until_told(once, lambda found: found[0] is not None)
    if speeds is None:
        raise PT2Error(f"llama-batched-bench gave no speed for some batch (log: {log})")
    return speeds, peak


def interleave(n_models: int, rounds: int) -> list[tuple[int, int]]:
    """The order of the runs as (round, model): every round has each model once, and starts one on.

    >>> interleave(2, 2)
    [(0, 0), (0, 1), (1, 1), (1, 0)]
    """
    return [(r, (r + i) % n_models) for r in range(rounds) for i in range(n_models)]


def shown_command(argv: Sequence[str | Path]) -> str:
    """A command as it is written into the results: programs and files by name, without folders."""
    return " ".join(Path(a).name if "/" in str(a) else str(a) for a in argv)
