"""Figures: speed bars and size against perplexity. Okabe-Ito colours, which the colour-blind see
apart; the baseline is grey."""

from __future__ import annotations

import itertools
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from llamacpp_bench.report import caption, figure, perplexity_of, plain_tests, protocols
from llamacpp_bench.results import Model, Results
from pt2_core.files import atomic_path

if TYPE_CHECKING:
    from llamacpp_bench.speedup import Published

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
MARKERS = "os^DvP*X"
ERRORS: dict[str, Any] = {"capsize": 2, "error_kw": {"elinewidth": 1.0, "ecolor": "#333333"}}


def write_plots(results: Results, out: Path, published: Published | None = None) -> list[Path]:
    """Write speed.png, and the other plots of what was measured.

    These are speedup.png (several shapes with ratios), depth.png, batch.png, size-perplexity.png.

    Returns:
        The files written.
    """
    written = []
    with matplotlib.rc_context(rc=STYLE):  # type: ignore[arg-type]  # its keys are literals
        if plain_tests(results):
            written.append(_save(speed_figure(results), out / "speed.png"))
            if published is not None or len(results.groups()) > 1:
                from llamacpp_bench.speedup import speedup_figure

                fig = speedup_figure(results, published)
                written.append(_save(fig, out / "speedup.png"))
        for mark, name in (("@d", "depth.png"), ("@b", "batch.png")):
            if any(scaling_points(results, m, mark)[0][1:] for m in results.models):
                written.append(_save(scaling_figure(results, mark), out / name))
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
    parts = [p[2:] for p in test.split("+")]
    if len(parts) == 2:
        return f"End to end: {parts[0]} + {parts[1]} tokens"
    kind = "Prefill" if test.startswith("pp") else "Decode"
    return f"{kind}: {parts[0]} tokens"


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
    """The name within its group: of `7b Q2_K` in group `7b` it is `Q2_K`."""
    return model.name.removeprefix(f"{model.group} ") if model.group else model.name


def speed_figure(results: Results) -> Figure:
    """Bars with standard deviations, one panel per test: tokens/s, or ratios for many shapes."""
    grouped = len(results.groups()) > 1
    tests = plain_tests(results)
    width = max(9.0, 3.6 * len(tests))
    height = 4.2 if grouped else 1.1 + 0.34 * len(results.models)
    fig, axes = plt.subplots(
        1, len(tests), figsize=(width, height), squeeze=False, sharey=not grouped
    )
    for ax, test in zip(axes[0], tests, strict=True):
        (grouped_panel if grouped else single_panel)(ax, results, test)
        ax.set_title(test_title(test), loc="left")
    fig.tight_layout(w_pad=2.0)
    if grouped:
        add_legend(fig, axes[0][0])
    note = "Bars: mean; lines: standard deviation over rounds."
    if grouped:
        note = "Bars: median ratio over rounds, lines: its standard deviation; figures: tokens/s."
    add_caption(fig, results, note, width)
    return fig


def add_legend(fig: Figure, ax: Any) -> None:
    """One legend for all panels, above their titles."""
    handles, labels = ax.get_legend_handles_labels()
    columns = min(int(fig.get_figwidth() / 1.5), len(labels))
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.01, 1.0)}
    fig.legend(handles, labels, ncol=columns, frameon=False, **place)


def single_panel(ax: Any, results: Results, test: str) -> None:
    """Horizontal bars, one per model, so that long names stay readable."""
    colours = colour_of(results)
    models = [m for m in results.models if results.values(m.name, test)]
    top = max(results.summary(m.name, test).high for m in models)
    for y, m in enumerate(models):
        s = results.summary(m.name, test)
        ax.barh(y, s.mean, xerr=s.stdev, color=colours[short_name(m)], height=0.68, **ERRORS)
        ratio = results.ratio(m, test)
        is_base = m.name == results.baseline.get(m.group)
        extra = "" if ratio is None or is_base else f"  {ratio.median:.2f}x"
        end = s.mean + s.stdev
        ax.text(end + 0.02 * top, y, f"{figure(s.mean)}{extra}", va="center", fontsize=8)
    ax.set_yticks(range(len(models)), [short_name(m) for m in models])
    ax.set_ylim(len(models) - 0.4, -0.6)
    ax.set_xlim(0, 1.5 * top)
    ax.xaxis.set_major_locator(MaxNLocator(4))
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
        ax.bar(xs, heights, width * 0.94, yerr=errors, color=colours[name], label=name, **ERRORS)
        for x, h, e, text in zip(xs, heights, errors, texts, strict=True):
            ax.annotate(
                text, (x, h + e), (0, 3), textcoords="offset points", rotation=90, fontsize=6.5,
                ha="center", va="bottom",
            )  # fmt: skip
            top = max(top, h + e)
    ax.set_ylim(0, 1.28 * top)
    ax.set_xticks(range(len(groups)), [g.upper() for g in groups])
    base = short_name(next(m for m in results.models if m.name in results.baseline.values()))
    ax.set_ylabel(f"speed relative to {base}")
    ax.grid(axis="y", color="#DDDDDD", linewidth=0.6)


