"""Figures: speed bars and size against perplexity. Okabe-Ito colours, which the colour-blind see
apart; the baseline is grey."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from llamacpp_bench.report import caption, figure, perplexity_of, protocols
from llamacpp_bench.results import Model, Results
from quantize.common import atomic_path

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#B8A800", "#000000")
BASE_COLOUR = "#8A8A8A"
STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.dpi": 100,
    "savefig.dpi": 200,
}


def write_plots(results: Results, out: Path) -> list[Path]:
    """Write speed.png and, where perplexities were measured, size-perplexity.png.

    Returns:
        The files written.
    """
    written = []
    with plt.rc_context(STYLE):
        if results.samples:
            written.append(_save(speed_figure(results), out / "speed.png"))
        if protocols(results):
            written.append(_save(quality_figure(results), out / "size-perplexity.png"))
    return written


def _save(fig: Figure, path: Path) -> Path:
    with atomic_path(path) as tmp:
        fig.savefig(tmp, format="png", bbox_inches="tight")
    plt.close(fig)
    return path


def test_title(test: str) -> str:
    """`pp128+tg256` -> `End to end: 128 + 256 tokens`."""
    name, _, depth = test.partition("@d")
    parts = [p[2:] for p in name.split("+")]
    after = f" at depth {depth}" if depth else ""
    if len(parts) == 2:
        return f"End to end: {parts[0]} + {parts[1]} tokens{after}"
    kind = "Prefill" if name.startswith("pp") else "Decode"
    return f"{kind}: {parts[0]} tokens{after}"


def colour_of(results: Results) -> dict[str, str]:
    """One colour per bar name; the baseline of each group is grey."""
    colours: dict[str, str] = {}
    bases = {short_name(m) for m in results.models if m.name == results.baseline.get(m.group)}
    free = iter(COLOURS * 8)
    for m in results.models:
        name = short_name(m)
        if name not in colours:
            colours[name] = BASE_COLOUR if name in bases else next(free)
    return colours


def short_name(model: Model) -> str:
    """The name within its group: of `7b TQ2_1` in group `7b` it is `TQ2_1`."""
    return model.name.removeprefix(f"{model.group} ") if model.group else model.name


def speed_figure(results: Results) -> Figure:
    """Bars of tokens/s with standard deviations, one panel per test."""
    grouped = len(results.groups()) > 1
    tests = results.tests()
    width = max(9.0, 3.4 * len(tests))
    rows = len(results.models) if not grouped else 8
    fig, axes = plt.subplots(
        1, len(tests), figsize=(width, 1.3 + 0.34 * rows), squeeze=False, sharey=not grouped
    )
    for ax, test in zip(axes[0], tests, strict=True):
        (grouped_panel if grouped else single_panel)(ax, results, test)
        ax.set_title(test_title(test), loc="left")
    if grouped:
        handles, labels = axes[0][0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="upper center", ncol=len(labels), frameon=False)
    fig.tight_layout(rect=(0, 0, 1, 0.93 if grouped else 1), w_pad=2.0)
    add_caption(fig, results, "Bars: mean; lines: standard deviation over rounds.", width)
    return fig


def single_panel(ax: Any, results: Results, test: str) -> None:
    """Horizontal bars, one per model, so that long names stay readable."""
    colours = colour_of(results)
    models = [m for m in results.models if results.values(m.name, test)]
    top = max(results.summary(m.name, test).high for m in models)
    for y, m in enumerate(models):
        s = results.summary(m.name, test)
        ax.barh(y, s.mean, xerr=s.stdev, color=colours[short_name(m)], height=0.68, capsize=2.5)
        ratio = results.ratio(m, test)
        is_base = m.name == results.baseline.get(m.group)
        extra = "" if ratio is None or is_base else f"  {ratio.median:.2f}x"
        end = s.mean + s.stdev
        ax.text(end + 0.02 * top, y, f"{figure(s.mean)}{extra}", va="center", fontsize=8)
    ax.set_yticks(range(len(models)), [short_name(m) for m in models])
    ax.set_ylim(len(models) - 0.4, -0.6)
    ax.set_xlim(0, 1.42 * top)
    ax.set_xlabel("tokens/s")
    ax.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    ax.tick_params(axis="y", length=0)


def grouped_panel(ax: Any, results: Results, test: str) -> None:
    """Groups of vertical bars relative to each group's baseline: shapes differ a hundredfold."""
    colours = colour_of(results)
    groups = results.groups()
    names = list(colours)
    width = 0.84 / len(names)
    top = 1.0
    for i, name in enumerate(names):
        xs, heights, errors, texts = [], [], [], []
        for g, group in enumerate(groups):
            m = next((x for x in results.models if (x.group, short_name(x)) == (group, name)), None)
            ratio = results.ratio(m, test) if m else None
            if m is None or ratio is None:
                continue
            xs.append(g + (i - (len(names) - 1) / 2) * width)
            heights.append(ratio.median)
            errors.append(ratio.stdev)
            texts.append(figure(results.summary(m.name, test).mean))
        ax.bar(xs, heights, width * 0.94, yerr=errors, color=colours[name], label=name, capsize=2)
        for x, h, e, text in zip(xs, heights, errors, texts, strict=True):
            ax.annotate(
                text, (x, h + e), (0, 3), textcoords="offset points", rotation=90, fontsize=7,
                ha="center", va="bottom",
            )  # fmt: skip
            top = max(top, h + e)
    ax.set_ylim(0, 1.28 * top)
    ax.set_xticks(range(len(groups)), [g.upper() for g in groups])
    base = short_name(next(m for m in results.models if m.name in results.baseline.values()))
    ax.set_ylabel(f"speed relative to {base}")
    ax.grid(axis="y", color="#DDDDDD", linewidth=0.6)


