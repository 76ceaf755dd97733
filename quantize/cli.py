"""The command pt2-quantize."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from quantize.common import ArgumentParser, PT2Error, human_seconds, resume_command, run_cli
from quantize.config import (
    BLOCK_SIZES,
    DEVICES,
    DTYPES,
    ORDERS,
    Config,
    load_recipe,
)
from quantize.words import screen

if TYPE_CHECKING:
    from quantize.pipeline import Result

EPILOG = """\
examples:
  pt2-quantize Llama-3.2-1B                        ternarise it into ./Llama-3.2-1B-pt2
  pt2-quantize Qwen3-4B -o q4 --calibration my.txt --seqlen 1024 --device cuda --dtype bfloat16
  pt2-quantize Qwen3-4B -o q4 --resume             take up a run that was stopped
  pt2-quantize Qwen3-4B --recipe best              the best T, alpha and mu without gradients
  pt2-quantize Qwen3-4B --recipe paper             the paper's method to the letter
  pt2-quantize Qwen3-4B --skip 'layers.0\\.|down'   leave some linears as they are
  pt2-quantize Qwen3-4B --report errors.html       draw the errors per block and stage

recipes (every stage is also an option below, and a line of a YAML file):
  paper     exact compensation, ITF, AGA, SSR order; no re-rounding. Its orders cannot be folded,
            so pt2-export refuses it: it is there for comparisons
  fast      (the default) as paper, but T is re-rounded with error feedback, and the order of the
            columns is one that pt2-export can fold into the model
  best      fast, then whole rows are improved (alpha and mu of all blocks by one solve, annealed
            descent on T), and linears make up for half of the error left by those before them
  refined   best, then pt2-refine: alpha, mu, T and the norms moved by gradients towards the
            model's own predictions. Wants more text than the calibration's, and a GPU
  FILE      YAML with settings by the options' names, e.g.  recipe: best / block_size: 64

calibration:
  A text file, a folder of .txt files, wikitext2, c4 or ptb (these need pip install 'pt2-llm[data]'
  and a connection), or FILE.safetensors:TENSOR with token ids. The text is cut into windows that do
  not overlap, and --samples of them are drawn with --seed. No BOS token is added unless --bos.

supported: Llama, Mistral, Qwen2, Qwen3 (Hugging Face folders with safetensors)
next:      pt2-export model.gguf --from OUT
"""


def main(argv: list[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    return run_cli(
        "pt2-quantize",
        lambda: _run(args),
        lower="--batch-size, --samples or --seqlen",
        resume=lambda: resume_command("pt2-quantize", argv) if _can_resume(args) else None,
    )


def _out(args: argparse.Namespace) -> Path:
    return Path(args.out) if args.out else Path(f"{Path(args.model).resolve().name}-pt2")


def _can_resume(args: argparse.Namespace) -> bool:
    """Whether a stopped run has left something to go on from."""
    out = _out(args)
    return any((f / "manifest.json").exists() for f in (out, out / "closed-form"))


def build_parser() -> argparse.ArgumentParser:
    """The options; None means not given, so that a recipe's value stands."""
    parser = ArgumentParser(
        prog="pt2-quantize",
        description="Ternarise a Hugging Face language model: W ~ alpha * T + mu, T of {-1, 0, 1}.",
        epilog=EPILOG,
    )
    parser.add_argument("model", help="folder of the model (config.json, *.safetensors, tokenizer)")
    parser.add_argument("-o", "--out", help="folder of the artifact (default: ./MODEL-pt2)")
    parser.add_argument("--recipe", default="fast", help="paper, fast, best, refined or FILE.yaml")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="take up a run that was stopped")
    mode.add_argument("--overwrite", action="store_true", help="replace what OUT holds")
    parser.add_argument("--report", metavar="FILE", help="draw the errors: .html or .png")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no summary")

    text = parser.add_argument_group("calibration")
    text.add_argument("--calibration", metavar="TEXT", help="see below (wikitext2)")
    text.add_argument("--samples", type=int, help="windows of text (128)")
    text.add_argument("--seqlen", type=int, help="tokens in a window (2048)")
    text.add_argument("--sensitivity", type=int, metavar="N", help="more windows, to measure what "
                      "each linear costs, for pt2-export --target-size (0)")  # fmt: skip
    text.add_argument("--seed", type=int, help="of the windows and of the random order (0)")
    _switch(text, "bos", "put the BOS token in front of every window (no)")

    method = parser.add_argument_group("method")
    method.add_argument("--order", choices=ORDERS, help="of the columns (foldable)")
    method.add_argument("--block-size", type=int, choices=BLOCK_SIZES, help="columns (128)")
    _switch(method, "itf", "Iterative Ternary Fitting (yes)")
    _switch(method, "aga", "Activation-aware Grid Alignment (yes)")
    _switch(method, "compensate", "carry each block's error into the columns to come (yes)")
    method.add_argument("--reround", type=int, metavar="N", help="rounds of re-rounding T (1)")
    method.add_argument("--rounds", type=int, metavar="N", help="of improving whole rows (0)")
    method.add_argument("--sweeps", type=int, metavar="N", help="of descent on T in a round (4)")
    method.add_argument("--noise", type=float, help="of the descent, fading, in steps of T (0)")
    method.add_argument("--asymmetry", type=float, help="make up for so much of inputs' errors (0)")
    method.add_argument("--stream", type=float, help="... of the residual stream's errors (0)")
    refine = "of --recipe refined: "
    method.add_argument("--refine-text", metavar="TEXT", help=refine + "text (the calibration's)")
    method.add_argument("--refine-steps", type=int, metavar="N", help=refine + "steps (1000)")
    _switch(method, "sequential", "Hessians behind the block's own quantised linears (no)")
    method.add_argument("--damping", type=float, help="share of the mean Hessian diagonal (0.01)")
    method.add_argument("--skip", metavar="REGEX", help="leave matching linears as they are")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", choices=DEVICES, help="(auto)")
    machine.add_argument("--dtype", choices=DTYPES, help="of the forward pass (float32)")
    machine.add_argument("--threads", type=int, help="CPU threads (as torch chooses)")
    machine.add_argument("--batch-size", type=int, help="windows per forward pass (4)")
    return parser


