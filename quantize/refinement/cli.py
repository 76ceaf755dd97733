"""The command pt2-refine."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from pt2_core.cli import ArgumentParser, run_cli
from pt2_core.commands import command, resume_command
from pt2_core.progress import open_reporter
from quantize.config import DEVICES, DTYPES
from quantize.refinement.config import CODES, STATE_FILE, RefineConfig

DEFAULTS = RefineConfig()
EPILOG = """\
examples:
  pt2-refine qwen3-4b-pt2 --text calib.txt --device cuda         into ./qwen3-4b-pt2-refined
  pt2-refine qwen3-4b-pt2 --text c4 --seqlen 2048 --batch-size 8 --micro-batch 1
  pt2-refine qwen3-4b-pt2 --text calib.txt,own.safetensors --steps 99999 --minutes 60
  pt2-refine qwen3-4b-pt2 --text calib.txt --codes frozen        alpha, mu and norms only
  pt2-refine qwen3-4b-pt2 --text calib.txt --resume              take up a run that was stopped

what moves:
  alpha, mu and the norms always (--no-norms leaves the norms), by Adam with steps relative to their
  size. The codes T with --codes ste (straight-through) or soft (a staircase that hardens). With
  --embeddings the embeddings and the head as well; they are then stored with the artifact.

memory on the GPU, bytes per ternary weight: 2 (the teacher) and, with T frozen, 1 (the codes);
with T moving 8 (latents float32, their gradient and first moment bfloat16). Activations of one
--micro-batch come on top, small with --checkpointing. For a 7B that is, by calculation, some 25 GB
frozen and 75 GB moving; benchmarks/refine_cost.py measures it with random weights.

next: pt2-export model.gguf --from OUT
"""


def main(argv: list[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    resume = resume_command("pt2-refine", argv)
    return run_cli(
        "pt2-refine",
        lambda: _run(args),
        lower="--micro-batch, --seqlen or --held-out",
        resume=lambda: resume if (_out(args) / STATE_FILE).exists() else None,
    )


def _out(args: argparse.Namespace) -> Path:
    return Path(args.out) if args.out else Path(f"{Path(args.artifact).resolve().name}-refined")


def build_parser() -> argparse.ArgumentParser:
    """The options; their defaults are RefineConfig's."""
    parser = ArgumentParser(
        prog="pt2-refine",
        description="Refine an artifact of pt2-quantize by distillation from its source model.",
        epilog=EPILOG,
    )
    parser.add_argument("artifact", help="folder that pt2-quantize wrote")
    parser.add_argument("-o", "--out", help="folder of the result (default: ./ARTIFACT-refined)")
    parser.add_argument("--model", help="the source model (default: where the artifact says)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="take up a run that was stopped")
    mode.add_argument("--overwrite", action="store_true", help="replace what OUT holds")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no summary")
    text = parser.add_argument_group("text")
    _option(text, "text", "text file, JSON lines, folder, data set, FILE.safetensors:TENSOR; a,b")
    text.add_argument("--text-field", metavar="NAME", help="of --text's JSON records (text)")
    text.add_argument(
        "--allow-long", action="store_true", help="take windows longer than the model's context"
    )
    _option(text, "seqlen", "tokens in a window")
    _option(text, "held_out", "windows that are watched, not trained on")
    text.add_argument(
        "--held-out-text", metavar="TEXT", help="whose first windows are watched (--text's last)"
    )
    _option(text, "seed", "of the windows' order")
    steps = parser.add_argument_group("steps")
    _option(steps, "codes", "whether and how T moves", choices=CODES)
    _option(steps, "steps", "optimiser steps")
    _option(
        steps, "minutes", "end by then, or at --steps if they come first; 0: by the steps alone"
    )
    steps.add_argument(
        "--restore", metavar="REGEX", help="linears that get their original weights back"
    )
    _option(steps, "batch_size", "windows per step")
    _option(steps, "lr", "of alpha, mu and norms, relative to their size")
    _option(steps, "lr_codes", "of the codes' latents, in units of alpha")
    _option(steps, "lr_tables", "of embeddings and head, relative to their RMS")
    _option(steps, "warmup", "share of the steps in which the step size rises")
    _option(steps, "tau", "width of the soft staircase at the start")
    for name, what in (("norms", "train the norms"), ("embeddings", "train embeddings and head"),
                       ("per_weight", "second moment per weight")):  # fmt: skip
        _switch(steps, name, what)
    _option(steps, "eval_every", "steps between two looks at the held-out windows")
    _option(steps, "patience", "looks without a new best before the run stops; 0: never")
    machine = parser.add_argument_group("machine")
    _option(machine, "micro_batch", "windows that go through the models at a time")
    _switch(machine, "checkpointing", "less memory, a third more time")
    _option(machine, "save_every", "steps between two states for --resume")
    _option(machine, "device", "", choices=DEVICES)
    _option(machine, "dtype", "of the forward pass", choices=DTYPES)
    _option(machine, "threads", "CPU threads; 0: as torch chooses")
    return parser


def _option(group: argparse._ArgumentGroup, name: str, text: str, **more: object) -> None:
    default = getattr(DEFAULTS, name)
    group.add_argument(
        "--" + name.replace("_", "-"), type=type(default), default=default,
        help=f"{text} ({default})".strip(), **more,  # type: ignore[arg-type]
    )  # fmt: skip


def _switch(group: argparse._ArgumentGroup, name: str, text: str) -> None:
    default = getattr(DEFAULTS, name)
    group.add_argument(
        "--" + name.replace("_", "-"), action=argparse.BooleanOptionalAction, default=default,
        help=f"{text} ({'yes' if default else 'no'})",
    )  # fmt: skip


def _run(args: argparse.Namespace) -> int:
    config = RefineConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(DEFAULTS)})
    out = _out(args)

    from quantize.refinement.loop import refine

    with open_reporter(args.quiet) as reporter:
        result = refine(
            args.artifact, out, config, model_dir=args.model, resume=args.resume,
            overwrite=args.overwrite, reporter=reporter,
        )  # fmt: skip
    if not args.quiet:
        export = command("pt2-export", "model.gguf", "--from", result.path)
        print(f"{result.summary()}\nnext      {export}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
