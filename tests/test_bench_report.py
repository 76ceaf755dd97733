"""pt2-bench: merged runs, sequences at once, speed-ups, tables put into Markdown, plots, CSV."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from bench_support import make_results

from llamacpp_bench import cli, load_results
from llamacpp_bench.results import Results, Sample
from llamacpp_bench.show.fill import fill
from llamacpp_bench.show.merge import merge
from llamacpp_bench.show.plots import quality_figure
from llamacpp_bench.show.published import load_published
from llamacpp_bench.show.speedup import ratio_rows, shape_rows, speedup_figure
from llamacpp_bench.show.tables import (
    batch_rows,
    depth_rows,
    markdown,
    sections,
    to_csv,
)
from llamacpp_bench.show.write import write_plots, write_reports
from pt2_core.errors import PT2Error
from pt2_core.formats import DEFAULT, SMALLEST

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "benchmarks" / "h200" / "published.yaml"


def shape(
    group: str, speeds: dict[str, dict[str, list[float]]], size: int = 4000, base: str = "Q2_K"
) -> Results:
    """Results of one shape: `speeds[type][test]` is a list by round."""
    results = make_results({f"{group} {kind}": [1.0] for kind in speeds})
    results.samples = [
        Sample(f"{group} {kind}", test, r, v)
        for kind, tests in speeds.items()
        for test, values in tests.items()
        for r, v in enumerate(values)
    ]
    for m in results.models:
        m.group, m.perplexity, m.parameters = group, [], size
    results.baseline = {group: f"{group} {base}"}
    results.config["synthetic"] = "random weights: speed only"
    return results


def two_shapes() -> list[Results]:
    big = {
        DEFAULT.name: {"pp128": [30.0], "tg256": [9.0]},
        "Q2_K": {"pp128": [10.0], "tg256": [2.0]},
    }
    small = {
        DEFAULT.name: {"pp128": [90.0], "tg256": [9.0]},
        "Q2_K": {"pp128": [60.0], "tg256": [3.0]},
    }
    return [shape("65b", big, 9000), shape("7b", small, 1000)]


# ------------------------------------------------------------------------------------------- merge


def test_merged_rounds_stay_paired() -> None:
    """A second run's rounds are numbered on, so that each ratio is within one run."""
    first = shape("7b", {DEFAULT.name: {"tg256": [4.0, 4.0]}, "Q2_K": {"tg256": [2.0, 2.0]}})
    second = shape("7b", {DEFAULT.name: {"tg256": [30.0]}, "Q2_K": {"tg256": [10.0]}})
    both = merge([first, second])
    assert both.by_round(f"7b {DEFAULT.name}", "tg256") == {0: 4.0, 1: 4.0, 2: 30.0}
    ratio = both.ratio(both.models[0], "tg256")
    assert ratio is not None and ratio.median == 2.0
    assert len(first.samples) == 4, "the parts stay as they are"


def test_a_file_measured_alone_compares_with_the_others_baseline() -> None:
    """Its own run had no baseline but itself, which says nothing of the ratios."""
    first = shape("7b", {DEFAULT.name: {"tg256": [4.0]}, "Q2_K": {"tg256": [2.0]}})
    alone = shape("7b", {DEFAULT.name: {"tg8@b8": [9.0]}}, base=DEFAULT.name)
    for parts in ([first, alone], [alone, first]):
        out = merge(parts)
        assert (
            out.baseline == {"7b": "7b Q2_K"}
            and len(out.values(f"7b {DEFAULT.name}", "tg8@b8")) == 1
        )


def test_a_round_that_one_model_lacks_is_no_pair() -> None:
    results = shape(
        "7b", {DEFAULT.name: {"tg256": [4.0, 9.0, 6.0]}, "Q2_K": {"tg256": [2.0, 1.0, 3.0]}}
    )
    results.samples = [s for s in results.samples if (s.model, s.round) != ("7b Q2_K", 1)]
    ratio = results.ratio(results.models[0], "tg256")
    assert ratio is not None and ratio.median == 2.0 and ratio.stdev == 0.0


def test_merge_joins_tests_and_types_of_one_shape() -> None:
    first = shape("7b", {DEFAULT.name: {"tg256": [4.0]}, "Q2_K": {"tg256": [2.0]}})
    second = shape("7b", {DEFAULT.name: {"tg8@b8": [9.0]}, "Q2_K": {"tg8@b8": [3.0]}})
    second.models[0].device_bytes, second.models[0].buffers = 950, {"CUDA0 model": 1.0}
    second.models[0].placement.ops = {DEFAULT.name: {"MUL_MAT": {"CUDA0": 7}}}
    second.warnings, second.complete = ["busy"], False
    third = two_shapes()[0]
    out = merge([first, second, third])
    assert out.tests() == ["tg256", "tg8@b8", "pp128"] and out.groups() == ["7b", "65b"]
    assert out.models[0].placement.ops and out.models[0].device_bytes == 950
    assert out.warnings == ["busy"] and not out.complete
    # the first of another shape is its round 0, whatever the others have
    assert out.by_round(f"65b {DEFAULT.name}", "tg256") == {0: 9.0}