def scaling_figure(results: Results, mark: str) -> Figure:
    """Decode speed over depth (`@d`) or number of sequences (`@b`), one panel per shape."""
    models = [m for m in results.models if scaling_points(results, m, mark)[0][1:]]
    groups = list(dict.fromkeys(m.group for m in models))
    across, down = min(2, len(groups)), -(-len(groups) // 2)
    width = max(6.0, 4.6 * across)
    fig, axes = plt.subplots(down, across, figsize=(width, 3.6 * down), squeeze=False)
    for ax in axes.flat[len(groups) :]:
        ax.set_visible(False)
    colours = colour_of(results)
    for ax, group in zip(axes.flat, groups, strict=False):
        for m in (m for m in models if m.group == group):
            xs, means, errors = scaling_points(results, m, mark)
            name = short_name(m)
            ax.errorbar(xs, means, errors, marker="o", ms=4, capsize=2, label=name,
                        color=colours[name])  # fmt: skip
        if mark == "@b":
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
        else:
            ax.set_ylim(bottom=0)
        ax.set_xlabel("sequences at once" if mark == "@b" else "tokens already in the cache")
        ax.set_ylabel("decode, tokens/s" + (" of all sequences" if mark == "@b" else ""))
        ax.set_title(group.upper() or "Decode", loc="left")
        ax.grid(color="#DDDDDD", linewidth=0.6)
    fig.tight_layout(w_pad=2.0)
    add_legend(fig, axes[0][0])
    add_caption(fig, results, "Lines at points: standard deviation over rounds.", width)
    return fig


def scaling_points(
    results: Results, model: Model, mark: str
) -> tuple[list[int], list[float], list[float]]:
    """x values, means and standard deviations of a model's decode tests with this mark.

    At depth 0 the plain test counts as the first point.
    """
    points = []
    decode = [t for t in results.tests() if t.startswith("tg") and (mark in t or "@" not in t)]
    for test in decode:
        values = results.values(model.name, test)
        x = int(test.partition(mark)[2] or 0)
        if values and (x or mark == "@d"):
            s = results.summary(model.name, test)
            points.append((x, s.mean, s.stdev))
    points.sort()
    return [p[0] for p in points], [p[1] for p in points], [p[2] for p in points]


def quality_figure(results: Results) -> Figure:
    """File size against perplexity, one panel per protocol; down and left is better.

    Names stand in a legend, colour and shape tell points apart: ternary files of one model have
    nearly equal perplexities, where names beside the points would cover one another.
    """
    kinds = protocols(results)
    width = max(6.0, 4.8 * len(kinds))
    fig, axes = plt.subplots(1, len(kinds), figsize=(width, 3.9), squeeze=False)
    colours = colour_of(results)
    shapes = dict(zip(colours, itertools.cycle(MARKERS), strict=False))
    for ax, (name, window) in zip(axes[0], kinds, strict=True):
        points = []
        for m in results.models:
            if p := perplexity_of(m, name):
                points.append((m.file_bytes / 1e6, p.ppl))
                label = short_name(m)
                ax.errorbar(*points[-1], yerr=p.error, fmt=shapes[label], ms=7, capsize=3,
                            elinewidth=1, color=colours[label], label=label)  # fmt: skip
        scored = "second half scored" if name == "llama.cpp" else "every token scored"
        ax.set_title(f"{name} protocol: {window} tokens, {scored}", loc="left", fontsize=9)
        ax.set_xlabel("file size (MB)")
        ax.set_ylabel("perplexity (lower is better)")
        ax.grid(color="#DDDDDD", linewidth=0.6)
        ax.margins(x=0.1, y=0.12)
        scale_axis(ax.xaxis, [p[0] for p in points])
        scale_axis(ax.yaxis, [p[1] for p in points])
    fig.tight_layout(w_pad=2.5)
    add_legend(fig, axes[0][0])
    add_caption(fig, results, "Lines: standard error of the perplexity.", width)
    return fig


def scale_axis(axis: Any, values: list[float]) -> None:
    """A logarithmic axis with plain numbers where the values differ more than threefold."""
    if max(values) / min(values) < 3:
        return
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_major_formatter(lambda v, _: f"{v:g}")
    axis.set_minor_locator(NullLocator())


def add_caption(fig: Figure, results: Results, note: str, width: float) -> None:
    """Machine, build and date below the panels."""
    text = " ".join([*caption(results), note])
    lines = textwrap.wrap(text, width=int(width * 17))
    fig.text(0.01, -0.01, "\n".join(lines), fontsize=7, va="top", color="#444444")
