"""Perplexity in two protocols, both computed by llama-perplexity.

`llama.cpp`: windows of 512 tokens, each beginning with BOS where the tokenizer adds one; only the
second half of a window is scored. What llama.cpp's own tables use.

`papers`: windows of 2048 tokens in which every token is scored, as in the papers on quantisation
(GPTQ, PT2-LLM). llama-perplexity scores the last S of each window's C tokens when it is given a
stride of S, and window i begins at token i * S. With S = C - 1 each window scores all of its
predictions, and each token of the text but the first is scored exactly once. Windows overlap by the
one token that the papers (and pt2-eval) leave unscored at every window's start (1 of 2048), so they
begin a little elsewhere: on 113 000 tokens of WikiText-2 the two differ by 0.1%. BOS stands at the
beginning of the text only, as there. llama-perplexity opens a context of `-c` plus half the stride,
hence the `-c` below; the window cannot be longer than the context the model states.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llamacpp_bench.results import Perplexity
from llamacpp_bench.run.load import Load
from llamacpp_bench.run.process import run_tool
from llamacpp_bench.run.tools import ToolBox
from pt2_core.errors import PT2Error
from pt2_core.gguf_info import GGUFInfo
from pt2_core.texts.sources import DATA_SETS, Text, read_text, split_sources
from pt2_llama.perplexity import TRIES, until_told

LLAMA_WINDOW = 512
PAPERS_WINDOW = 2048
PROTOCOLS = ("llama.cpp", "papers")  # in the order of the tables
_STEP = re.compile(r"\[(\d+)\]\s*(-?[\d.]+|-?nan|-?inf),")
_FINAL = re.compile(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)")
_PLANNED = re.compile(r"(?:computing|calculating perplexity) over (\d+) chunks")
_HAVE = re.compile(r"tokenizes to only (\d+) tokens")


@dataclass(frozen=True)
class Plan:
    """How one protocol is run: window length in tokens, scored tokens per window, options."""

    protocol: str
    window: int
    scored: int
    arguments: tuple[str, ...]
    note: str = ""


def plan(protocol: str, info: GGUFInfo, chunks: int | None) -> Plan | None:
    """Options of llama-perplexity for a protocol; None when the model's context is below 256.

    Args:
        chunks: how many 512-token windows of text to use (None: all); the longer windows of the
            other protocol are as many fewer, so that both read the same text.
    """
    trained = info.hparam("context_length", PAPERS_WINDOW)
    wanted = LLAMA_WINDOW if protocol == "llama.cpp" else PAPERS_WINDOW
    # llama.cpp rounds a context up to 256, and the scored tokens are counted from its end.
    window = min(wanted, trained // 256 * 256)
    if window == 0:
        return None
    note = "" if window == wanted else f"window {window}: the model's context is {trained}"
    count = [] if chunks is None else ["--chunks", str(max(1, chunks * LLAMA_WINDOW // window))]
    if protocol == "llama.cpp":
        scored = window - window // 2 - 1
        return Plan(protocol, window, scored, ("-c", str(window), *count), note)
    stride = window - 1
    ctx = window - stride // 2
    options = ("-c", str(ctx), "-b", str(ctx), "--ppl-stride", str(stride), *count)
    return Plan(protocol, window, stride, options, note)


def perplexity_command(
    tools: ToolBox, info: GGUFInfo, text: Path, p: Plan, load: Load
) -> list[str]:
    argv = [str(tools.tool("llama-perplexity")), "-m", str(info.path), "-f", str(text)]
    argv += p.arguments
    if load.threads is not None:
        argv += ["-t", str(load.threads)]
    if load.gpu_layers is not None:
        argv += ["-ngl", str(load.gpu_layers)]
    if not load.repack:
        argv.append("--no-repack")
    return argv


def measure_perplexity(
    tools: ToolBox,
    info: GGUFInfo,
    text: Path,
    p: Plan,
    load: Load,
    log: Path,
    on_chunk: Callable[[int], None] | None = None,
) -> Perplexity:
    """Run llama-perplexity by a plan.

    Args:
        on_chunk: called with the number of windows finished so far.

    Raises:
        PT2Error: the text is too short for two windows, the program failed, or the perplexity is
            not a number.
    """
    tail = ""

    def follow(piece: str) -> None:
        nonlocal tail
        tail = (tail + piece)[-200:]
        if on_chunk is not None and (steps := _STEP.findall(tail)):
            on_chunk(int(steps[-1][0]))

    argv = perplexity_command(tools, info, text, p, load)

    def once() -> Perplexity | None:
        done = run_tool(argv, tools.env, log, follow)
        return parse_perplexity(done.stdout, log.read_text("utf-8", "replace"), p, text, log)

    found = until_told(once, lambda found: found is not None)
    if found is None:
        raise PT2Error(f"llama-perplexity lost its last lines {TRIES} times (log: {log})")
    return found


def parse_perplexity(stdout: str, stderr: str, p: Plan, text: Path, log: Path) -> Perplexity | None:
    """Read llama-perplexity's running figures (stdout) and final line (stderr).

    None when the last of them are missing, which the program's log thread is to blame for.

    The strided run prints no standard error. It follows from the running figures: those of n
    windows give each window's mean negative log-likelihood, whose spread over windows is the error
    of their mean.
    """
    short = _HAVE.search(stdout + stderr)
    if short:
        raise PT2Error(
            f"{text.name} has only {short[1]} tokens; {p.protocol} windows of {p.window} need "
            f"{2 * p.window}: give a longer text"
        )
    planned = _PLANNED.search(stdout + stderr)
    running = [float(v) for _, v in _STEP.findall(stdout) or _STEP.findall(stderr)]
    final = _FINAL.search(stdout + stderr)
    if planned is None:
        raise PT2Error(f"llama-perplexity does not say what it computes (log: {log})")
    if not all(math.isfinite(v) and v > 0 for v in running):
        raise PT2Error(f"llama-perplexity gave {running[-1]}; the model is broken (log: {log})")
    if len(running) < int(planned[1]) or (p.protocol == "llama.cpp" and final is None):
        return None
    ppl, error = running[-1], None
    if final:
        ppl, error = float(final[1]), float(final[2])
    elif len(running) > 1:
        error = ppl * standard_error(running)
    n = len(running)
    return Perplexity(p.protocol, ppl, error, p.window, n, n * p.scored, p.note)


def standard_error(running: list[float]) -> float:
    """Standard error of the mean log-likelihood from perplexities over the first 1..n windows."""
    totals = [math.log(v) * (i + 1) for i, v in enumerate(running)]
    each = [b - a for a, b in zip([0.0, *totals], totals, strict=False)]
    return statistics.stdev(each) / math.sqrt(len(each))


def scored_text(source: str | None, text_field: str | None) -> Text:
    """The text for perplexity.

    Raises:
        PT2Error: not given, or not to be had.
    """
    if source is None:
        raise PT2Error("no text for the perplexity: give --text FILE, or --no-perplexity")
    for one in split_sources(source):
        if not Path(one).exists() and one not in DATA_SETS:
            raise PT2Error(f"{one}: no such text file; give --text FILE, or --no-perplexity")
    return read_text(source, "test", text_field=text_field)
