"""The command `pt2-bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pt2_core import formats
from pt2_core.cli import ArgumentParser, check_threads, run_cli
from pt2_core.errors import PT2Error
from pt2_core.files import make_folder

if TYPE_CHECKING:
    from llamacpp_bench.pipeline import Config

EPILOG = """\
examples:
  against Q2_K, made from the model that the artifact in this folder was made from:
    pt2-bench model.gguf --text bundled:wiki.test
  against Q2_K and IQ1_M, made from the original folder:
    pt2-bench model.gguf --source path/to/hf-model --baseline q2_k,iq1_m \\
        --imatrix-text calibration.txt --text wiki.test.txt
  two files that exist, speed only:
    pt2-bench a.gguf --baseline b.gguf --no-perplexity
  the shapes of large models with random weights (speed only), two threads, no repacking:
    pt2-bench --synthetic 1b -t 2 -p 128 -n 32 --no-repack
  on a GPU, from 1 to 64 sequences at once and with up to 16 384 tokens in the cache:
    pt2-bench --synthetic 7b --variant cuda --work /dev/shm --batch 1,2,4,8,16,32,64 \\
        --batch-prompt 16 --batch-gen 64
    pt2-bench --synthetic 7b --variant cuda --work /dev/shm -p 0 -n 64 --depth 0,4096,16384
  what changed between two runs:
    pt2-bench compare old/results.json new/results.json
  one report of runs that measured parts of a comparison:
    pt2-bench report 7b/results.json 65b/results.json --out report