def quality_figure(results: Results) -> Figure:
    """File size against perplexity, one panel per protocol; down and left is better."""
    kinds = protocols(results)
    width = max(6.0, 4.8 * len(kinds))
    fig, axes = plt.subplots(1, len(kinds), figsize=(width, 4.0), squeeze=False)
    colours = colour_of(results)
    for ax, (name, window) in zip(axes[0], kinds, strict=True):
        points = []
        for m in results.models:
            p = perplexity_of(m, name)
            if p is None:
                continue
            x = m.file_bytes / 1e6
            ax.errorbar(
                x, p.ppl, yerr=p.error, fmt="o", ms=7, capsize=3, color=colours[short_name(m)]
            )
            points.append((x, p.ppl, short_name(m)))
        scored = "second half scored" if name == "llama.cpp" else "every token scored"
        ax.set_title(f"{name} protocol: {window} tokens, {scored}", loc="left", fontsize=9)
        ax.set_xlabel("file size (MB)")
        ax.set_ylabel("perplexity (lower is better)")
        ax.grid(color="#DDDDDD", linewidth=0.6)
        ax.margins(x=0.22, y=0.16)
        label_points(ax, points)
    fig.tight_layout(w_pad=2.5)
    add_caption(fig, results, "Lines: standard error of the perplexity.", width)
    return fig


def label_points(ax: Any, points: list[tuple[float, float, str]]) -> None:
    """Names beside the points, moved up or down where they would cover one another."""
    fig = ax.figure
    fig.canvas.draw()
    taken = [ax.transData.transform((x, y)) for x, y, _ in points]
    boxes: list[Any] = []
    offsets = [(9, 0), (9, 11), (9, -11), (-9, 0), (-9, 11), (-9, -11), (9, 22), (9, -22), (0, 34)]
    for x, y, name in sorted(points):
        for dx, dy in offsets:
            text = ax.annotate(
                name, (x, y), (dx, dy), textcoords="offset points", fontsize=8, va="center",
                ha="left" if dx >= 0 else "right",
            )  # fmt: skip
            box = text.get_window_extent(fig.canvas.get_renderer())
            frame = ax.get_window_extent()
            inside = box.x0 >= frame.x0 and box.x1 <= frame.x1
            free = not any(box.overlaps(b) for b in boxes)
            clear = not any(box.expanded(1.0, 1.25).contains(*p) for p in taken)
            if (inside and free and clear) or (dx, dy) == offsets[-1]:
                boxes.append(box)
                break
            text.remove()


def add_caption(fig: Figure, results: Results, note: str, width: float) -> None:
    """Machine, build and date below the panels."""
    text = " ".join([*caption(results), note])
    lines = textwrap.wrap(text, width=int(width * 16))
    fig.text(0.01, -0.01, "\n".join(lines), fontsize=7, va="top", color="#444444")
