"""Which refinement is best for a model within a given time, and how good does it get?

    python benchmarks/refine_schedules.py wiki-llama-82m -o out --device cuda --minutes 4.5 \\
        --calibration calib.txt --held-out wiki.valid.txt --test wiki.test.txt,austen.test.txt

In this order: quantise (--recipe), let the model write text of its own (--own-tokens, 0 for none),
refine for --steps steps by each schedule (T frozen; T moving with several step sizes; a soft
staircase; and so on), measure steps at a larger model's shapes with random weights (--cost 7b), and
spend the time that is left on one long refinement by the schedule that was best on the held-out
text. Training reads the calibration text and the model's own; --held-out chooses; --test is only
measured at the beginning and the end (windows of 512, second halves, as llama-perplexity). OUT gets
schedules.json, schedules.md and the artifact OUT/final, ready for pt2-export.

benchmarks/refine_schedules.sh runs it for wiki-llama-82m and packs the result into small files.
"""

from __future__ import annotations

import quantize.model.waiting  # noqa: F401  before torch is loaded

# isort: split

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pt2_core.cli import ArgumentParser, run_cli
from pt2_core.errors import PT2Error
from pt2_core.files import atomic_path, write_json
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.progress import Reporter
from pt2_core.texts.sources import read_text
from pt2_core.texts.tokens import encode, load_tokenizer
from quantize.config import DEVICES, load_recipe
from quantize.evaluate import perplexity, windows
from quantize.model.streamed import StreamedModel
from quantize.model.student import build_teacher
from quantize.model.torch_setup import arithmetic, pick_device
from quantize.pipeline import ternarize
from quantize.refinement.config import RefineConfig
from quantize.refinement.loop import Refined, refine
from quantize.refinement.selftext import prompt_windows, write_text

CONTEXT = 512
TAIL_SECONDS = 20  # for the measurements after the long run
SPARE = 0.93  # of the time that the long run may plan with

# name -> what differs from the base; the later ones start from the best step size of the codes.
STEP_SIZES: dict[str, dict[str, Any]] = {
    "T frozen": {"codes": "frozen"},
    "T moving, lr_codes 1e-3": {"lr_codes": 1e-3},
    "T moving, lr_codes 3e-3": {"lr_codes": 3e-3},
    "T moving, lr_codes 6e-3": {"lr_codes": 6e-3},
}
CHANGES: dict[str, dict[str, Any]] = {
    "... second moment per weight": {"per_weight": True},
    "... soft staircase": {"codes": "soft", "tau": 0.1},
    "... lr 1e-2": {"lr": 1e-2},
    "... lr 2.5e-3": {"lr": 2.5e-3},
}
TABLES = "... embeddings too"


class Clock(Reporter):
    """Prints what happens with the seconds since the start."""

    def __init__(self, minutes: float) -> None:
        super().__init__()
        self.began, self.budget = time.monotonic(), 60 * minutes

    def left(self) -> float:
        """Seconds."""
        return self.budget - (time.monotonic() - self.began)

    def note(self, message: str) -> None:
        print(f"[{time.monotonic() - self.began:6.1f}] {message}", flush=True)

    def warn(self, message: str) -> None:
        super().warn(message)
        self.note(f"warning: {message}")


