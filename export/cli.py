"""The command ``pt2-export``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.config import (
    DEFAULT_EMBEDDING_TYPE,
    ORDINARY_TYPES,
    TYPES,
    ExportConfig,
    parse_size,
)
from pt2_core import formats
from pt2_core.cli import ArgumentParser, run_cli
from pt2_core.commands import command
from pt2_core.errors import PT2Error
from pt2_core.files import human_bytes, read_json
from pt2_core.model.hub import model_folder
from pt2_core.words import screen

if TYPE_CHECKING:
    from export.pipeline import ExportReport

_EPILOG = """\
examples:
  pt2-export model.gguf                         the newest artifact in this folder, as {default}
  pt2-export model.gguf --from qwen3-8b-pt2 --type {smallest}
                                                {bits:g} bits a weight, needs our llama.cpp
  pt2-export model.gguf --type q2_k             2.625 bits, runs on any llama.cpp
  pt2-export model.gguf --type q2_0             2.25 bits, of pt2-quantize --grid q2_0: runs on the
                                                unmodified llama.cpp since summer 2026
  pt2-export model.gguf --embedding-type q4_k --output-type q6_k
  pt2-export model.gguf --type {smallest} --target-bpw 2.1
                                                the most sensitive tensors in Q2_K to Q4_K, chosen
                                                by what python -m quantize.sensitivities has
                                                measured
  pt2-export model.gguf --split-max-size 2G     model-00001-of-0000N.gguf
  pt2-export verify model.gguf --artifact DIR   is a file what its artifact says?

Before the file gets its name, it is read back bit for bit, and llama.cpp runs a text with it: its
predictions must be the ternary model's and its tokens the model's own. What fails is refused.

then, for a chat model: pt2-llama run llama-cli -m model.gguf
for a base model:       pt2-llama run llama-completion -m model.gguf -no-cnv -p "The river" -n 64