def test_merge_refuses_what_is_not_one_comparison() -> None:
    first, other = two_shapes()[1], two_shapes()[1]
    other.machine["cpu"] = "Other"
    with pytest.raises(PT2Error, match="different machines: cpu is Test CPU and Other"):
        merge([first, other])
    other = two_shapes()[1]
    other.build["build_commit"] = "def"
    with pytest.raises(PT2Error, match="different builds: build_commit is abc and def"):
        merge([first, other])
    other = two_shapes()[1]
    other.models[0].file_bytes += 1
    with pytest.raises(PT2Error, match=f"two different files are called 7b {DEFAULT.name}"):
        merge([first, other])
    other = shape("7b", {DEFAULT.name: {"tg256": [1.0]}, "Q2_0": {}}, 1000, base=DEFAULT.name)
    with pytest.raises(PT2Error, match=f"refer to 7b Q2_K and to 7b {DEFAULT.name}"):
        merge([first, other])


# ---------------------------------------------------------------------------------- tables, figures


def test_gain_of_sequences_at_once_is_by_round() -> None:
    tests = {"tg8@b1": [2.0, 4.0], "tg8@b8": [10.0, 22.0]}
    results = shape("7b", {DEFAULT.name: tests, "Q2_K": {"tg8@b8": [5.0]}})
    assert batch_rows(results) == [
        ["model", "tg8@b1", "tg8@b8"],
        [f"7b {DEFAULT.name}", "3.00", "16.0 (5.25x)"],
        ["7b Q2_K", "-", "5.00"],
    ]
    assert sections(results)[0][0].startswith("Sequences at once (@b): tokens/s of all of them")


def test_depth_table_has_only_what_was_measured_at_a_depth() -> None:
    results = merge(
        [*two_shapes(), shape("7b", {DEFAULT.name: {"tg256@d64": [3.0]}, "Q2_K": {}}, 1000)]
    )
    rows = depth_rows(results)
    assert rows[0][:4] == ["model", "tg256", "ratio", "tg256@d64"]
    assert [row[0] for row in rows[1:]] == [f"7b {DEFAULT.name}"]


def test_bars_are_ratios_beside_what_is_published() -> None:
    results = merge(two_shapes())
    published = load_published(PUBLISHED)
    assert published.speedup["65b"]["pp128+tg256"] == 2.1
    published.speedup["65b"]["tg256"] = 1.8
    fig = speedup_figure(results, published)
    prefill, decode = fig.axes
    assert [t.get_text() for t in decode.get_xticklabels()] == ["7B", "65B"]
    heights = [p.get_height() for p in decode.patches if p.get_height()]  # type: ignore[attr-defined]
    assert heights == [3.0, 4.5, 1.8]
    assert [t.get_text() for t in fig.legends[0].get_texts()] == [DEFAULT.name, published.name]
    heights = [p.get_height() for p in prefill.patches if p.get_height()]  # type: ignore[attr-defined]
    assert heights == [1.5, 3.0]


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(PT2Error, match="nothing to draw"):
        speedup_figure(shape("7b", {"Q2_K": {"tg256": [1.0]}}))


def test_scaling_plots_leave_out_shapes_without_such_tests(tmp_path: Path) -> None:
    scaled = {DEFAULT.name: {"tg8@b1": [2.0], "tg8@b2": [3.0]}, "Q2_K": {}}
    results = merge([*two_shapes(), shape("7b", scaled, 1000)])
    names = {p.name for p in write_plots(results, tmp_path, load_published(PUBLISHED))}
    assert names == {"speed.png", "speedup.png", "batch.png"}


def test_shape_table_reads_as_the_gpu_does() -> None:
    """A type that is kept wider on the GPU reads more than its file has."""
    results = shape("7b", {SMALLEST.name: {"tg256": [1000.0]}, "Q2_K": {"tg256": [500.0]}})
    results.models[0].device_bytes = 1800
    head, first, second = shape_rows(results)
    assert head[3:] == ["tg256", "a token reads", "decode reads", "of the memory"]
    kv = 128 * 2  # the mean of a cache that grows from 0 to 256 tokens
    assert first[4:] == ["2.01 KiB", "0 GB/s", f"{1000 * (1800 + kv) / 1e6:.0%}"]
    assert second[5:] == ["0 GB/s", f"{500 * (900 + kv) / 1e6:.0%}"]


