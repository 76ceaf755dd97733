"""pt2-bench's statistics: rounds, ratios, errors, windows, and what is noise between two runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from bench_support import METADATA, make_results, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from llamacpp_bench import cli
from llamacpp_bench.results import paired_ratio, summarise, token_bytes
from llamacpp_bench.run.llama_bench import interleave
from llamacpp_bench.run.perplexity import plan, standard_error
from llamacpp_bench.show.compare import compare, remarks, verdict
from pt2_core.errors import PT2Error
from pt2_core.gguf_info import read_gguf


def test_interleaving_gives_each_model_every_place() -> None:
    order = interleave(3, 6)
    for r in range(6):
        assert sorted(i for k, i in order if k == r) == [0, 1, 2]
    for place in range(3):
        assert sorted(i for n, (_, i) in enumerate(order) if n % 3 == place) == [0, 0, 1, 1, 2, 2]


def test_summary_figures() -> None:
    s = summarise([10.0, 12.0, 14.0, 40.0])
    assert (s.n, s.mean, s.median, s.low, s.high) == (4, 19.0, 13.0, 10.0, 40.0)
    assert s.stdev == pytest.approx(math.sqrt((81 + 49 + 25 + 441) / 3))
    assert summarise([5.0]).stdev == 0.0


@given(
    st.lists(st.floats(1, 1e4), min_size=1, max_size=9),
    st.floats(0.1, 10),
    st.lists(st.floats(0.01, 100), min_size=9, max_size=9),
)
@settings(deadline=None)
def test_paired_ratio_does_not_see_drift(
    base: list[float], factor: float, drift: list[float]
) -> None:
    """What slows a whole round by any factor leaves the ratio as it is."""
    slowed = [b * d for b, d in zip(base, drift, strict=False)]
    ratio = paired_ratio([factor * b for b in slowed], slowed)
    assert ratio is not None
    assert ratio.median == pytest.approx(factor) and ratio.stdev == pytest.approx(0, abs=1e-9)


def test_a_ratio_needs_rounds() -> None:
    assert paired_ratio([], [1.0]) is None
    ratio = paired_ratio([1.0, 3.0, 5.0], [2.0, 2.0])
    assert ratio is not None and ratio.median == 1.0


def test_bytes_of_a_token_by_test() -> None:
    m = make_results({"a": [1.0]}).models[0]
    assert token_bytes(m, "tg256") == 900 + 128 * 2
    assert token_bytes(m, "tg256@d4096") == 900 + (128 + 4096) * 2
    assert token_bytes(m, "pp128") == token_bytes(m, "pp1+tg1") == token_bytes(m, "tg8@b4") == 0


def test_error_of_running_perplexities() -> None:
    """Windows with log-likelihoods 1, 3, 2 have running means 1, 2, 2."""
    running = [math.exp(1), math.exp(2), math.exp(2)]
    assert standard_error(running) == pytest.approx(1 / math.sqrt(3))


def test_perplexity_windows_fit_the_context(tmp_path: Path) -> None:
    info = read_gguf(write_gguf(tmp_path / "m.gguf"))  # trained for 1024
    p = plan("papers", info, None)
    assert p is not None and (p.window, p.scored) == (1024, 1023)
    assert p.note == "window 1024: the model's context is 1024"
    ctx, stride = int(p.arguments[1]), int(p.arguments[5])
    assert ctx + stride // 2 == 1024 and stride == 1023  # what llama-perplexity makes of it
    q = plan("llama.cpp", info, 6)
    assert q is not None and q.arguments == ("-c", "512", "--chunks", "6") and q.scored == 255
    short = read_gguf(
        write_gguf(tmp_path / "s.gguf", None, {**METADATA, "llama.context_length": 99})
    )
    assert plan("papers", short, None) is None


# ------------------------------------------------------------------------------------------ compare


def test_compare_tells_noise_from_change() -> None:
    a = make_results({"m": [100.0, 101.0, 99.0, 100.0], "n": [50.0, 60.0, 40.0]})
    b = make_results({"m": [120.0, 121.0, 119.0, 120.0], "n": [52.0, 61.0, 43.0]})
    b.models[1].file_bytes += 8
    rows = {(d.model, d.what): d for d in compare(a, b)}
    assert rows["m", "tg256 (tokens/s)"].change == pytest.approx(0.2)
    assert verdict(rows["m", "tg256 (tokens/s)"]) == "significant"
    assert verdict(rows["n", "tg256 (tokens/s)"]) == "within noise"
    assert verdict(rows["m", "PPL llama.cpp"]) == "same"
    assert verdict(rows["n", "size (bytes)"]) == "significant"
    one = make_results({"m": [120.0]})
    assert verdict(compare(a, one)[0]) == "one round: unknown"


def test_compare_needs_something_in_common_and_the_same_text() -> None:
    a, b = make_results({"m": [1.0]}), make_results({"k": [1.0]})
    with pytest.raises(PT2Error, match="no model in common: m against k"):
        compare(a, b)
    c = make_results({"m": [1.0]}, text_sha256="2", threads=4)
    assert not [d for d in compare(a, c) if d.what.startswith("PPL")]
    assert "threads differs: 2 against 4" in remarks(a, c)


def test_compare_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_results({"m": [100.0, 101.0]}).save(tmp_path / "a.json")
    make_results({"m": [150.0, 151.0]}).save(tmp_path / "b.json")
    assert cli.main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    out = capsys.readouterr().out
    assert "significant" in out and "+49.8%" in out
