"""The command ``pt2-export verify``."""

from __future__ import annotations

import argparse
from pathlib import Path

from pt2_core.cli import ArgumentParser, run_cli
from pt2_core.errors import PT2Error

NAME = "pt2-export verify"
_EPILOG = """\
examples:
  pt2-export verify model.gguf --artifact qwen3-4b-pt2
  pt2-export verify model.gguf --artifact qwen3-4b-pt2 --variant cuda
  pt2-export verify q2k.gguf --artifact qwen3-4b-pt2 --llama ~/llama.cpp/build/bin

It compares the file's metadata with what llama.cpp's converter says of the model, its tensors with
the artifact's and the model's values, and the predictions of llama-perplexity and the tokens of
llama-tokenize with the artifact's proof. Exit status 0: all is as it should be.
"""


def main(argv: list[str]) -> int:
    """Entry point; ``argv`` without the word ``verify``. Returns the exit code."""
    args = _parser().parse_args(argv)
    return run_cli(NAME, lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    p = ArgumentParser(
        prog=NAME, description="Is a GGUF file what its artifact says?", epilog=_EPILOG
    )
    p.add_argument("file", type=Path, help="the GGUF file, or the first of its splits")
    p.add_argument("--artifact", type=Path, required=True, metavar="DIR", help="what it is made of")
    p.add_argument(
        "--model", type=Path, metavar="DIR", help="the source model (default: as the artifact says)"
    )
    where = p.add_mutually_exclusive_group()
    where.add_argument(
        "--variant", default="cpu", choices=("cpu", "cuda", "stock"),
        help="of pt2-llama's builds (cpu)",
    )  # fmt: skip
    where.add_argument("--llama", type=Path, metavar="DIR", help="programs of another llama.cpp")
    p.add_argument(
        "--proof-tokens", type=int, default=1024, metavar="N", help="to be run; 0: none (1024)"
    )
    return p


def _run(args: argparse.Namespace) -> int:
    if args.proof_tokens < 0:
        raise PT2Error(f"--proof-tokens must not be negative: {args.proof_tokens}")
    from export.verify_file import verify_file
    from pt2_core.progress import open_reporter

    with open_reporter() as reporter:
        found = verify_file(
            args.file, args.artifact, model_dir=args.model, variant=args.variant, llama=args.llama,
            proof_tokens=args.proof_tokens, progress=reporter.stage,
        )  # fmt: skip
    if found.problems:
        more = len(found.problems) - 1
        rest = f" (and {more} more)" if more else ""
        if more:
            print("\n".join(f"wrong     {p}" for p in found.problems))
        raise PT2Error(f"{args.file} is not what {args.artifact} says: {found.problems[0]}{rest}")
    print(f"metadata  {found.metadata} keys as llama.cpp's converter gives them")
    print(f"tensors   {found.tensors} with the artifact's and the model's values")
    print(f"proof     {found.proof.line() if found.proof else 'none (--proof-tokens 0)'}")
    return 0
