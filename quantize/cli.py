"""The command pt2-quantize."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from pt2_core.cli import ArgumentParser, run_cli
from pt2_core.commands import command, resume_command
from pt2_core.errors import PT2Error
from pt2_core.files import human_seconds
from pt2_core.model.hub import model_folder
from pt2_core.process.locks import folder_lock
from pt2_core.progress import open_reporter
from pt2_core.words import screen
from quantize.config import (
    BLOCK_SIZES,
    CLOSED_FORM,
    DEVICES,
    DTYPES,
    GRIDS,
    LEVELS,
    ORDERS,
    SCALES,
    Config,
    load_recipe,
)
from quantize.refinement.config import RefineConfig

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from pt2_core.model.checkpoint import Checkpoint
    from quantize.pipeline import Preflight, Result
    from quantize.refinement.loop import Refined

DEFAULTS = Config()
EPILOG = """\
examples:
  pt2-quantize Llama-3.2-1B                        ternarise it into ./Llama-3.2-1B-pt2
  pt2-quantize Qwen/Qwen3-4B                       fetch it from the hub first, into the hub's cache
  pt2-quantize Qwen3-4B -o q4 --calibration my.txt --seqlen 1024 --device cuda --dtype bfloat16
  pt2-quantize Qwen3-4B -o q4 --resume             take up a run that was stopped
  pt2-quantize Qwen3-4B --recipe best              the best T, alpha and mu without gradients
  pt2-quantize Qwen3-4B --grid q2_0                for stock llama.cpp, 2.25 bits
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
  A text file, JSON lines, a folder of them, bundled:calibration (some 200 000 tokens that come with
  this program), wikitext2, c4 or ptb (these need pip install 'pt2-llm[data]' and a connection), or
  FILE.safetensors:TENSOR with token ids; several with commas between them. Of JSON records
  --text-field is read (default: text, or a chat's messages without roles, or the only string
  field). The text is cut into windows that do not overlap, and --samples of them are drawn with
  --seed. No BOS token is added unless --bos; special tokens written in the text are plain text.

supported: every causal language model that transformers has a class for, as a Hugging Face folder
           with safetensors; pt2-export writes those that llama.cpp's converter knows