def _switch(group: Any, name: str, text: str) -> None:
    group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=text)


def _run(args: argparse.Namespace) -> int:
    names = Config.__dataclass_fields__
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    config = load_recipe(args.recipe, **given)
    if args.report is not None and Path(args.report).suffix not in (".html", ".png"):
        raise PT2Error(f"--report {args.report}: the name must end in .html or .png")
    if args.recipe != "refined" and (args.refine_text or args.refine_steps is not None):
        raise PT2Error("--refine-text and --refine-steps belong to --recipe refined")
    out = _out(args)

    from quantize.pipeline import ternarize  # torch: only once the options are known to be right
    from quantize.progress import Reporter, RichReporter

    reporter = Reporter() if args.quiet else RichReporter()
    more = {"resume": args.resume, "overwrite": args.overwrite, "reporter": reporter}
    refined = None
    if args.recipe == "refined":
        from quantize.refined import refine_settings, ternarize_and_refine

        settings = refine_settings(config, args.refine_text, args.refine_steps)
        result, refined = ternarize_and_refine(args.model, out, config, settings, **more)
    else:
        result = ternarize(args.model, out, config, **more)
    if args.report is not None:
        from quantize.report import write_report

        write_report(out, args.report)
    if not args.quiet:
        print_summary(result)
        if refined is not None:
            print(refined.summary())
        if args.report is not None:
            print(f"report   {args.report}")
    return 0


def print_summary(result: Result) -> None:
    """One screen: what was made, the errors by kind of linear and stage, what to do next."""
    console = screen()
    kinds: dict[str, list[dict[str, Any]]] = {}
    for name, m in result.matrices.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(m)
    stages = list(dict.fromkeys(s for m in result.matrices.values() for s in m["E_x"]))
    table = Table(title="relative output error E_x", title_justify="left")
    table.add_column("linear")
    for stage in stages:
        table.add_column(stage, justify="right")
    for kind, members in kinds.items():
        scale = sum(m["norm_x"] for m in members) or 1.0
        cells = [f"{sum(m['E_x'][s] for m in members) / scale:.4f}" for s in stages]
        table.add_row(kind, *cells)
    console.print(table)
    bits = math.log2(3) + 32 / result.block_size
    console.print(
        f"ternary  {len(result.matrices)} linears, {result.parameters / 1e6:.1f} M weights, "
        f"{bits:.3f} bits per weight (log2(3) and two float16 per {result.block_size})"
    )
    if result.kept:
        console.print(f"kept     {len(result.kept)} linears as they are (--skip)")
    if result.warnings:
        console.print(f"warnings {len(result.warnings)}, see {result.path}/run.json")
    console.print(f"time     {human_seconds(result.seconds)}")
    console.print(f"next     pt2-export model.gguf --from {shlex.quote(str(result.path))}")


if __name__ == "__main__":
    sys.exit(main())