def test_ratio_table_has_the_papers_column() -> None:
    rows = ratio_rows(merge(two_shapes()), load_published(PUBLISHED))
    assert rows[0] == [
        "shape",
        f"{DEFAULT.name} prefill",
        f"{DEFAULT.name} decode",
        load_published(PUBLISHED).name,
    ]
    assert rows[1:] == [
        ["7B", "1.50x", "3.00x", "-"],
        ["65B", "3.00x", "4.50x", "2.1x end to end"],
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [", "is not valid YAML"),
        ("name: a\n", "needs name, source, what and speedup"),
        ("name: a\nsource: b\nwhat: c\nspeedup: {7b: {tg256: fast}}\n", "shape: test: number"),
        (None, "No such file"),
    ],
)
def test_bad_published_file(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "p.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PT2Error, match=words):
        load_published(path)


# -------------------------------------------------------------------------------------------- fill


def test_tables_are_put_where_the_text_wants_them() -> None:
    results = merge(two_shapes())
    places = [f"<!-- pt2-bench: {name} -->\n{{}}<!-- end -->\n" for name in ("ratios", "batch")]
    text = f"a\n{places[0].format('old')}b\n{places[1].format('')}"
    once = fill(text, results)
    assert once.startswith(f"a\n<!-- pt2-bench: ratios -->\n\n| shape | {DEFAULT.name} prefill")
    assert "| 65B | 3.00x | 4.50x |" in once and "old" not in once
    assert once.endswith("<!-- pt2-bench: batch -->\n\n(not measured)\n\n<!-- end -->\n")
    assert fill(once, results) == once


def test_unknown_or_missing_places_are_refused() -> None:
    results = merge(two_shapes())
    with pytest.raises(PT2Error, match="unknown table 'sped': known are speed, ratios"):
        fill("<!-- pt2-bench: sped -->\n<!-- end -->", results)
    with pytest.raises(PT2Error, match="no place for a table"):
        fill("nothing", results)


def test_report_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = []
    for i, part in enumerate(two_shapes()):
        part.save(tmp_path / f"{i}.json")
        paths.append(str(tmp_path / f"{i}.json"))
    page = tmp_path / "page.md"
    page.write_text("<!-- pt2-bench: speed -->\n<!-- end -->\n")
    out = tmp_path / "out"
    options = ["--out", str(out), "--published", str(PUBLISHED), "--fill", str(page)]
    assert cli.main(["report", *paths, *options]) == 0
    names = {p.name for p in out.iterdir()}
    assert names == {"results.json", "results.csv", "results.md", "speed.png", "speedup.png"}
    assert load_results(out / "results.json").config["merged"] == 2
    assert (
        f"| 65B | {DEFAULT.name} |" in page.read_text()
        and f"65b {DEFAULT.name}" in capsys.readouterr().out
    )
    assert cli.main(["report", *paths, "--out", str(out), "--fill", str(tmp_path / "no.md")]) == 2
    assert "--fill needs a Markdown file that exists" in capsys.readouterr().err


def test_the_pages_of_the_h200_have_their_places() -> None:
    """The committed page can be filled by the command that it names."""
    page = (ROOT / "benchmarks" / "h200" / "README.md").read_text("utf-8")
    filled = fill(page, merge(two_shapes()), load_published(PUBLISHED))
    assert f"| 65B | {DEFAULT.name} |" in filled


# ------------------------------------------------------------------------------- plots, labels, CSV


def grouped_results() -> Results:
    """Two synthetic shapes with a ternary type and Q2_K each."""
    results = make_results(
        {f"{g} {k}": [1.0, 2.0] for g in ("7b", "13b") for k in ("Q2_K", DEFAULT.name)}
    )
    for m in results.models:
        m.group, m.perplexity, m.origin = m.name.split()[0], [], "random weights: speed only"
    results.baseline = {g: f"{g} Q2_K" for g in ("7b", "13b")}
    results.config["synthetic"] = "random weights: speed only"
    return results


def test_plots_of_many_shapes(tmp_path: Path) -> None:
    written = write_plots(grouped_results(), tmp_path)
    assert [p.name for p in written] == ["speed.png", "speedup.png"]


def test_synthetic_results_are_labelled_everywhere(tmp_path: Path) -> None:
    results = grouped_results()
    write_reports(results, tmp_path)
    text = markdown(results, [])
    assert text.count("random weights: speed only") >= 3
    assert "random weights" in (tmp_path / "results.csv").read_text()


def test_every_model_has_its_own_mark_in_the_scatter() -> None:
    results = make_results({f"model number {i}": [1.0] for i in range(9)})
    fig = quality_figure(results)
    fig.canvas.draw()
    legend = fig.legends[0]
    names = [t.get_text() for t in legend.get_texts()]
    assert names == [m.name for m in results.models]
    axes = fig.axes[0]
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    lines = [c.lines[0] for c in axes.containers]  # type: ignore[attr-defined]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 9


def test_csv_has_the_numbers_unrounded() -> None:
    results = make_results({"a": [1 / 3, 2 / 3]})
    line = to_csv(results).splitlines()[1].split(",")
    assert repr(0.5) in line and str(1 / 3) in line and os.linesep not in line
