"""The command pt2-eval."""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.common import (
    ArgumentParser,
    PT2Error,
    atomic_path,
    check_threads,
    make_folder,
    run_cli,
    write_json,
)
from quantize.config import DEVICES, DTYPES

# What imports torch is imported where it is used, once a signal ends the command in one line.
if TYPE_CHECKING:
    from pt2_eval.models import Model
    from pt2_eval.table import Row
    from quantize.progress import Reporter

PROTOCOLS = ("papers", "llama.cpp")
EPILOG = """\
examples:
  pt2-eval Qwen3-4B qwen3-4b-pt2 qwen3-4b.gguf --reference Qwen3-4B --text wiki.test.txt
  pt2-eval qwen3-4b.gguf --text wiki.test.txt --protocol llama.cpp --chunks 40
  pt2-eval Qwen3-4B qwen3-4b-pt2 --tasks paper -o results
  pt2-eval qwen3-4b-pt2 --tasks arc_easy,my-task.yaml --limit 100

models: a Hugging Face folder, an artifact of pt2-quantize or pt2-refine, or a GGUF file, which
needs our llama.cpp (pt2-llama build) and llama-cpp-python's bindings.

--text takes text files, wikitext2 (its test set) and c4 (the papers' part of its validation set),
several with commas. Two protocols:
  papers     windows of --ctx tokens (2048), every token but a window's first is scored
  llama.cpp  windows of 512, the second half of each is scored; where the tokenizer adds BOS, each
             window begins with it
--reference, the full-precision model, adds the KL divergence to it and the share of positions with
the same most likely token, and gives all models its token ids.

--tasks paper is the seven tasks of the PT2-LLM paper (plain accuracy, no examples in the prompt)
through lm-evaluation-harness: pip install 'pt2-llm[eval]'. They are downloaded; a YAML file of the
harness' form with local data works without a connection.
"""


def main(argv: list[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    return run_cli("pt2-eval", lambda: _run(args), lower="--batch-size or --ctx")


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="pt2-eval", epilog=EPILOG,
        description="Measure models in PyTorch and llama.cpp alike: one table.",
    )  # fmt: skip
    parser.add_argument("models", nargs="+", help="Hugging Face folders, artifacts, GGUF files")
    parser.add_argument("--reference", help="full-precision model to compare with")
    parser.add_argument("--source", help="the artifacts' model (default: where they say)")
    parser.add_argument("--text", help="text files, with commas between them")
    parser.add_argument("--protocol", choices=(*PROTOCOLS, "both"), default="both")
    parser.add_argument("--ctx", type=int, default=2048, help="of the papers' windows (2048)")
    parser.add_argument("--chunks", type=int, help="first windows only, in each protocol")
    parser.add_argument("--tasks", help="paper, or names and YAML files with commas between them")
    parser.add_argument("--limit", type=int, help="first questions of each task only")
    parser.add_argument("-o", "--out", type=Path, help="folder for eval.json and eval.md")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences at a time (4)")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="in torch (float32)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (as they choose)")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    return parser


def _run(args: argparse.Namespace) -> int:
    if not args.text and not args.tasks:
        raise PT2Error("nothing to measure: give --text FILE, --tasks paper, or both")
    check_threads(args.threads)
    if args.ctx < 8 or args.batch_size < 1:
        raise PT2Error("--ctx must be at least 8, --batch-size at least 1")
    if any(n is not None and n < 1 for n in (args.chunks, args.limit)):
        raise PT2Error("--chunks and --limit must be at least 1")
    if args.out is not None:
        make_folder(args.out)
    import quantize.waiting  # noqa: F401  before torch is loaded

    # isort: split

    from pt2_eval.table import markdown
    from pt2_eval.tasks import PAPER_TASKS
    from pt2_eval.texts import load_text
    from quantize.machine import arithmetic
    from quantize.progress import Reporter, RichReporter

    texts = [load_text(s) for s in (args.text or "").split(",") if s]
    tasks = list(PAPER_TASKS) if args.tasks == "paper" else (args.tasks or "").split(",")
    reporter = Reporter() if args.quiet else RichReporter()
    rows: list[Row] = []
    with arithmetic(args.threads):
        reference = _open(args.reference, args) if args.reference else None
        for path in args.models:
            same = args.reference and Path(path).resolve() == Path(args.reference).resolve()
            model = reference if same and reference is not None else _open(path, args)
            rows.append(_measure(model, reference, texts, [t for t in tasks if t], args, reporter))
            if args.out is not None:
                _write(args.out, rows, reference)
            del model
            gc.collect()
    print(markdown(rows, reference.name if reference is not None else None), end="")
    return 0


def _open(path: str, args: argparse.Namespace) -> Model:
    from pt2_eval.models import open_model

    return open_model(
        path, source=args.source, device=args.device, dtype=args.dtype,
        context=max(args.ctx, 512), threads=args.threads,
        gpu_layers=0 if args.device == "cpu" else -1,
    )  # fmt: skip


def _measure(
    model: Model, reference: Model | None, texts: list[tuple[str, str, int | None]],
    tasks: list[str], args: argparse.Namespace, reporter: Reporter,
) -> Row:  # fmt: skip
    from pt2_eval.measure import divergence, paper_windows, perplexity
    from pt2_eval.table import Row
    from pt2_eval.tasks import zero_shot
    from quantize.evaluate import llama_windows

    row = Row(model.name, model.kind, model.size)
    ids_of = reference or model  # the same ids for all, so that perplexities compare
    if args.protocol != "llama.cpp" and texts and args.ctx > model.limit:
        raise PT2Error(f"{model.name} takes at most {model.limit} tokens: use --ctx {model.limit}")
    for name, text, usual in texts:
        ids = ids_of.encode(text.removesuffix("\n"))
        batch = args.batch_size

        def step() -> None:
            reporter.step(model.name)

        if args.protocol != "llama.cpp":
            windows = paper_windows(ids, ids_of.bos, args.ctx, args.chunks or usual)
            reporter.start(f"{model.name} on {name}, papers", -(-len(windows) // batch))
            row.papers[name] = perplexity(model, windows, second_half=False, batch=batch, step=step)
        windows = llama_windows(ids, ids_of.bos, 512, args.chunks)
        passes = (args.protocol != "papers") + (reference is not None and reference is not model)
        reporter.start(f"{model.name} on {name}, llama.cpp", passes * -(-len(windows) // batch))
        if args.protocol != "papers":
            row.llama[name] = perplexity(model, windows, second_half=True, batch=batch, step=step)
        if reference is not None and reference is not model:
            row.divergence[name] = divergence(model, reference, windows, batch=batch, step=step)
        reporter.done()
    if tasks:
        reporter.start(f"{model.name}: tasks", 100)
        last = 0.0

        def advance(done: int, total: int) -> None:
            nonlocal last
            share = 100 * done / total
            reporter.step(f"{done}/{total}", max(0.0, share - last))
            last = share

        row.tasks = zero_shot(
            model, tasks, limit=args.limit, batch=2 * args.batch_size, step=advance
        )
        reporter.done()
    return row


def _write(folder: Path, rows: list[Row], reference: Model | None) -> None:
    from pt2_eval.table import markdown

    write_json(folder / "eval.json", [r.record() for r in rows])
    with atomic_path(folder / "eval.md") as tmp:
        table = markdown(rows, reference.name if reference is not None else None)
        tmp.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