types of ordinary tensors: {ordinary}
Where embeddings and head are one tensor (tied), --embedding-type is the type of both, and the
default is the head's.
""".format(
    default=formats.DEFAULT.name,
    smallest=formats.SMALLEST.ggml_name,
    bits=formats.SMALLEST.bpw(),
    ordinary=", ".join(ORDINARY_TYPES),
)


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``pt2-export``; returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["verify"]:
        from export import verify_cli

        return verify_cli.main(given[1:])
    args = _parser().parse_args(given)
    return run_cli("pt2-export", lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    d = ExportConfig()
    p = ArgumentParser(
        prog="pt2-export",
        description="Write an artifact of pt2-quantize as a complete GGUF file for llama.cpp.",
        epilog=_EPILOG,
    )

    def option(name: str, metavar: str, what: str, **more: Any) -> None:
        p.add_argument(name, metavar=metavar, help=what, **more)

    def type_option(name: str, what: str, default: str | None, shown: str) -> None:
        choices = list(ORDINARY_TYPES)
        what = f"{what} (default: {shown})"
        option(name, "TYPE", what, type=str.lower, choices=choices, default=default)

    option("out", "OUT.gguf", "the file to write", type=Path)
    where = "the artifact (default: the newest complete one in the current folder)"
    option("--from", "DIR", where, dest="artifact", type=Path)
    option(
        "--model", "DIR", "the source model (default: what the artifact was made from)", type=Path
    )
    what = f"of the ternary linears: {', '.join(TYPES)} (default: {d.type})"
    option("--type", "TYPE", what, type=str.lower, choices=TYPES, default=d.type)
    shown = f"{DEFAULT_EMBEDDING_TYPE}, or the head's type where they are one tensor"
    type_option("--embedding-type", "of the token embeddings", d.embedding_type, shown)
    type_option("--output-type", "of the head", d.output_type, d.head())
    what = "of linears that cannot be ternary"
    type_option("--fallback-type", what, d.fallback_type, d.fallback_type)
    what = "choose types per tensor so that the file has at most SIZE, such as 1.7G or 21.8M"
    option("--target-size", "SIZE", what)
    what = "the same, in bits of the file per parameter"
    option("--target-bpw", "BITS", what, type=float, default=0.0)
    what = "tokens that are run in llama.cpp before the file gets its name; 0: none"
    option("--proof-tokens", "N", f"{what} ({d.proof_tokens})", type=int, default=d.proof_tokens)
    option("--keep-refused", "FILE", "where to keep a file that the proof refuses")
    what = "tokens that the file is meant for, where the model has a sliding window or the like"
    option("--max-context", "N", what, type=int, default=0)
    what = "llama.cpp's name for the tokenizer's regular expressions, if it does not know them"
    option("--pre-tokenizer", "NAME", what)
    option("--split-max-size", "SIZE", "files of at most SIZE of tensors, such as 500M or 2G")
    what = "write a model card for the hub (default: README.md beside OUT)"
    p.add_argument("--card", metavar="FILE", nargs="?", const="", help=what)
    option("--base-model", "ORG/NAME", "the source model's name on the hub, for the card")
    for name, dest, what in (
        ("--strict", "strict", "fail if a linear of a decoder block would not be ternary"),
        ("--overwrite", "overwrite", "replace the output if it exists"),
    ):
        p.add_argument(name, dest=dest, action="store_true", help=what)
    what = "skip the check of the model's fingerprint and of the written file"
    p.add_argument("--no-verify", dest="verify", action="store_false", help=what)
    return p


def _run(args: argparse.Namespace) -> int:
    config = ExportConfig(
        type=args.type,
        embedding_type=args.embedding_type,
        output_type=args.output_type,
        fallback_type=args.fallback_type,
        strict=args.strict,
        verify=args.verify,
        split_max_size=parse_size(args.split_max_size) if args.split_max_size else 0,
        overwrite=args.overwrite,
        proof_tokens=args.proof_tokens,
        keep_refused=args.keep_refused,
        target_size=parse_size(args.target_size, "--target-size") if args.target_size else 0,
        target_bpw=args.target_bpw,
        max_context=args.max_context,
        pre_tokenizer=args.pre_tokenizer,
    )
    artifact = args.artifact or newest_artifact(Path())
    from export.card import card_path
    from export.pipeline import export_gguf
    from pt2_core.progress import open_reporter

    card = None if args.card is None else card_path(args.out, args.card, args.overwrite)
    out = screen()
    model_dir = None if args.model is None else model_folder(args.model)
    with open_reporter() as reporter:
        if args.artifact is None:
            reporter.note(f"exporting {artifact}, the newest artifact here")
        report = export_gguf(
            artifact, args.out, config, model_dir=model_dir, progress=reporter.stage
        )
    for note in report.notes:
        reporter.warn(note)
    _show(out, report, config)
    if card is not None:
        _write_card(card, report, Path(artifact), model_dir, args.base_model)
    return 0


def _write_card(
    path: Path, report: ExportReport, artifact_dir: Path, model_dir: Path | None, name: str | None
) -> None:
    from export.card import read_base, write_card
    from export.checks import source_model
    from pt2_core.artifact.folder import Artifact

    artifact = Artifact.open(artifact_dir)
    write_card(path, report, artifact, read_base(model_dir or source_model(artifact), name))
    print(f"model card: {path}")


def newest_artifact(folder: Path) -> Path:
    """The complete artifact in ``folder`` whose manifest was written last.

    Raises:
        PT2Error: there is none.
    """
    found = []
    for manifest in folder.glob("*/manifest.json"):
        try:
            value = read_json(manifest)
        except PT2Error:
            continue
        if isinstance(value, dict) and value.get("format") == "pt2-artifact":
            found.append((value.get("complete") is True, manifest.stat().st_mtime_ns, manifest))
    complete = [f for f in found if f[0]]
    if complete:
        return max(complete)[2].parent
    if found:
        last = max(found)[2].parent
        from pt2_core.artifact.folder import Artifact

        Artifact.open(last)  # says how to finish it
    raise PT2Error("no artifact in this folder: give one with --from DIR, made by pt2-quantize")


def _show(console: Any, report: ExportReport, config: ExportConfig) -> None:
    from rich.table import Table

    ratio = report.f16_bytes / report.file_bytes
    lines = {
        "written": ", ".join(str(f) for f in report.files),
        "size": f"{human_bytes(report.file_bytes)}, 1/{ratio:.1f} of F16",
        "bits per weight": f"{report.bpw:.3f} (the whole file), "
        f"{report.ternary_bpw:.3f} (its {report.ternary_parameters:,} ternary weights "
        f"of {report.parameters:,})",
        "read back": "every tensor as meant, bit for bit, by llama.cpp's library"
        if report.verified
        else "not verified (--no-verify)",
        "proof": report.proof.line() if report.proof else "none (--proof-tokens 0)",
    }
    if report.proof is not None and report.proof.notes():
        lines["known gaps"] = "; ".join(report.proof.notes())
    if report.error is not None:
        worst = max(report.errors, key=lambda n: report.errors[n])
        lines["conversion error"] = (
            f"{100 * report.error:.2f}% RMS of the weights, from rounding alpha and mu to Q2_K's "
            f"scales (worst: {100 * report.errors[worst]:.2f}%, {worst})"
        )
    if report.mixed is not None:
        lines["mixed precision"] = report.mixed
    elif report.tied and config.embedding_type not in (None, config.head()):
        lines["note"] = (
            f"embeddings and head are one tensor here: --output-type {config.head()} is not "
            f"used, the type is {config.embedding_type}"
        )
    if len(report.files) == 1 and config.split_max_size:
        lines["note on splitting"] = "not split: all of it fits into one file of that size"
    if report.fallbacks:
        lines["not ternary"] = f"{len(report.fallbacks)} linears, see below"
    summary = Table.grid(padding=(0, 2))
    for key, value in lines.items():
        summary.add_row(key, value)
    for note in report.notes:
        summary.add_row("converter", note)
    console.print(summary)
    console.print(_others(report))
    print(f"next: {next_command(report)}")


def next_command(report: ExportReport) -> str:
    """What runs the file: llama-cli talks to chat models, llama-completion continues a text."""
    run = ("pt2-llama", "run", "llama-cli" if report.chat else "llama-completion")
    prompt = () if report.chat else ("-no-cnv", "-p", "The river", "-n", 64)
    return command(*run, "-m", report.files[0], *prompt)


def _others(report: ExportReport) -> Any:
    """Tensors that are not ternary, those of one type, shape and reason in one line."""
    from rich.table import Table

    table = Table(title="tensors that are not ternary", title_justify="left", box=None)
    for column in ("tensor", "shape", "type", "reason"):
        table.add_column(column)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, shape, kind, reason in report.others:
        groups.setdefault((shape, kind, reason), []).append(name)
    for (shape, kind, reason), names in groups.items():
        label = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        table.add_row(label, " x ".join(map(str, shape)), kind, reason)
    return table


if __name__ == "__main__":
    sys.exit(main())