next:      pt2-export model.gguf --from OUT
"""


def main(argv: list[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    resume = resume_command("pt2-quantize", argv)
    return run_cli(
        "pt2-quantize",
        lambda: _run(args, resume),
        lower="--batch-size, --samples or --seqlen",
        resume=lambda: resume if _can_resume(args) else None,
    )


def _out(args: argparse.Namespace) -> Path:
    return Path(args.out) if args.out else Path(f"{Path(args.model).resolve().name}-pt2")


def _can_resume(args: argparse.Namespace) -> bool:
    """Whether a stopped run has left something to go on from."""
    out = _out(args)
    return any((f / "manifest.json").exists() for f in (out, out / CLOSED_FORM))


def build_parser() -> argparse.ArgumentParser:
    """The options; None means not given, so that a recipe's value stands."""
    parser = ArgumentParser(
        prog="pt2-quantize",
        description="Ternarise a Hugging Face language model: W ~ alpha * T + mu, T of {-1, 0, 1}.",
        epilog=EPILOG,
    )
    what = "folder of the model (config.json, *.safetensors, tokenizer), or ORG/NAME of the hub"
    parser.add_argument("model", help=what)
    parser.add_argument("--revision", help="of the hub: a branch, tag or commit (its main branch)")
    parser.add_argument("-o", "--out", help="folder of the artifact (default: ./MODEL-pt2)")
    parser.add_argument("--recipe", default="fast", help="paper, fast, best, refined or FILE.yaml")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="take up a run that was stopped")
    mode.add_argument("--overwrite", action="store_true", help="replace what OUT holds")
    parser.add_argument("--report", metavar="FILE", help="draw the errors: .html or .png")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no summary")

    text = parser.add_argument_group("calibration")
    _option(text, "calibration", "see below", metavar="TEXT")
    _option(text, "samples", "windows of text")
    _option(text, "seqlen", "tokens in a window")
    what = "more windows, to measure what each linear costs, for pt2-export --target-size"
    _option(text, "sensitivity", what, metavar="N")
    _option(text, "seed", "of the windows and of the random order")
    text.add_argument("--text-field", metavar="NAME", help="of JSON records (see below)")
    text.add_argument("--allow-long", action="store_true", default=None,
                      help="take windows longer than the model's context")  # fmt: skip
    _switch(text, "bos", "put the BOS token in front of every window")
    what = "tokens of the proof, with which pt2-export compares the file; 0: no proof"
    _option(text, "proof_tokens", what, metavar="N")

    method = parser.add_argument_group("method")
    _option(method, "order", "of the columns", choices=ORDERS)
    _option(method, "block_size", "columns", choices=BLOCK_SIZES)
    _option(method, "levels", "of T: -1, 0, 1, and with four of them 2", choices=LEVELS)
    what = "q2_0 and tq2_0: values of the types that stock llama.cpp runs, without offset"
    _option(method, "grid", what, choices=GRIDS)
    _option(method, "scales", "what alpha and mu are rounded to", choices=SCALES)
    _switch(method, "itf", "Iterative Ternary Fitting")
    _switch(method, "aga", "Activation-aware Grid Alignment")
    _switch(method, "compensate", "carry each block's error into the columns to come")
    _option(method, "reround", "rounds of re-rounding T", metavar="N")
    _option(method, "rounds", "of improving whole rows", metavar="N")
    _option(method, "sweeps", "of descent on T in a round", metavar="N")
    _option(method, "noise", "of the descent, fading, in steps of T")
    _option(method, "asymmetry", "make up for so much of inputs' errors")
    _option(method, "stream", "... of the residual stream's errors")
    refine = "of --recipe refined: "
    method.add_argument("--refine-text", metavar="TEXT", help=refine + "text (the calibration's)")
    method.add_argument(
        "--refine-steps", type=int, metavar="N", help=refine + f"steps ({RefineConfig.steps})"
    )
    _switch(method, "sequential", "Hessians behind the block's own quantised linears")
    _option(method, "damping", "share of the mean Hessian diagonal")
    method.add_argument("--skip", metavar="REGEX", help="leave matching linears as they are")
    method.add_argument("--strict", action="store_true", help="stop where a linear would have to "
                        "stay as it is (an odd width, say)")  # fmt: skip

    export = parser.add_argument_group("the file that pt2-export will write")
    export.add_argument("--max-context", type=int, metavar="N", help="tokens that it is meant for, "
                        "where the model has a sliding window or the like (all)")  # fmt: skip
    export.add_argument("--pre-tokenizer", metavar="NAME", help="of llama.cpp, where it does not "
                        "know the tokenizer by itself")  # fmt: skip
    export.add_argument("--no-preflight", dest="preflight", action="store_false",
                        help="do not try the export before the first weight is read")  # fmt: skip

    machine = parser.add_argument_group("machine")
    _option(machine, "device", "", choices=DEVICES)
    _option(machine, "dtype", "of the forward pass", choices=DTYPES)
    _option(machine, "threads", "CPU threads; 0: as torch chooses")
    _option(machine, "batch_size", "windows per forward pass")
    return parser


def _option(group: Any, name: str, text: str, **more: Any) -> None:
    """A setting's option; the help shows its default, of the recipe fast."""
    default = getattr(DEFAULTS, name)
    group.add_argument(
        "--" + name.replace("_", "-"),
        type=type(default),
        help=f"{text} ({default})".strip(),
        **more,
    )


def _switch(group: Any, name: str, text: str) -> None:
    default = "yes" if getattr(DEFAULTS, name) else "no"
    group.add_argument(
        f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=f"{text} ({default})"
    )


