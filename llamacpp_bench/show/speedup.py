"""Speed relative to the baseline over the sizes of a model: the figure that papers show, and its
tables.

Three groups of bars (prefill, decode, both), one group of bars a shape, one bar a type; what others
have published stands beside it, from a YAML file like benchmarks/h200/published.yaml.
"""

from __future__ import annotations

import textwrap
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from llamacpp_bench.results import Model, Results
from llamacpp_bench.show.look import (
    COLOURS,
    caption,
    digits,
    plain_tests,
    short_name,
    test_title,
)
from llamacpp_bench.show.plots import add_caption, add_legend
from llamacpp_bench.show.published import Published
from llamacpp_bench.show.tables import Rows, decode_reads
from pt2_core import formats
from pt2_core.errors import PT2Error
from pt2_core.files import human_bytes

OURS = formats.NAMES
OURS_COLOURS = (COLOURS[0], COLOURS[5], COLOURS[2], COLOURS[3])
OTHER_COLOURS = ("#9A9A9A", "#BDBDBD", "#D9D9D9", "#777777")
PAPER_COLOUR = COLOURS[1]


# ------------------------------------------------------------------------------------------ figure


def bar_names(results: Results) -> list[str]:
    """The types that have bars: ours first, then the others; not the baseline, which is 1."""
    names = dict.fromkeys(short_name(m) for m in results.models)
    bases = {short_name(m) for m in results.models if m.name in results.baseline.values()}
    rest = [n for n in names if n not in OURS and n not in bases]
    return [n for n in OURS if n in names and n not in bases] + rest


def sizes(results: Results) -> list[str]:
    """The shapes from small to large."""
    smallest = {g: min(m.parameters for m in results.models if m.group == g)
                for g in results.groups()}  # fmt: skip
    return sorted(results.groups(), key=lambda g: smallest[g])


def speedup_figure(results: Results, published: Published | None = None) -> Figure:
    """Bars of speed over the baseline's, a panel for each plain test.

    Raises:
        PT2Error: no plain tests with a baseline.
    """
    tests = plain_tests(results)
    names, groups = bar_names(results), sizes(results)
    if not tests or not names:
        raise PT2Error("no speeds with ratios to a baseline: nothing to draw")
    width = max(9.0, 4.4 * len(tests))
    fig, axes = plt.subplots(1, len(tests), figsize=(width, 3.9), squeeze=False)
    colours = dict(zip([n for n in names if n in OURS], OURS_COLOURS, strict=False))
    others = [n for n in names if n not in OURS]
    colours |= {n: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, n in enumerate(others)}
    shown = {g: published.speedup.get(g, {}) for g in groups} if published else {}
    paper = published.name if published and any(shown.values()) else None
    for ax, test in zip(axes[0], tests, strict=True):
        bars = [(n, colours[n], ratios(results, groups, n, test)) for n in names]
        if paper is not None:  # between ours and llama.cpp's own
            stated = {g: v[test] for g, v in shown.items() if test in v}
            bars.insert(len(names) - len(others), (paper, PAPER_COLOUR, stated))
        draw_bars(ax, groups, bars, hatched=paper)
        ax.set_title(test_title(test), loc="left")
        ax.set_ylabel(f"speed relative to {base_name(results)}")
    fig.tight_layout(w_pad=2.0)
    add_legend(fig, axes[0][0])
    note = "Bars: median ratio over rounds."
    if published is not None and paper is not None:
        note += f" {paper}: {published.what} ({published.source}); bars without a number in the"
        note += " paper are left out."
    add_caption(fig, results, note, width)
    return fig


def base_name(results: Results) -> str:
    bases = (short_name(m) for m in results.models if m.name in results.baseline.values())
    return ", ".join(dict.fromkeys(bases))


def ratios(results: Results, groups: list[str], name: str, test: str) -> dict[str, float]:
    """Group -> speed of a type relative to the group's baseline."""
    found: dict[str, float] = {}
    for m in results.models:
        ratio = results.ratio(m, test)
        if m.group in groups and short_name(m) == name and ratio is not None:
            found[m.group] = ratio.median
    return found


