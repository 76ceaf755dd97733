"""Results as tables: on screen (rich), Markdown and CSV. The rows are made once, for all three."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from llamacpp_bench.results import Model, Perplexity, Results
from quantize.common import atomic_path, human_bytes

Rows = list[list[str]]


def write_reports(results: Results, out: Path) -> None:
    """Write results.md, results.csv and the plots into the folder `out`."""
    from llamacpp_bench.plots import write_plots

    plots = write_plots(results, out)
    write_text(out / "results.md", markdown(results, [p.name for p in plots]))
    write_text(out / "results.csv", to_csv(results))


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------- cells


def speed_cell(results: Results, model: Model, test: str) -> str:
    """`135.2 ± 0.8 (1.52x)`: mean and standard deviation of tokens/s, ratio to the baseline."""
    if not results.values(model.name, test):
        return "-"
    s = results.summary(model.name, test)
    ratio = results.ratio(model, test)
    text = f"{figure(s.mean)} ± {figure(s.stdev)}"
    if ratio is None:
        return text
    if model.name == results.baseline.get(model.group):
        return f"{text} (1x)"
    return f"{text} ({ratio.median:.2f}x)"


def figure(value: float) -> str:
    """A number with three or four significant digits."""
    if value >= 1000:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def perplexity_of(model: Model, protocol: str) -> Perplexity | None:
    return next((p for p in model.perplexity if p.protocol == protocol), None)


def perplexity_cell(p: Perplexity | None) -> str:
    if p is None:
        return "-"
    return f"{p.ppl:.3f}" + ("" if p.error is None else f" ± {p.error:.3f}")


def share_cell(results: Results, model: Model) -> str:
    """`12.3 GB/s (61%)` for the first pure decode test."""
    for test in results.tests():
        share = results.bandwidth_share(model, test)
        if share is not None:
            rate = share * float(results.bandwidth["bytes_per_second"])
            return f"{rate / 1e9:.1f} GB/s ({share:.0%})"
    return "-"


def protocols(results: Results) -> list[tuple[str, int]]:
    """The protocols measured, with their window lengths."""
    found = [(p.protocol, p.context) for m in results.models for p in m.perplexity]
    return list(dict.fromkeys(found))


# -------------------------------------------------------------------------------------------- rows


def speed_rows(results: Results) -> Rows:
    """Header and one row per model: speeds, bandwidth, peak memory."""
    tests = results.tests()
    head = ["model", *(f"{t} (tokens/s)" for t in tests), "decode reads", "peak memory"]
    rows = [head]
    for m in results.models:
        cells = [speed_cell(results, m, t) for t in tests]
        rss = human_bytes(m.peak_rss) if m.peak_rss else "-"
        rows.append([m.name, *cells, share_cell(results, m), rss])
    return rows


def size_rows(results: Results) -> Rows:
    """Header and one row per model: type, size, bits per weight, perplexities."""
    kinds = protocols(results)
    head = ["model", "main type", "size", "bpw"]
    rows = [[*head, *(f"PPL {name} ({window})" for name, window in kinds)]]
    for m in results.models:
        ppl = [perplexity_cell(perplexity_of(m, name)) for name, _ in kinds]
        rows.append([m.name, m.main_type, human_bytes(m.file_bytes), f"{m.bpw:.3f}", *ppl])
    return rows


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
                each = (f"{name} for {count}" for name, count in packed.items())
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
    repack = "" if c.get("repack", True) else ", no repacking"
    lines.append(
        f"llama.cpp {b.get('build_commit') or '?'} ({b['description']}, {b.get('backends') or '?'}"
        f"), {c['threads']} threads{repack}, {c['rounds']} interleaved rounds."
    )
    rate = float(results.bandwidth.get("bytes_per_second", 0))
    if rate:
        method = results.bandwidth["method"]
        lines.append(f"Memory reads measured in this run: {rate / 1e9:.1f} GB/s ({method}).")
    if c.get("text"):
        lines.append(f"Perplexity on {c['text']}{_chunks(c.get('chunks'))}.")
    if results.synthetic:
        lines.insert(0, f"Synthetic models: {c['synthetic']}.")
    return lines


def _chunks(chunks: int | None) -> str:
    return "" if chunks is None else f", its first {chunks} windows of 512 tokens"


# ----------------------------------------------------------------------------------------- outputs


def print_tables(results: Results, console: Console | None = None) -> None:
    """The tables on screen."""
    console = console or Console(highlight=False)
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
    label = f" ({results.config['synthetic']})" if results.synthetic else ""
    base = ", ".join(dict.fromkeys(results.baseline.values()))
    return [
        (f"Speed{label}; in brackets the ratio to {base}", speed_rows(results)),
        ("Size and perplexity" if not results.synthetic else f"Size{label}", size_rows(results)),
        ("Where the weights' operations ran", placement_rows(results)),
    ]


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
        ["model", "group", "file", "main_type", "file_bytes", "bpw", "parameters", "peak_rss"]
        + [f"ppl_{name}_{window}" for name, window in kinds]
        + ["test", "rounds", "mean", "stdev", "median", "min", "max", "ratio", "ratio_stdev"]
        + ["bandwidth_share"]
    )
    for m in results.models:
        fixed = [m.name, m.group, m.file, m.main_type, m.file_bytes, m.bpw, m.parameters]
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
