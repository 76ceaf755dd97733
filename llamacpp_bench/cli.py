"""The command `pt2-bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llamacpp_bench.config import GROUPS, SYNTHETIC, Config
from pt2_core import formats
from pt2_core.cli import ArgumentParser, check_threads, run_cli
from pt2_core.errors import PT2Error
from pt2_core.files import make_folder
from pt2_core.options import add_options, option_values

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
    from llamacpp_bench.show.compare import print_comparison

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
    from llamacpp_bench.results import load_results
    from llamacpp_bench.show.fill import fill_file
    from llamacpp_bench.show.merge import merge
    from llamacpp_bench.show.published import load_published
    from llamacpp_bench.show.tables import print_tables
    from llamacpp_bench.show.write import write_reports

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
    from llamacpp_bench.bench_files import bench
    from llamacpp_bench.show.tables import print_tables

    check_threads(args.threads)
    config = Config(**option_values(args, Config))
    if args.synthetic:
        from llamacpp_bench.bench_synthetic import bench_synthetic
        from llamacpp_bench.run.synthetic import parse_shapes, parse_types

        if args.models:
            raise PT2Error("give either model files or --synthetic, not both")
        shapes, types = parse_shapes(args.synthetic), parse_types(args.types)
        results = bench_synthetic(shapes, types, config)
    else:
        results = bench(args.models, config)
    if not config.quiet:
        print_tables(results)
    return 1 if results.failures else 0


def make_parser() -> argparse.ArgumentParser:
    p = ArgumentParser(
        prog="pt2-bench",
        description="Speed, perplexity, size and placement of GGUF models on llama.cpp, against "
        "baselines that it makes itself.",
        epilog=EPILOG,
    )
    p.add_argument("models", nargs="*", metavar="model.gguf", help="files to measure")
    g = add_options(p, Config, GROUPS)[SYNTHETIC]
    g.add_argument("--synthetic", metavar="SHAPES", help="1b, 7b, 13b, 30b, 65b (commas between)")
    g.add_argument(
        "--types",
        default=",".join([*formats.TYPES, "q2_k"]),
        help=f"of the synthetic files: {', '.join(formats.TYPES)}, q2_k, q2_0, iq1_m, iq2_xxs, "
        "tq2_0, tq1_0, f16 ... (default: %(default)s); stock types as llama-quantize mixes them",
    )
    return p


if __name__ == "__main__":
    sys.exit(main())