def draw_bars(
    ax: Any, groups: list[str], bars: list[tuple[str, str, dict[str, float]]], hatched: str | None
) -> None:
    """One cluster per group. Bars stand close together where a group lacks some of them."""
    width = 0.86 / max(1, len(bars))
    top = 1.0
    labelled: set[str] = set()
    style: dict[str | None, Any] = {hatched: {"hatch": "///", "edgecolor": "white"}}
    for x, group in enumerate(groups):
        here = [(name, colour, v[group]) for name, colour, v in bars if group in v]
        for i, (name, colour, value) in enumerate(here):
            at = x + (i - (len(here) - 1) / 2) * width
            ax.bar(at, value, width * 0.94, color=colour,
                   label=name if name not in labelled else None, **style.get(name, {}))  # fmt: skip
            labelled.add(name)
            ax.annotate(f"{value:.1f}", (at, value), (0, 2), textcoords="offset points",
                        fontsize=7, ha="center", va="bottom")  # fmt: skip
            top = max(top, value)
    for name, colour, _ in bars:  # a legend of all, in one order, whatever this panel lacks
        if name not in labelled:
            ax.bar(0, 0, width, color=colour, label=name, **style.get(name, {}))
    ax.axhline(1.0, color="#444444", linewidth=1)
    ax.set_ylim(0, 1.12 * top)
    ax.set_xticks(range(len(groups)), [g.upper() or "model" for g in groups])
    ax.grid(axis="y", color="#DDDDDD", linewidth=0.6)


# ------------------------------------------------------------------------------------------ tables


def shape_rows(results: Results) -> Rows:
    """Header and a row per model: tokens/s and ratio of each plain test, and what decode reads."""
    tests = plain_tests(results)
    rows = [["shape", "type", "file", *tests, "a token reads", "decode reads", "of the memory"]]
    for group in sizes(results):
        for m in (m for m in results.models if m.group == group):
            cells = [speed_and_ratio(results, m, t) for t in tests]
            if set(cells) != {"-"}:
                row = [group.upper() or m.name, short_name(m), human_bytes(m.file_bytes)]
                rows.append([*row, *cells, *reading(results, m, tests)])
    return rows


def speed_and_ratio(results: Results, model: Model, test: str) -> str:
    """`402.9 (1.53x)`; the baseline without a ratio."""
    if not results.values(model.name, test):
        return "-"
    ratio = results.ratio(model, test)
    shown = digits(results.summary(model.name, test).mean)
    is_base = model.name == results.baseline.get(model.group)
    return shown if ratio is None or is_base else f"{shown} ({ratio.median:.2f}x)"


def reading(results: Results, model: Model, tests: list[str]) -> list[str]:
    """Bytes that a decoded token reads, the rate, and its share of the memory's: three cells."""
    found = decode_reads(results, model, tests)
    if found is None:
        return ["-", "-", "-"]
    read, rate, share = found
    return [human_bytes(read), f"{rate / 1e9:.0f} GB/s", "-" if share is None else f"{share:.0%}"]


def ratio_rows(results: Results, published: Published | None = None) -> Rows:
    """Header and a row per shape: the ratios of our types in each plain test, and the paper's."""
    tests = plain_tests(results)
    names = [n for n in bar_names(results) if n in OURS]
    head = [f"{n} {test_title(t).split(':')[0].lower()}" for t in tests for n in names]
    rows = [["shape", *head, *([published.name] if published else [])]]
    for group in sizes(results):
        cells = []
        for t in tests:
            for n in names:
                value = ratios(results, [group], n, t).get(group)
                cells.append("-" if value is None else f"{value:.2f}x")
        if published:
            stated = published.speedup.get(group, {}).items()
            words = (f"{v:g}x {test_title(t).split(':')[0].lower()}" for t, v in stated)
            cells.append("; ".join(words) or "-")
        rows.append([group.upper(), *cells])
    return rows


def conditions(results: Results) -> str:
    """The caption as one paragraph."""
    return "\n".join(textwrap.wrap(" ".join(caption(results)), 110))
