"""Settings of the closed-form stages, tried side by side on one GPU within a time limit.

    python benchmarks/closed_form.py wiki-llama-82m --tokens tokens.safetensors -o OUT --limit 220
    python benchmarks/closed_form.py MODEL --tokens FILE -o OUT --device cpu --workers 1

FILE holds token ids ``calibration`` and ``valid``, ``[n, 512]`` each. Three parts, all printed as
they come and written to OUT/closed_form.json:

1. the inner loop of the descent as a CUDA graph (``quantize.method.descent.RECORD``): equal to the
plain
   loop, bit for bit, and how much faster; the rest goes on without it where it is not;
2. the recipes paper, fast and best one after the other, alone on the machine: perplexity and time,
   for the rule that best takes at most ten times paper's; best's artifact goes to OUT/best.tar, in
   pieces of at most --part-bytes;
3. everything else in :data:`VARIANTS`, several at a time (their times say nothing).

The table of docs/quality.md comes from ``python -m quantize.ablate``; this is for finding settings.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pt2_core.files import write_json
from quantize.config import load_recipe
from quantize.evaluate import perplexity, windows
from quantize.method import descent
from quantize.method.gptq import Method, damp, quantize_matrix
from quantize.method.ternary import Grid
from quantize.model.torch_setup import arithmetic
from quantize.pipeline import ternarize

VARIANTS: list[dict[str, Any]] = [
    {"recipe": "best", "stream": 0.0},
    {"recipe": "best", "samples": 400},
    {"recipe": "best", "stream": 0.0, "asymmetry": 0.0},
    {"recipe": "best", "stream": 1.0},
    {"recipe": "best", "stream": 0.75, "asymmetry": 0.75},
    {"rounds": 8, "sweeps": 2, "noise": 0.1},
    {"rounds": 2, "sweeps": 4},
    {"recipe": "best", "asymmetry": 0.25},
    {"recipe": "best", "damping": 0.03},
    {"recipe": "best", "rounds": 24},
    {"recipe": "best", "asymmetry": 1.0, "stream": 1.0, "samples": 400},
    {"recipe": "best", "asymmetry": 0.25, "stream": 1.0},
    {"recipe": "best", "damping": 0.003},
    {"recipe": "best", "noise": 0.0},
    {"recipe": "best", "order": "hessian"},
    {"recipe": "best", "itf": False},
    {"recipe": "best", "sequential": False},
    {"recipe": "best", "samples": 256},
]


def check_recording(device: str) -> dict[str, Any]:
    """Descend and anneal with and without a recorded graph on one random problem."""
    generator = torch.Generator(device).manual_seed(0)
    rows, cols = 2048, 768

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator)

    mixing = random(cols, cols) / cols**0.5 * torch.logspace(0, -1.5, cols, device=device)
    x = random(8192, cols) @ mixing
    hessian = (x.T @ x / len(x)).double()
    w = random(rows, cols) * 0.05
    start, _ = quantize_matrix(w, hessian, Method())
    h, t = damp(hessian, 0.01)[0].float(), start.t.float()
    grid = Grid(start.alpha, start.mu)
    found, seconds = {}, {}
    for record in (False, True):
        descent.RECORD = record
        descent.descend(w, t, grid, h, 1)  # sets libraries up, records
        torch.cuda.synchronize()
        began = time.monotonic()
        plain = descent.descend(w, t, grid, h, 3)
        torch.cuda.synchronize()
        seconds[record] = time.monotonic() - began
        annealed = descent.refine_rows(w, t, grid, h, descent.Search(4, 2, 0.1, 0))[1]
        found[record] = (plain, annealed)
    descent.RECORD = False
    equal = all(torch.equal(a, b) for a, b in zip(found[False], found[True], strict=True))
    on_cpu = descent.descend(w.cpu(), t.cpu(), Grid(*(g.cpu() for g in grid)), h.cpu(), 3)
    return {
        "equal": equal, "seconds_plain": seconds[False], "seconds_recorded": seconds[True],
        "differs_from_cpu": float((on_cpu != found[False][0].cpu()).float().mean()),
    }  # fmt: skip


def run(args: argparse.Namespace, variant: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Quantise with one variant and score it."""
    descent.RECORD = args.record
    settings = {"calibration": f"{args.tokens}:calibration", "samples": args.samples, "seqlen": 512,
                "device": args.device, "batch_size": 16, "threads": args.threads}  # fmt: skip
    own = {k: v for k, v in variant.items() if k != "recipe"}
    config = load_recipe(variant.get("recipe", "fast"), **{**settings, **own})
    began = time.monotonic()
    result = ternarize(args.model, folder, config, overwrite=True)
    seconds = time.monotonic() - began
    text = windows(f"{args.tokens}:valid", args.model, 512, "papers")
    score = perplexity(args.model, text, artifact=folder, device=args.device, batch_size=16)
    norm = sum(m["norm_x"] for m in result.matrices.values())
    error = sum(m["E_x"]["final"] for m in result.matrices.values()) / norm
    return {"variant": variant, "perplexity": score.perplexity, "seconds": seconds, "E_x": error}


