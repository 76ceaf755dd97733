"""Results as tables: on screen (rich), Markdown and CSV. The rows are made once, for all three."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from llamacpp_bench.results import Model, Perplexity, Results, paired_ratio, token_bytes
from pt2_core.files import atomic_path, human_bytes
from pt2_core.words import screen

if TYPE_CHECKING:
    from llamacpp_bench.speedup import Published

Rows = list[list[str]]


def write_reports(results: Results, out: Path, published: Published | None = None) -> None:
    """Write results.md, results.csv and the plots into the folder `out`."""
    from llamacpp_bench.plots import write_plots  # matplotlib only when it is needed

    plots = write_plots(results, out, published)
    write_text(out / "results.md", markdown(results, [p.name for p in plots]))
    write_text(out / "results.csv", to_csv(results))


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------- cells


def speed_cell(results: Results, model: Model, test: str) -> str:
    """`135.2 ± 0.8`: mean and standard deviation (of two rounds or more) of tokens/s."""
    if not results.values(model.name, test):
        return "-"
    s = results.summary(model.name, test)
    return figure(s.mean) + (f" ± {figure(s.stdev)}" if s.n > 1 else "")


def ratio_cell(results: Results, model: Model, test: str) -> str:
    """`1.52x`; `1x` for the baseline itself."""
    ratio = results.ratio(model, test)
    if ratio is None:
        return "-"
    is_base = model.name == results.baseline.get(model.group)
    return "1x" if is_base else f"{ratio.median:.2f}x"


def figure(value: float) -> str:
    """A number with three or four significant digits: `12345`, `135.2`, `7.31`."""
    if value >= 1000:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def perplexity_of(model: Model, protocol: str) -> Perplexity | None:
    return next((p for p in model.perplexity if p.protocol == protocol), None)


def perplexity_cell(p: Perplexity | None) -> str:
    if p is None:
        return "-"
    digits = 3 if p.ppl < 10 else 2 if p.ppl < 1000 else 0
    return f"{p.ppl:.{digits}f}" + ("" if p.error is None else f" ± {p.error:.{digits}f}")


def protocols(results: Results) -> list[tuple[str, int]]:
    """The protocols measured, with their window lengths."""
    found = [(p.protocol, p.context) for m in results.models for p in m.perplexity]
    return list(dict.fromkeys(found))


# -------------------------------------------------------------------------------------------- rows


def plain_tests(results: Results) -> list[str]:
    """The tests at depth 0 and batch 1."""
    return [t for t in results.tests() if "@" not in t]


def depth_tests(results: Results) -> list[str]:
    """The tests at a depth, and those without one that they are held against."""
    deep = [t for t in results.tests() if "@d" in t]
    start = {t.partition("@")[0] for t in deep}
    return [t for t in results.tests() if t in start or t in deep]


def batch_tests(results: Results) -> list[str]:
    """The tests of several sequences at once (and of one, measured in the same way)."""
    return [t for t in results.tests() if "@b" in t]


def speed_rows(results: Results, tests: list[str]) -> Rows:
    """Header and one row per model: tokens/s of each test, and the ratio to the baseline."""
    rows = [["model", *(cell for t in tests for cell in (t, "ratio"))]]
    for m in results.models:
        row = [m.name]
        for t in tests:
            row += [speed_cell(results, m, t), ratio_cell(results, m, t)]
        rows.append(row)
    return rows


def depth_rows(results: Results) -> Rows:
    """The rows of :func:`speed_rows` for the tests at a depth, of the models that have them."""
    tests = depth_tests(results)
    deep = [t for t in tests if "@d" in t]
    rows = speed_rows(results, tests)
    keep = [any(results.values(m.name, t) for t in deep) for m in results.models]
    return [rows[0], *(row for row, kept in zip(rows[1:], keep, strict=True) if kept)]


def batch_rows(results: Results) -> Rows:
    """Header and one row per model: tokens/s of all sequences, and how many times those of one."""
    tests = batch_tests(results)
    rows = [["model", *tests]]
    for m in results.models:
        if any(results.values(m.name, t) for t in tests):
            rows.append([m.name, *(batch_cell(results, m, t) for t in tests)])
    return rows


def batch_cell(results: Results, model: Model, test: str) -> str:
    """`812.4 (5.31x)`: tokens/s, and the factor over one sequence where that was measured."""
    if not results.values(model.name, test):
        return "-"
    times = batch_gain(results, model, test)
    shown = figure(results.summary(model.name, test).mean)
    return shown if times is None else f"{shown} ({times:.2f}x)"


def batch_gain(results: Results, model: Model, test: str) -> float | None:
    """Tokens/s of `tg64@b8` over those of `tg64@b1`, median over rounds; None where it is that."""
    one = f"{test.partition('@')[0]}@b1"
    mine, single = results.by_round(model.name, test), results.by_round(model.name, one)
    both = sorted(mine.keys() & single.keys())
    ratio = paired_ratio([mine[r] for r in both], [single[r] for r in both])
    return None if ratio is None or test == one else ratio.median


def size_rows(results: Results) -> Rows:
    """Header and one row per model: type, size, bits per weight, perplexities."""
    kinds = protocols(results)
    head = ["model", "main type", "size", "bpw"]
    rows = [[*head, *(f"PPL {name} {window}" for name, window in kinds)]]
    for m in results.models:
        ppl = [perplexity_cell(perplexity_of(m, name)) for name, _ in kinds]
        rows.append([m.name, m.main_type, human_bytes(m.file_bytes), f"{m.bpw:.3f}", *ppl])
    return rows


def memory_rows(results: Results) -> Rows:
    """Header and one row per model: peak memory, bytes a decoded token reads, rate and share."""
    rows = [["model", "peak memory", "a token reads", "decode reads", "share"]]
    tests = plain_tests(results)
    for m in results.models:
        cells = [m.name, human_bytes(m.peak_rss) if m.peak_rss else "-"]
        found = decode_reads(results, m, tests)
        if found is None:
            rows.append([*cells, "-", "-", "-"])
            continue
        read, rate, share = found
        share_text = "-" if share is None else f"{share:.0%}"
        rows.append([*cells, human_bytes(read), f"{rate / 1e9:.2f} GB/s", share_text])
    return rows


def decode_reads(
    results: Results, model: Model, tests: list[str]
) -> tuple[float, float, float | None] | None:
    """Of the first pure decode test that a model has: bytes a token reads, bytes per second, and
    their share of the memory's bandwidth (None where that was not measured). None without a test.
    """
    for test in tests:
        read = token_bytes(model, test)
        if read and results.values(model.name, test):
            rate = read * results.summary(model.name, test).mean
            return read, rate, results.bandwidth_share(model, test)
    return None


def placement_rows(results: Results) -> Rows:
    """Header and one row per model and tensor type: which backend did what."""
    rows = [["model", "tensor type", "ran on"]]
    for m in results.models:
        for kind, ops in m.placement.ops.items():
            rows.append([m.name, kind, placement_cell(m, kind, ops)])
    return rows


def placement_cell(model: Model, kind: str, ops: dict[str, dict[str, int]]) -> str:
    """`MUL_MAT on CPU (24 tensors, repacked as q2_K_8x8)`."""
    packed = model.placement.repacked.get(kind, {})
    parts = []
    for op, backends in ops.items():
        for backend, n in backends.items():
            note = f"{n} tensor{'s' if n != 1 else ''}"
            if op.startswith("MUL_MAT") and backend == "CPU" and packed:
                each = (name if c == n else f"{name} for {c}" for name, c in packed.items())
                note += f", repacked as {', '.join(each)}"
            parts.append(f"{op} on {backend} ({note})")
    path = model.placement.kernels.get(kind)
    return "; ".join(parts) + (f"; kernel: {path}" if path else "")


def caption(results: Results) -> list[str]:
    """What the figures were measured on, in sentences."""
    m, c = results.machine, results.config
    gpu = f", {', '.join(m['gpus'])}" if m.get("gpus") else ""
    ram = human_bytes(m["ram_bytes"])
    lines = [f"{m['cpu']}, {m['cores']} cores, {ram} RAM{gpu}; {m['system']}; {m['date']}."]
    b = results.build
    threads = f"{c['threads']} thread{'s' if c['threads'] != 1 else ''}"
    repack = "" if c.get("repack", True) else ", no repacking"
    repeats = int(c.get("repeats", 1))
    least = int(c.get("repeats_least", repeats))
    passes = f" of {f'{least} to ' if least < repeats else ''}{repeats} passes"
    passes = passes if repeats > 1 else ""
    lines.append(
        f"llama.cpp {b.get('build_commit') or '?'} ({b['description']}, {b.get('backends') or '?'}"
        f"), {threads}{repack}, {c['rounds']} interleaved rounds{passes}."
    )
    rate = float(results.bandwidth.get("bytes_per_second", 0))
    if rate:
        method = results.bandwidth["method"]
        known = "given" if method == "given" else f"measured in this run: {method}"
        lines.append(f"Memory can be read at {rate / 1e9:.1f} GB/s ({known}).")
    if c.get("text"):
        lines.append(f"Perplexity on {c['text']}{_chunks(c.get('chunks'))}.")
    if results.synthetic:
        lines.insert(0, f"Synthetic models, {c['synthetic']}.")
    return lines


def _chunks(chunks: int | None) -> str:
    return "" if chunks is None else f", its first {chunks} windows of 512 tokens"


# ----------------------------------------------------------------------------------------- outputs


def print_tables(results: Results, console: Console | None = None) -> None:
    """The tables on screen."""
    console = console or screen()
    for title, rows in sections(results):
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
        for i, name in enumerate(rows[0]):
            right = i > 0 and name not in ("main type", "tensor type", "ran on")
            table.add_column(name, justify="right" if right else "left", overflow="fold")
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
    for line in caption(results):
        console.print(line, markup=False)


def sections(results: Results) -> list[tuple[str, Rows]]:
    """Title and rows of every table."""
    label = f" ({results.config['synthetic']})" if results.synthetic else ""
    base = ", ".join(dict.fromkeys(results.baseline.values()))
    what = f"tokens/s, mean ± standard deviation; ratio: to {base}, median over rounds"
    out = []
    if plain := plain_tests(results):
        out.append((f"Speed{label}: {what}", speed_rows(results, plain)))
    if depth_tests(results):
        out.append((f"Depth (@d: tokens in the cache){label}", depth_rows(results)))
    if batch_tests(results):
        title = f"Sequences at once (@b): tokens/s of all of them, and how many times one's{label}"
        out.append((title, batch_rows(results)))
    title = f"Size{label}" if results.synthetic else "Size and perplexity"
    out.append((title, size_rows(results)))
    title = "Memory: peak of the process, and what decode reads of the memory's bandwidth"
    memory = memory_rows(results)
    if any(set(row[1:]) != {"-"} for row in memory[1:]):
        out.append((title, memory))
    if len(places := placement_rows(results)) > 1:
        out.append(("Where the operations on the weights ran", places))
    return out


def markdown(results: Results, plots: list[str]) -> str:
    """The whole report as Markdown, the plots linked by file name."""
    out = ["# pt2-bench", ""]
    out += [" ".join(caption(results)), ""]
    for title, rows in sections(results):
        out += [f"## {title}", "", *markdown_table(rows), ""]
    for name in plots:
        out += [f"![{name}]({name})", ""]
    if results.warnings:
        out += ["## Warnings", "", *(f"- {w}" for w in results.warnings), ""]
    out += ["## Commands", "", "```", *results.commands, "```", ""]
    return "\n".join(out)


def markdown_table(rows: Rows) -> list[str]:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    return [line(rows[0]), "|" + " --- |" * len(rows[0]), *(line(r) for r in rows[1:])]


def to_csv(results: Results) -> str:
    """One row per model and test, numbers unrounded."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    kinds = protocols(results)
    writer.writerow(
        [
            "model",
            "group",
            "origin",
            "file",
            "main_type",
            "file_bytes",
            "bpw",
            "parameters",
            "peak_rss",
        ]
        + [f"ppl_{name}_{window}" for name, window in kinds]
        + ["test", "rounds", "mean", "stdev", "median", "min", "max", "ratio", "ratio_stdev"]
        + ["bandwidth_share"]
    )
    for m in results.models:
        fixed = [m.name, m.group, m.origin, m.file, m.main_type, m.file_bytes, m.bpw, m.parameters]
        ppl = [p.ppl if (p := perplexity_of(m, name)) else "" for name, _ in kinds]
        for test in results.tests():
            if not results.values(m.name, test):
                continue
            s, ratio = results.summary(m.name, test), results.ratio(m, test)
            share = results.bandwidth_share(m, test)
            writer.writerow(
                [*fixed, m.peak_rss, *ppl, test, s.n, s.mean, s.stdev, s.median, s.low, s.high]
                + ([ratio.median, ratio.stdev] if ratio else ["", ""])
                + ["" if share is None else share]
            )
    return buffer.getvalue()