def own_text(model: str, args: Any, stream: Tensor, clock: Clock) -> Tensor:
    """Tokens that the model writes, after BOS and after beginnings of the text: int64 ``[n]``."""
    checkpoint = Checkpoint.open(model)
    device = pick_device(args.device)
    config = StreamedModel(checkpoint, device, args.dtype).config
    rows, parts = args.own_rows, []
    with arithmetic(args.threads):
        dtype = getattr(torch, args.dtype)
        teacher = build_teacher(config, checkpoint.read, device, dtype, tied=checkpoint.tied)
        for number in range(-(-args.own_tokens // (rows * CONTEXT))):
            prompts = prompt_windows(stream, rows, 32, number)
            if number % 2 and isinstance(config.bos_token_id, int):
                prompts = torch.full((rows, 1), config.bos_token_id)
            parts.append(write_text(teacher, prompts.to(device), CONTEXT, number).cpu())
            clock.note(f"own text: {(number + 1) * rows * CONTEXT} tokens")
    return torch.cat(parts).flatten()


def run(args: Any) -> dict[str, Any]:
    """The whole of it; returns what is written to schedules.json."""
    clock = Clock(args.minutes)
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    machine = {"device": args.device, "threads": args.threads}
    closed, trial = out / "closed-form", out / "trial"
    config = load_recipe(
        args.recipe, calibration=args.calibration, samples=args.samples, seqlen=CONTEXT, **machine
    )
    quantised = ternarize(args.model, closed, config, overwrite=True, reporter=clock)
    clock.note(f"quantised in {quantised.seconds:.1f} s")
    tests = {t: windows(t, args.model, CONTEXT, "llama.cpp") for t in args.test.split(",") if t}

    def measure(artifact: Path | None) -> dict[str, float]:
        return {
            Path(name).name: perplexity(
                args.model, ids, artifact=artifact, second_half=True, batch_size=16, **machine
            ).perplexity
            for name, ids in tests.items()
        }

    results: dict[str, Any] = {"full": measure(None), "closed_form": measure(closed), "runs": {}}
    clock.note(f"full precision {results['full']}, closed form {results['closed_form']}")

    base = RefineConfig(
        text=_training_text(args, out, clock), held_out=args.held_windows, seqlen=CONTEXT,
        steps=args.steps, batch_size=args.batch_size, micro_batch=args.micro_batch,
        checkpointing=False, dtype=args.dtype, eval_every=max(1, args.steps // 2),
        save_every=1 << 30, **machine,
    )  # fmt: skip
    runs: dict[str, tuple[Refined, RefineConfig]] = {}

    def attempt(name: str, settings: RefineConfig, folder: Path) -> Refined | None:
        try:
            result = refine(
                closed, folder, settings, model_dir=args.model, overwrite=True, reporter=clock
            )
        except PT2Error as e:
            clock.note(f"{name} failed: {e}")
            return None
        runs[name] = (result, settings)
        results["runs"][name] = _record(result)
        write_json(out / "schedules.json", results)
        clock.note(f"{name}: {json.dumps(_record(result))}")
        return result

    for name, changes in STEP_SIZES.items():
        attempt(name, replace(base, **changes), trial)
    best = _best({k: v for k, v in runs.items() if v[1].codes != "frozen"})
    start = runs[best][1]
    for name, changes in {**CHANGES, TABLES: {"embeddings": True}}.items():
        if clock.left() > 0.55 * clock.budget:
            attempt(name, replace(start, **changes), trial)
        else:
            clock.note(f"no time for: {name}")
    best = _best({k: v for k, v in runs.items() if k != TABLES and v[1].codes != "frozen"})
    results["cost"] = _cost(args, clock)
    chosen = replace(runs[best][1], embeddings=args.embeddings)
    speed = runs[TABLES if args.embeddings and TABLES in runs else best][0].tokens_per_second
    steps = steps_within(clock.left(), speed / (chosen.batch_size * CONTEXT))
    clock.note(f"the long run: as {best!r}, {steps} steps")
    if steps > args.steps:
        look = max(base.eval_every, steps // 12)
        if attempt("long", replace(chosen, steps=steps, eval_every=look), out / "final"):
            results["long"] = measure(out / "final")
            results["history"] = runs["long"][0].history
    else:
        clock.note("too little time is left for a longer run: raise --minutes")
    shutil.rmtree(trial, ignore_errors=True)
    return results


def steps_within(seconds: float, steps_per_second: float) -> int:
    """Steps of the long run, which leave time to measure what came of it."""
    return int((seconds - TAIL_SECONDS) * SPARE * steps_per_second)


def _training_text(args: Any, out: Path, clock: Clock) -> str:
    """Token ids of the training text, then the model's own, then the held-out text, in a file."""
    tokenizer = load_tokenizer(Path(args.model))

    def ids(source: str) -> Tensor:
        return torch.tensor(encode(tokenizer, read_text(source).text))

    train, held = ids(args.calibration), ids(args.held_out)
    if held.shape[0] < args.held_windows * CONTEXT:
        raise PT2Error(f"{args.held_out} has fewer than {args.held_windows} windows of {CONTEXT}")
    parts = [train, held[: args.held_windows * CONTEXT]]
    if args.own_tokens:
        parts.insert(1, own_text(args.model, args, train, clock))
    clock.note(
        f"training text: {sum(len(p) for p in parts[:-1])} tokens, {len(train)} of them real"
    )
    file = out / "text.safetensors"
    save_file({"train": torch.cat(parts).to(torch.int32)}, file)
    return f"{file}:train"


def _cost(args: Any, clock: Clock) -> list[str]:
    """Steps at a larger model's shapes, in a process of their own (its memory is then free)."""
    lines = []
    for codes in ("frozen", "ste") if args.cost else ():
        script = Path(__file__).with_name("refine_cost.py")
        command = [sys.executable, str(script), "--shape", args.cost, "--device", args.device]
        try:
            done = subprocess.run([*command, "--codes", codes], capture_output=True, text=True,
                                  timeout=max(1.0, min(45.0, clock.left() / 3)))  # fmt: skip
            lines.append((done.stdout or done.stderr).strip().splitlines()[-1])
        except (subprocess.TimeoutExpired, IndexError) as e:
            lines.append(f"{args.cost}, T {codes}: {type(e).__name__}")
        clock.note(lines[-1])
    return lines


def _best(runs: dict[str, tuple[Refined, RefineConfig]]) -> str:
    if not runs:
        raise PT2Error("no schedule could be run: see the lines above")
    return min(runs, key=lambda name: runs[name][0].after.kl)


def _record(result: Refined) -> dict[str, float]:
    return {
        "steps": result.history[-1]["step"], "kl": result.after.kl, "ratio": result.after.ratio,
        "same_top": result.after.same_top, "changed": result.changed,
        "tokens_per_second": result.tokens_per_second, "seconds": result.seconds,
        "peak_bytes": result.peak_bytes,
    }  # fmt: skip


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| schedule | steps | held-out KL | ratio to FP | codes changed | tokens/s |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name, r in results["runs"].items():
        lines.append(
            f"| {name} | {r['steps']} | {r['kl']:.4f} | {r['ratio']:.4f} | {r['changed']:.2%} | "
            f"{r['tokens_per_second']:.0f} |"
        )
    lines += ["", "| test text | full precision | closed form | refined |", "|---|---|---|---|"]
    for name, full in results["full"].items():
        cells = [f"{full:.3f}"]
        for part in ("closed_form", "long"):
            value = results.get(part, {}).get(name)
            cells.append(f"{value:.3f} ({value / full:.4f}x)" if value else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *results["cost"]]) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="refine_schedules.py", description=__doc__)
    parser.add_argument("model", help="folder of the Hugging Face model, with its tokenizer")
    parser.add_argument("-o", "--out", type=Path, default=Path("out/refine"))
    parser.add_argument("--minutes", type=float, default=4.5, help="for everything (4.5)")
    parser.add_argument("--recipe", default="fast", help="of the start (fast)")
    parser.add_argument("--calibration", required=True, help="text: calibration and training")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows (128)")
    parser.add_argument("--held-out", required=True, help="text by which the best is chosen")
    parser.add_argument("--held-windows", type=int, default=60, help="windows of it (60)")
    parser.add_argument("--test", default="", help="texts that are only measured, with commas")
    parser.add_argument("--own-tokens", type=int, default=6_000_000, help="(6000000)")
    parser.add_argument("--own-rows", type=int, default=4096, help="written at a time (4096)")
    parser.add_argument("--steps", type=int, default=150, help="of a schedule (150)")
    parser.add_argument("--batch-size", type=int, default=32, help="windows of 512 a step (32)")
    parser.add_argument("--micro-batch", type=int, default=32, help="of them at a time (32)")
    parser.add_argument("--embeddings", action="store_true", help="the long run trains them too")
    parser.add_argument("--cost", default="", help="shape for refine_cost.py, such as 7b")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args(argv)
    results = run(args)
    write_json(args.out / "schedules.json", results)
    with atomic_path(args.out / "schedules.md") as tmp:
        tmp.write_text(page(results), encoding="utf-8")
    print(page(results), end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli("refine_schedules", main))
