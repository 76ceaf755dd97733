"""The command pt2-eval."""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pt2_core.cli import ArgumentParser, check_threads, run_cli
from pt2_core.errors import PT2Error
from pt2_core.files import atomic_path, make_folder, write_json
from pt2_core.progress import Reporter, open_reporter
from pt2_core.texts.sources import Text, read_text, split_sources
from pt2_core.texts.tokens import (
    PROTOCOLS,
    check_context,
    llama_windows,
    paper_windows,
    refuse_degenerate_tokens,
)
from quantize.config import DEVICES, DTYPES

# What imports torch is imported where it is used, once a signal ends the command in one line.
if TYPE_CHECKING:
    from torch import Tensor

    from pt2_eval.models import Model
    from pt2_eval.table import Row

LLAMA_WINDOW = 512
EPILOG = """\
examples:
  pt2-eval Qwen3-4B qwen3-4b-pt2 qwen3-4b.gguf --reference Qwen3-4B --text wiki.test.txt
  pt2-eval qwen3-4b.gguf --text wiki.test.txt --protocol llama.cpp --chunks 40
  pt2-eval Qwen3-4B qwen3-4b-pt2 --tasks paper -o results
  pt2-eval qwen3-4b-pt2 --tasks arc_easy,my-task.yaml --limit 100

models: a Hugging Face folder, an artifact of pt2-quantize or pt2-refine, or a GGUF file, which
needs our llama.cpp (pt2-llama build) and llama-cpp-python's bindings (pt2-llama bindings).

--text takes text files, JSON lines (of which --text-field is read), folders of them,
bundled:wiki.test, the test sets wikitext2, ptb and c4 (the papers' part of its validation set);
several with commas are measured one by one. pt2-bench scores the same tokens of a file: lines end
in LF, a byte order mark is left out, special tokens written in the text are plain text. Two
protocols:
  papers     windows of --ctx tokens (2048), BOS before the text where the tokenizer adds one, every
             token but a window's first is scored
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
    parser.add_argument("--text-field", metavar="NAME", help="of JSON records (see below)")
    parser.add_argument("--protocol", choices=(*PROTOCOLS, "both"), default="both")
    parser.add_argument("--ctx", type=int, default=2048, help="of the papers' windows (2048)")
    parser.add_argument("--allow-long", action="store_true", help="windows beyond the context")
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
    texts = _texts(args)
    import quantize.model.waiting  # noqa: F401  before torch is loaded

    # isort: split

    from pt2_eval.table import markdown
    from pt2_eval.tasks import PAPER_TASKS
    from quantize.model.torch_setup import arithmetic

    tasks = list(PAPER_TASKS) if args.tasks == "paper" else (args.tasks or "").split(",")
    rows: list[Row] = []
    with arithmetic(args.threads), open_reporter(args.quiet) as reporter:
        for note in dict.fromkeys(n for t in texts for n in t.notes):
            reporter.note(note)
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


def _texts(args: argparse.Namespace) -> list[Text]:
    if not args.text:
        if args.text_field:
            raise PT2Error("--text-field belongs to --text")
        return []
    sources = split_sources(args.text)
    texts = [read_text(s, "test", text_field=args.text_field) for s in sources]
    labels = [t.label for t in texts]
    if twice := next((x for x in labels if labels.count(x) > 1), None):
        raise PT2Error(f"two of the texts are called {twice}, as the table has them: rename one")
    return texts


def _open(path: str, args: argparse.Namespace) -> Model:
    from pt2_eval.models import open_model

    return open_model(
        path, source=args.source, device=args.device, dtype=args.dtype,
        context=max(args.ctx, LLAMA_WINDOW), threads=args.threads,
        gpu_layers=0 if args.device == "cpu" else -1,
    )  # fmt: skip


def _measure(
    model: Model, reference: Model | None, texts: list[Text],
    tasks: list[str], args: argparse.Namespace, reporter: Reporter,
) -> Row:  # fmt: skip
    from pt2_eval.measure import divergence, perplexity
    from pt2_eval.table import Row
    from pt2_eval.tasks import zero_shot

    row = Row(model.name, model.kind, model.size)
    ids_of = reference or model  # the same ids for all, so that perplexities compare
    against = reference if reference is not model else None
    for text in texts:
        name, batch = text.label, args.batch_size
        cut = _windows(text, ids_of, args, compared=against is not None)
        _check_windows(model, cut, args, reporter)

        def step() -> None:
            reporter.step()

        if args.protocol != "llama.cpp":
            windows = cut["papers"]
            reporter.start(f"{model.name} on {name}, papers", -(-len(windows) // batch), "batches")
            row.papers[name] = perplexity(model, windows, second_half=False, batch=batch, step=step)
        if "llama.cpp" in cut:
            windows = cut["llama.cpp"]
            passes = (args.protocol != "papers") + (against is not None)
            steps = passes * -(-len(windows) // batch)
            reporter.start(f"{model.name} on {name}, llama.cpp", steps, "batches")
        if args.protocol != "papers":
            row.llama[name] = perplexity(model, windows, second_half=True, batch=batch, step=step)
        if against is not None:
            row.divergence[name] = divergence(model, against, windows, batch=batch, step=step)
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


def _windows(
    text: Text, ids_of: Model, args: argparse.Namespace, compared: bool
) -> dict[str, Tensor]:
    """The windows of each protocol that is needed; a comparison is made on llama.cpp's."""
    ids = ids_of.encode(text.text)
    cut: dict[str, Tensor] = {}
    if args.protocol != "llama.cpp":
        limit = args.chunks or text.windows
        cut["papers"] = paper_windows(ids, ids_of.bos, args.ctx, limit, text.name)
    if args.protocol != "papers" or compared:
        cut["llama.cpp"] = llama_windows(ids, ids_of.bos, LLAMA_WINDOW, args.chunks, text.name)
    for windows in cut.values():
        refuse_degenerate_tokens(windows, text.name)
    return cut


def _check_windows(
    model: Model, cut: dict[str, Tensor], args: argparse.Namespace, reporter: Reporter
) -> None:
    """Refuse windows beyond the model's context; what is allowed is said once for a model."""

    def warn(line: str) -> None:
        if line not in reporter.warnings:
            reporter.warn(line)

    for protocol, windows in cut.items():
        option = "--ctx" if protocol == "papers" else "--protocol papers --ctx"
        check_context(
            windows.shape[1], model.context, model.name, option, allow=args.allow_long, warn=warn
        )


def _write(folder: Path, rows: list[Row], reference: Model | None) -> None:
    from pt2_eval.table import markdown

    write_json(folder / "eval.json", [r.record() for r in rows])
    with atomic_path(folder / "eval.md") as tmp:
        table = markdown(rows, reference.name if reference is not None else None)
        tmp.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