def _run(args: argparse.Namespace, resume: str) -> int:
    names = Config.__dataclass_fields__
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    config = load_recipe(args.recipe, **given)
    if args.report is not None and Path(args.report).suffix not in (".html", ".png"):
        raise PT2Error(f"--report {args.report}: the name must end in .html or .png")
    if args.recipe != "refined" and (args.refine_text or args.refine_steps is not None):
        raise PT2Error("--refine-text and --refine-steps belong to --recipe refined")
    if args.recipe == "refined" and not config.offset:
        raise PT2Error(f"--grid {config.grid} cannot be refined: use --recipe best")
    out = _out(args)

    from quantize.first_checks import refuse_contradiction

    refuse_contradiction(out, args.resume, args.overwrite)
    with folder_lock(out):
        result, refined = _quantize(args, out, config, resume)
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


def _quantize(
    args: argparse.Namespace, out: Path, config: Config, resume: str
) -> tuple[Result, Refined | None]:
    """The run itself, with the output folder locked: what it finds there stays as it is."""
    from quantize.first_checks import check_first, check_text_source, refuse_overwriting

    refuse_overwriting(out, args.resume, args.overwrite)
    model = model_folder(args.model, args.revision)
    first = out / CLOSED_FORM if args.recipe == "refined" else out
    checkpoint = check_first(model, first, config, resume=args.resume, overwrite=args.overwrite)
    if args.refine_text:
        check_text_source(args.refine_text, "text", checkpoint)
    from quantize.pipeline import ternarize  # torch: only once the options are known to be right

    refined: Refined | None = None
    with open_reporter(args.quiet) as reporter:
        more = {"resume": args.resume, "overwrite": args.overwrite, "reporter": reporter,
                "command": resume, "strict": args.strict,
                "preflight": export_preflight(config, args.preflight)}  # fmt: skip
        if args.recipe == "refined":
            from quantize.refinement.recipe import refine_settings, ternarize_and_refine

            settings = refine_settings(config, args.refine_text, args.refine_steps)
            result, refined = ternarize_and_refine(model, out, config, settings, **more)
        else:
            result = ternarize(model, out, config, **more)
    return result, refined


def export_preflight(config: Config, wanted: bool) -> Preflight:
    """What tries an export before the run.

    Args:
        wanted: False makes one that only says that it was left out.
    """

    def check(
        checkpoint: Checkpoint, ternary: Mapping[str, tuple[int, ...]], transposed: Collection[str]
    ) -> list[str]:
        if not wanted:
            return ["the preflight was left out (--no-preflight)"]
        from export.preflight import NoSource, preflight

        try:
            return preflight(
                checkpoint, ternary, transposed=transposed, max_context=config.max_context,
                pre_tokenizer=config.pre_tokenizer,
            )  # fmt: skip
        except NoSource as e:
            return [f"the preflight was left out, as llama.cpp's source cannot be had: {e}"]

    return check


def print_summary(result: Result) -> None:
    """One screen: what was made, the errors by kind of linear and stage, what to do next."""
    from pt2_core.artifact.folder import RUN
    from pt2_core.artifact.manifest import kind_of

    console = screen()
    kinds: dict[str, list[dict[str, Any]]] = {}
    for name, m in result.matrices.items():
        kinds.setdefault(kind_of(name), []).append(m)
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
    levels = max((m["levels"] for m in result.matrices.values()), default=3)
    halves = 2 if result.offset else 1
    bits = math.log2(levels) + 16 * halves / result.block_size
    print(
        f"ternary  {len(result.matrices)} linears, {result.parameters / 1e6:.1f} M weights, "
        f"{bits:.3f} bits per weight (log2({levels}) and {halves} float16 per {result.block_size})"
    )
    for reason in dict.fromkeys(result.kept.values()):
        count = sum(1 for r in result.kept.values() if r == reason)
        print(f"kept     {count} linears as they are: {reason}")
    for line in result.starved():
        print(f"experts  {line}")
    if result.warnings:
        print(f"warnings {len(result.warnings)}, see {result.path / RUN}")
    print(f"time     {human_seconds(result.seconds)}")
    print(f"next     {command('pt2-export', 'model.gguf', '--from', result.path)}")


if __name__ == "__main__":
    sys.exit(main())