def show(row: dict[str, Any], began: float) -> None:
    """One line for a row, with the time since the start."""
    text = json.dumps(row["variant"]) if "variant" in row else json.dumps(row)
    if "perplexity" in row:
        text = f"{row['perplexity']:8.4f} {row['seconds']:6.1f} s  E_x {row['E_x']:.5f}  {text}"
    print(f"[{time.monotonic() - began:6.1f}] {text}", flush=True)


def side_by_side(args: argparse.Namespace, rows: list[dict[str, Any]], began: float) -> None:
    """Run the variants in worker processes until the limit; unfinished ones are dropped."""
    jobs = [(variant, args.out / f"row-{number}.json") for number, variant in enumerate(VARIANTS)][
        : args.variants
    ]
    waiting = list(jobs)
    running: list[tuple[subprocess.Popen[bytes], dict[str, Any], Path]] = []
    while (waiting or running) and time.monotonic() - began < args.limit:
        while waiting and len(running) < args.workers:
            variant, file = waiting.pop(0)
            command = [sys.executable, __file__, args.model, "--tokens", args.tokens, "-o",
                       str(args.out), "--device", args.device, "--threads", str(args.threads),
                       "--samples", str(args.samples), "--one", json.dumps(variant),
                       "--row", str(file), *(["--record"] if args.record else [])]  # fmt: skip
            running.append((subprocess.Popen(command), variant, file))
        time.sleep(0.2)
        for job in [j for j in running if j[0].poll() is not None]:
            running.remove(job)
            process, variant, file = job
            if process.returncode == 0:
                rows.append(json.loads(file.read_text(encoding="utf-8")))
                file.unlink()
            else:
                rows.append({"variant": variant, "failed": process.returncode})
            show(rows[-1], began)
            write_json(args.out / "closed_form.json", rows)
    for process, variant, _ in running:
        process.kill()
        print(f"not finished: {variant}")


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", required=True)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=6, help="variants at a time in part 3")
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="the first so many")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds in all")
    parser.add_argument("--part-bytes", type=int, default=1 << 40, help="of best.tar's pieces")
    parser.add_argument("--record", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.one:
        with tempfile.TemporaryDirectory() as folder:
            write_json(args.row, run(args, json.loads(args.one), Path(folder)))
        return
    began = time.monotonic()
    rows: list[dict[str, Any]] = []
    if args.device == "cuda":
        with arithmetic(args.threads):
            try:
                rows.append({"recording": check_recording(args.device)})
            except RuntimeError as e:  # a recording that the GPU refuses; the rest goes on without
                rows.append({"recording": {"equal": False, "error": str(e).splitlines()[0]}})
        args.record = rows[0]["recording"]["equal"]
        show(rows[0], began)
    with tempfile.TemporaryDirectory() as folder:
        run(args, {"samples": 8, "order_samples": 4}, Path(folder))  # libraries set themselves up
        for recipe in ("paper", "fast", "best"):
            rows.append(run(args, {"recipe": recipe}, Path(folder)))
            show(rows[-1], began)
            write_json(args.out / "closed_form.json", rows)
        save(Path(folder), args.out, args.part_bytes)
    side_by_side(args, rows, began)


def save(artifact: Path, out: Path, part_bytes: int) -> None:
    """Write an artifact as ``best.tar.00``, ``best.tar.01``, ... (``cat`` puts them together)."""
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.add(artifact, arcname="best")
        file.seek(0)
        for number in range(100):
            part = file.read(part_bytes)
            if not part:
                break
            (out / f"best.tar.{number:02}").write_bytes(part)


if __name__ == "__main__":
    main()
