"""Is what llama.cpp computes what PyTorch computed? Perplexities of one artifact in every form.

    python benchmarks/fidelity.py MODEL ARTIFACT --text wiki.test.txt --chunks 40 --out OUT

Exports the artifact in our types and as Q2_K (with the exporter's defaults), and compares the
perplexity of each file (llama-perplexity, windows of 512) with PyTorch's for the same alpha*T + mu
weights on the same windows: our types in our llama.cpp on each of the CPU's paths, Q2_K in
an unmodified llama.cpp (`pt2-llama build --stock`). Writes OUT/fidelity.json and OUT/fidelity.md;
exits with 1 when a file is further off than it may be (0.5 % and 2 %).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from pt2_core import formats
from pt2_core.cli import ArgumentParser, run_cli
from pt2_core.errors import PT2Error
from pt2_core.files import atomic_path, write_json

LIMITS = {**dict.fromkeys(formats.TYPES, 0.005), "q2_k": 0.02}
PATHS = ("generic", "avx2", "avx512")


def torch_perplexity(args: list[str]) -> float:
    """What `python -m quantize.evaluate ... --protocol llama.cpp` prints last."""
    command = [sys.executable, "-m", "quantize.evaluate", *args, "--protocol", "llama.cpp"]
    print("$", *command[1:], flush=True)
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    numbers = re.findall(r"\d+\.\d+", said)
    if not numbers:
        raise PT2Error(f"quantize.evaluate printed no perplexity: {said!r}")
    return float(numbers[0])


def llama_perplexity(variant: str, file: Path, text: str, chunks: int, path: str | None) -> float:
    """Final estimate of llama-perplexity, by one CPU path where `path` names it."""
    from pt2_llama.api import require_build

    threads = str(os.cpu_count() or 2)
    options = ["-f", text, "-c", "512", "--chunks", str(chunks), "-t", threads]
    print(f"$ GGML_TQ_CPU={path or ''} llama-perplexity -m", file, *options, flush=True)
    env = {"GGML_TQ_CPU": path} if path else {}
    return require_build(variant).perplexity(file, *options, env=env).perplexity()


def markdown(rows: list[dict[str, Any]], full: float, ours: float, chunks: int) -> str:
    lines = [
        f"PyTorch: full precision {full:.4f}, the artifact's alpha*T + mu {ours:.4f} "
        f"({chunks} windows of 512, the second half of each scored).",
        "",
        "| file | llama.cpp | CPU path | perplexity | against PyTorch | allowed |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['type']} | {r['build']} | {r['path']} | {r['perplexity']:.4f} | "
            f"{r['difference']:+.3%} | {r['limit']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def run(argv: list[str]) -> int:
    parser = ArgumentParser(prog="fidelity.py", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("artifact")
    parser.add_argument("--text", required=True)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("out/fidelity"))
    args = parser.parse_args(argv)
    from export import ExportConfig, export_gguf

    args.out.mkdir(parents=True, exist_ok=True)
    common = [args.model, "--text", args.text, "--chunks", str(args.chunks), "--device", "cpu"]
    full = torch_perplexity(common)
    ours = torch_perplexity([*common, "--artifact", args.artifact])
    rows: list[dict[str, Any]] = []
    for kind, limit in LIMITS.items():
        file = args.out / f"{kind}.gguf"
        config = ExportConfig(type=kind, overwrite=True)
        export_gguf(args.artifact, file, config, model_dir=args.model)
        runs = [("stock", None)] if kind == "q2_k" else [("cpu", p) for p in PATHS]
        for variant, path in runs:
            value = llama_perplexity(variant, file, args.text, args.chunks, path)
            rows.append(
                {"type": kind, "build": variant, "path": path or "stock", "perplexity": value,
                 "difference": value / ours - 1, "limit": limit, "bytes": file.stat().st_size}
            )  # fmt: skip
            print(f"{kind} {path or variant}: {value} ({value / ours - 1:+.3%})", flush=True)
    result = {"torch_full": full, "torch_ternary": ours, "chunks": args.chunks, "files": rows}
    write_json(args.out / "fidelity.json", result)
    with atomic_path(args.out / "fidelity.md") as tmp:
        tmp.write_text(markdown(rows, full, ours, args.chunks), encoding="utf-8")
    return int(any(abs(r["difference"]) > r["limit"] for r in rows))


if __name__ == "__main__":
    sys.exit(run_cli("fidelity", lambda: run(sys.argv[1:])))