Each round runs llama-bench once per model, so that a drift of the machine hits all alike. The
output folder gets results.json, results.csv, results.md, the plots and the logs of every call.
"""

REPORT_EPILOG = """\
example:
  pt2-bench report speed/results.json batch/results.json depth/results.json --out report
  pt2-bench report out/*/results.json --out benchmarks/h200/report \\
      --published benchmarks/h200/published.yaml --fill benchmarks/h200/README.md

Runs of one machine and one build whose files (by name and size) are the same model's; a test that
several runs have keeps the rounds of all of them.
"""

COMPARE_EPILOG = """\
example:
  pt2-bench compare before/results.json after/results.json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `pt2-bench`."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args and args[0] == "compare":
        return run_cli("pt2-bench compare", lambda: run_compare(args[1:]))
    if args and args[0] == "report":
        return run_cli("pt2-bench report", lambda: run_report(args[1:]))
    return run_cli("pt2-bench", lambda: run_bench(args), lower="--depth, --batch or -p")


def run_compare(argv: Sequence[str]) -> int:
    parser = ArgumentParser(
        prog="pt2-bench compare",
        description="Compare two results files: change of every figure, and whether it is noise.",
        epilog=COMPARE_EPILOG,
    )
    parser.add_argument("first", type=Path, metavar="A.json")
    parser.add_argument("second", type=Path, metavar="B.json")
    args = parser.parse_args(argv)
    from llamacpp_bench.compare import print_comparison

    print_comparison(args.first, args.second)
    return 0


def run_report(argv: Sequence[str]) -> int:
    parser = ArgumentParser(
        prog="pt2-bench report",
        description="Tables and plots of one or several results files, as one comparison.",
        epilog=REPORT_EPILOG,
    )
    parser.add_argument("results", type=Path, nargs="+", metavar="results.json")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--published",
        metavar="FILE.yaml",
        help="others' speeds over a 2-bit baseline, shown beside these in speedup.png",
    )
    parser.add_argument(
        "--fill",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.md",
        help="put the tables into a Markdown file, between <!-- pt2-bench: speed --> (or ratios, "
        "batch, depth, conditions, commands) and <!-- end -->; may be repeated",
    )
    args = parser.parse_args(argv)
    from llamacpp_bench.fill import fill_file
    from llamacpp_bench.merge import merge
    from llamacpp_bench.report import print_tables, write_reports
    from llamacpp_bench.results import load_results
    from llamacpp_bench.speedup import load_published

    published = load_published(args.published) if args.published else None
    results = merge([load_results(path) for path in args.results])
    make_folder(args.out)
    results.save(args.out / "results.json")
    write_reports(results, args.out, published)
    for path in args.fill:
        fill_file(path, results, published)
    print_tables(results)
    return 0


def run_bench(argv: Sequence[str]) -> int:
    args = make_parser().parse_args(argv)
    from llamacpp_bench.pipeline import bench
    from llamacpp_bench.report import print_tables

    check_threads(args.threads)
    config = to_config(args)
    if args.synthetic:
        from llamacpp_bench.synthetic import parse_shapes, parse_types
        from llamacpp_bench.synthetic_bench import bench_synthetic

        if args.models:
            raise PT2Error("give either model files or --synthetic, not both")
        shapes, types = parse_shapes(args.synthetic), parse_types(args.types)
        results = bench_synthetic(shapes, types, config)
    else:
        results = bench(args.models, config)
    if not config.quiet:
        print_tables(results)
    return 1 if results.failures else 0


def to_config(args: argparse.Namespace) -> Config:
    """The options as a :class:`llamacpp_bench.Config`."""
    from llamacpp_bench.baselines import parse_baselines
    from llamacpp_bench.pipeline import Config

    return Config(
        baselines=tuple(parse_baselines(args.baseline)),
        source=args.source,
        imatrix_text=args.imatrix_text,
        text_field=args.text_field,
        prompt=args.prompt,
        gen=args.gen,
        pg=parse_pairs(args.pg or [default_pair(args)]),
        depths=parse_numbers(args.depth, "--depth"),
        batches=parse_numbers(args.batch, "--batch") if args.batch else (),
        batch_prompt=args.batch_prompt,
        batch_gen=args.batch_gen,
        rounds=args.rounds,
        repeats=args.repeats,
        threads=args.threads,
        gpu_layers=args.gpu_layers,
        repack=not args.no_repack,
        variant=args.variant,
        bin_dir=args.bin,
        perplexity=not args.no_perplexity,
        text=args.text,
        chunks=args.chunks,
        bandwidth=None if args.bandwidth is None else args.bandwidth * 1e9,
        bandwidth_program=args.bandwidth_program,
        placement=args.placement,
        time_limit=args.time_limit,
        tool_timeout=args.tool_timeout,
        keep_going=args.keep_going,
        strict=args.strict,
        out=args.out,
        work=args.work,
        report=not args.no_report,
        keep=args.keep,
        quiet=args.quiet,
    )


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """`"0,4096"` -> `(0, 4096)`."""
    try:
        numbers = tuple(int(w) for w in text.split(",") if w.strip())
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 0:
        raise PT2Error(f"{option} {text}: give whole numbers, separated by commas")
    return numbers


def default_pair(args: argparse.Namespace) -> str:
    """Without --pg, the lengths of -p and -n are also timed together."""
    return f"{args.prompt},{args.gen}" if args.prompt and args.gen else "none"


def parse_pairs(values: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """`["128,256"]` -> `((128, 256),)`; `none` leaves the test out."""
    pairs = []
    for text in values:
        if text == "none":
            continue
        numbers = parse_numbers(text, "--pg")
        if len(numbers) != 2 or 0 in numbers:
            raise PT2Error(f"--pg {text}: give a prompt and a generated length, like 128,256")
        pairs.append((numbers[0], numbers[1]))
    return tuple(pairs)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return value


def make_parser() -> argparse.ArgumentParser:
    p = ArgumentParser(
        prog="pt2-bench",
        description="Speed, perplexity, size and placement of GGUF models on llama.cpp, against "
        "baselines that it makes itself.",
        epilog=EPILOG,
    )
    p.add_argument("models", nargs="*", metavar="model.gguf", help="files to measure")
    add_baseline_options(p)
    add_speed_options(p)
    g = p.add_argument_group("perplexity")
    g.add_argument(
        "--text",
        metavar="TEXT",
        help="what is scored: a text file, JSON lines, a folder, or wikitext2, ptb or c4 (test "
        "sets). Lines end in LF, a byte order mark is left out, as in pt2-eval",
    )
    g.add_argument(
        "--text-field",
        metavar="NAME",
        help="of JSON records, in --text and --imatrix-text (default: text, or a chat's messages "
        "without roles, or the only string field)",
    )
    g.add_argument("--chunks", type=positive, metavar="N", help="only the first N x 512 tokens")
    g.add_argument("--no-perplexity", action="store_true", help="leave it out")
    g = p.add_argument_group("synthetic models (random weights: speed only)")
    g.add_argument("--synthetic", metavar="SHAPES", help="1b, 7b, 13b, 30b, 65b (commas between)")
    g.add_argument(
        "--types",
        default=",".join([*formats.TYPES, "q2_k"]),
        help=f"of the synthetic files: {', '.join(formats.TYPES)}, q2_k, q2_0, iq1_m, iq2_xxs, "
        "tq2_0, tq1_0, f16 ... (default: %(default)s); stock types as llama-quantize mixes them",
    )
    g.add_argument("--work", metavar="DIR", help="where they are written (default: in --out)")
    g.add_argument("--keep", action="store_true", help="do not delete them afterwards")
    g = p.add_argument_group("output")
    g.add_argument("--out", metavar="DIR", help="default: bench-<model>-<time> here")
    g.add_argument(
        "--no-report",
        action="store_true",
        help="only results.json (pt2-bench report makes the rest)",
    )
    g.add_argument("--quiet", action="store_true", help="no progress and no tables")
    return p


def add_baseline_options(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("baselines")
    g.add_argument(
        "--baseline",
        default="q2_k",
        metavar="LIST",
        help="types for llama-quantize and .gguf files, commas between, or none; ratios refer to "
        "the first (default: %(default)s)",
    )
    g.add_argument(
        "--source",
        "--hf",
        metavar="PATH",
        help="F16/BF16 GGUF or Hugging Face folder of the same model, to make baselines from "
        "(default: what the artifact in this folder was made from, if it is the model's)",
    )
    g.add_argument(
        "--imatrix-text",
        metavar="TEXT",
        help="calibration text for an importance matrix, used for all baselines made here; "
        "IQ1 and IQ2 types need one",
    )


def add_speed_options(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("speed (llama-bench)")
    g.add_argument("-p", "--prompt", type=natural, default=128, metavar="N", help="prefill tokens")
    g.add_argument("-n", "--gen", type=natural, default=256, metavar="N", help="decoded tokens")
    g.add_argument(
        "--pg",
        action="append",
        metavar="P,N",
        help="prefill and decode timed together; may be repeated (default: those of -p and -n; "
        "none leaves it out)",
    )
    g.add_argument(
        "--depth", default="0", metavar="LIST", help="tokens already in the KV cache, like 0,4096"
    )
    g.add_argument(
        "--batch",
        metavar="LIST",
        help="sequences decoded at once, like 1,8,64 (default: not timed)",
    )
    g.add_argument(
        "--batch-prompt", type=natural, metavar="N", help="their prompt's length (default: -p)"
    )
    g.add_argument("--batch-gen", type=natural, metavar="N", help="tokens of each (default: -n)")
    g.add_argument("-r", "--rounds", type=positive, default=5, metavar="N", help="default: 5")
    g.add_argument(
        "--repeats",
        type=positive,
        default=1,
        metavar="N",
        help="passes of a test in each round, whose mean counts (default: 1); on a GPU the first "
        "records a CUDA graph, which is most of the time of a short prompt",
    )
    g.add_argument("-t", "--threads", type=positive, metavar="N", help="default: all usable cores")
    g.add_argument("--gpu-layers", type=natural, metavar="N", help="default: all on a CUDA build")
    g.add_argument("--no-repack", action="store_true", help="weights stay as they are in the file")
    g.add_argument("--variant", choices=("cpu", "cuda", "stock"), default="cpu", help="which build")
    g.add_argument("--bin", metavar="DIR", help="the programs of this folder instead of a build")
    g.add_argument("--bandwidth", type=float, metavar="GB/s", help="instead of measuring it")
    g.add_argument(
        "--bandwidth-program",
        metavar="FILE",
        help="a program that measures it and ends with a line of JSON: bytes_per_second, method",
    )
    g.add_argument(
        "--placement",
        choices=("all", "ternary", "none"),
        default="all",
        help="of which files to look up where the operations run, at the cost of one more loading "
        "each (default: %(default)s)",
    )
    g.add_argument(
        "--strict", action="store_true", help="an operation on the CPU in a GPU run is an error"
    )
    g = p.add_argument_group("when time is short")
    g.add_argument(
        "--time-limit",
        type=positive,
        metavar="S",
        help="of each shape: no round begins that would end later (the first one is always run)",
    )
    g.add_argument(
        "--tool-timeout", type=positive, metavar="S", help="stop a program that runs longer"
    )
    g.add_argument(
        "--keep-going",
        action="store_true",
        help="leave a model out when a program fails on it (exit status 1 at the end)",
    )


if __name__ == "__main__":
    sys.exit(main())
