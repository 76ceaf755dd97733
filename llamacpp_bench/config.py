"""Every setting of a run, each of which is an option of `pt2-bench` as well."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from llamacpp_bench.run.baselines import Wanted, parse_baselines
from llamacpp_bench.run.load import SHORT_TIME, SPEED, Load
from pt2_core.options import option, positive

MIN_ROUNDS = 5
BASELINES, PERPLEXITY, OUTPUT = "baselines", "perplexity", "output"
SYNTHETIC = "synthetic models (random weights: speed only)"
GROUPS = (BASELINES, SPEED, SHORT_TIME, PERPLEXITY, SYNTHETIC, OUTPUT)


def gigabytes(text: str) -> float:
    """GB/s as bytes per second.

    Raises:
        argparse.ArgumentTypeError: not a number.
    """
    try:
        return float(text) * 1e9
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text} is not a number") from e


@dataclass(frozen=True)
class Config(Load):
    """Every setting of a run: these and those of :class:`Load`. Options say what each one does.

    Units that differ from the command line's: `bandwidth` is in bytes per second here. `text` may
    be None only where `perplexity` is False.
    """

    baselines: tuple[Wanted, ...] = option(
        (Wanted(type="Q2_K"),),
        "types for llama-quantize and .gguf files, commas between, or none; ratios refer to the "
        "first (default: q2_k)",
        group=BASELINES,
        flags="--baseline",
        parse=lambda text: tuple(parse_baselines(text)),
        metavar="LIST",
    )
    source: str | None = option(
        None,
        "F16/BF16 GGUF or Hugging Face folder of the same model, to make baselines from (default: "
        "what the artifact in this folder was made from, if it is the model's)",
        group=BASELINES,
        flags="--source --hf",
        metavar="PATH",
    )
    imatrix_text: str | None = option(
        None,
        "calibration text for an importance matrix, used for all baselines made here; IQ1 and IQ2 "
        "types need one",
        group=BASELINES,
        metavar="TEXT",
    )
    rounds: int = option(
        MIN_ROUNDS,
        "default: %(default)s",
        group=SPEED,
        flags="-r --rounds",
        parse=positive,
        metavar="N",
    )
    variant: str = option("cpu", "which build", group=SPEED, choices=("cpu", "cuda", "stock"))
    bin_dir: str | None = option(
        None,
        "the programs of this folder instead of a build",
        group=SPEED,
        flags="--bin",
        metavar="DIR",
    )
    bandwidth: float | None = option(
        None, "instead of measuring it", group=SPEED, parse=gigabytes, metavar="GB/s"
    )
    bandwidth_program: str | None = option(
        None,
        "a program that measures it and ends with a line of JSON: bytes_per_second, method",
        group=SPEED,
        metavar="FILE",
    )
    placement: str = option(
        "all",
        "of which files to look up where the operations run, at the cost of one more loading each "
        "(default: %(default)s)",
        group=SPEED,
        choices=("all", "ternary", "none"),
    )
    strict: bool = option(False, "an operation on the CPU in a GPU run is an error", group=SPEED)
    time_limit: float | None = option(
        None,
        "of each shape: no round begins that would end later (the first one is always run)",
        group=SHORT_TIME,
        parse=positive,
        metavar="S",
    )
    keep_going: bool = option(
        False,
        "leave a model out when a program fails on it (exit status 1 at the end)",
        group=SHORT_TIME,
    )
    text: str | None = option(
        None,
        "what is scored: a text file, JSON lines, a folder, or wikitext2, ptb or c4 (test sets). "
        "Lines end in LF, a byte order mark is left out, as in pt2-eval",
        group=PERPLEXITY,
        metavar="TEXT",
    )
    text_field: str | None = option(
        None,
        "of JSON records, in --text and --imatrix-text (default: text, or a chat's messages "
        "without roles, or the only string field)",
        group=PERPLEXITY,
        metavar="NAME",
    )
    chunks: int | None = option(
        None, "only the first N x 512 tokens", group=PERPLEXITY, parse=positive, metavar="N"
    )
    perplexity: bool = option(True, "leave it out", group=PERPLEXITY)
    work: str | None = option(
        None,
        "where the synthetic files are written (default: in --out)",
        group=SYNTHETIC,
        metavar="DIR",
    )
    keep: bool = option(False, "do not delete the synthetic files afterwards", group=SYNTHETIC)
    out: str | None = option(
        None, "default: bench-<model>-<time> here", group=OUTPUT, metavar="DIR"
    )
    report: bool = option(True, "only results.json (pt2-bench report makes the rest)", group=OUTPUT)
    quiet: bool = option(False, "no progress and no tables", group=OUTPUT)
