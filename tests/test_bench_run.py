"""pt2-bench end to end with programs that play llama.cpp's tools; its baselines and outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_support import METADATA, TENSORS, Setup, calls, write_gguf

from llamacpp_bench import bench, cli, load_results, speed
from llamacpp_bench.baselines import Wanted, parse_baselines
from llamacpp_bench.report import caption
from llamacpp_bench.results import to_json
from pt2_core.errors import PT2Error


def test_runs_are_interleaved_and_summed_up(tmp_path: Path, setup: Setup) -> None:
    results = bench([tmp_path / "fast.gguf"], setup())
    assert [m.name for m in results.models] == ["fast", "Q2_K"]
    timed = [c for c in calls(tmp_path, "llama-bench") if "-v" not in c]
    order = ["fast" in Path(c[c.index("-m") + 1]).name for c in timed]
    assert order == [True, False, False, True, True, False]
    assert all(c[c.index("-r") + 1] == "1" for c in timed)
    assert results.tests() == ["pp128", "tg256", "pp128+tg256"]
    fast = results.models[0]
    ratio = results.ratio(fast, "tg256")
    assert ratio is not None and ratio.median == pytest.approx(2.0, abs=0.05)
    assert results.summary("fast", "tg256").n == 3
    share = results.bandwidth_share(fast, "tg256")
    assert share == pytest.approx(
        results.summary("fast", "tg256").mean * (fast.decode_bytes + 128 * fast.kv_bytes) / 1e9
    )
    assert [p.protocol for p in fast.perplexity] == ["llama.cpp", "papers"]


def test_every_output_is_written_and_reads_back(tmp_path: Path, setup: Setup) -> None:
    results = bench([tmp_path / "fast.gguf"], setup())
    out = tmp_path / "out"
    names = {"results.json", "results.csv", "results.md", "speed.png", "size-perplexity.png"}
    assert names <= {p.name for p in out.iterdir()}
    for name in ("speed.png", "size-perplexity.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    again = load_results(out / "results.json")
    assert to_json(again) == to_json(results)
    assert str(tmp_path) not in (out / "results.json").read_text(), "no folder of this machine"
    text = (out / "results.md").read_text()
    assert "llama-bench -m fast.gguf -p 128 -n 256 -pg 128,256 -t 1 -r 1 -o json" in text
    rows = (out / "results.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 3 and rows[1].startswith("fast,,given,fast.gguf,Q8_0,")


def test_the_command_line_reaches_the_tool(
    tmp_path: Path, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup()
    monkeypatch.chdir(tmp_path)
    argv = (
        "fast.gguf --baseline fast.gguf --no-perplexity -p 64 -n 8 --pg none -r 1 -t 2 --no-repack"
    )
    options = ["--out", "o", "--bin", "bin", "--quiet", "--bandwidth", "1", "--gpu-layers", "99"]
    assert cli.main([*argv.split(), *options]) == 0
    timed = [c for c in calls(tmp_path, "llama-bench") if "-v" not in c]
    expected = "-p 64 -n 8 -t 2 -ngl 99 --repack 0 -r 1 -o json"
    assert " ".join(timed[0][2:]) == expected
    assert [m.name for m in load_results("o/results.json").models] == ["fast", "fast (2)"]


def test_batches_are_timed_and_lost_lines_asked_for_again(
    tmp_path: Path, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = setup(baselines=(), perplexity=False, batches=(1, 8), rounds=1)
    results = bench([tmp_path / "fast.gguf"], config)
    assert results.values("fast", "tg256@b8") == [40.0]
    assert (tmp_path / "out" / "batch.png").exists()
    monkeypatch.setenv("FAKE_MODE", "lost")
    before = len(calls(tmp_path, "llama-batched-bench"))
    bench([tmp_path / "fast.gguf"], config)
    bench([tmp_path / "fast.gguf"], config)
    assert len(calls(tmp_path, "llama-batched-bench")) > before + 2, "one was asked for again"


def test_only_batches_need_no_llama_bench(tmp_path: Path, setup: Setup) -> None:
    config = setup(
        baselines=(), perplexity=False, prompt=0, gen=0, pg=(), batches=(1, 8), batch_prompt=4,
        batch_gen=16, rounds=1, placement="none",
    )  # fmt: skip
    results = bench([tmp_path / "fast.gguf"], config)
    assert results.tests() == ["tg16@b1", "tg16@b8"]
    asked = calls(tmp_path, "llama-batched-bench")[0]
    assert asked[asked.index("-npp") + 1] == "4" and asked[asked.index("-c") + 1] == "160"
    assert not calls(tmp_path, "llama-bench")
    with pytest.raises(PT2Error, match="nothing is left to time"):
        bench([tmp_path / "fast.gguf"], setup(prompt=0, gen=0, pg=(), perplexity=False))
    with pytest.raises(PT2Error, match="--batch-gen of at least 1"):
        bench([tmp_path / "fast.gguf"], setup(batches=(2,), batch_gen=0, perplexity=False))
    with pytest.raises(PT2Error, match="--strict looks at every file: not with --placement none"):
        bench([tmp_path / "fast.gguf"], setup(strict=True, placement="none", perplexity=False))


def test_a_time_limit_leaves_out_whole_rounds(
    tmp_path: Path, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that a run of one model moves by 10 s: 2 models, 25 s, so one round of 20 s."""
    now = [0.0]
    monkeypatch.setattr(speed.time, "monotonic", lambda: now[0])
    measure = speed.measure_once

    def slow(*args: Any) -> None:
        now[0] += 10
        measure(*args)

    monkeypatch.setattr(speed, "measure_once", slow)
    for limit, rounds in ((25, 1), (40, 2), (45, 2), (1, 1), (None, 3)):
        now[0] = 0.0
        results = bench([tmp_path / "fast.gguf"], setup(perplexity=False, time_limit=limit))
        assert [len(results.values(m.name, "tg256")) for m in results.models] == [rounds] * 2
        said = any(f"{rounds} of 3 rounds fit the limit" in w for w in results.warnings)
        assert said == (limit is not None)


def test_a_round_is_the_mean_of_its_passes(tmp_path: Path, setup: Setup) -> None:
    """The fake llama-bench is 3 tokens/s faster in each pass."""
    one = bench([tmp_path / "fast.gguf"], setup(perplexity=False, baselines=(), rounds=1))
    more = setup(perplexity=False, baselines=(), rounds=1, repeats=3, out=str(tmp_path / "three"))
    three = bench([tmp_path / "fast.gguf"], more)
    name = one.models[0].name
    assert three.values(name, "pp128")[0] == pytest.approx(
        one.values(name, "pp128")[0] + 3, abs=0.5
    )
    assert "1 interleaved rounds of 3 passes" in " ".join(caption(three))
    assert "passes" not in " ".join(caption(one))


# ---------------------------------------------------------------------------------------- baselines


def test_baseline_words() -> None:
    assert [w.label for w in parse_baselines("q2_k, IQ1_M,dir/other.gguf")] == [
        "Q2_K",
        "IQ1_M",
        "other",
    ]
    assert parse_baselines("none") == []


def test_baselines_are_made_once_and_need_a_matrix(tmp_path: Path, setup: Setup) -> None:
    wanted = (Wanted(type="IQ1_M"), Wanted(type="Q2_K"))
    with pytest.raises(PT2Error, match="IQ1_M needs an importance matrix: give --imatrix-text"):
        bench([tmp_path / "fast.gguf"], setup(baselines=wanted))
    config = setup(baselines=wanted, imatrix_text=str(tmp_path / "calibration.txt"))
    for _ in range(2):
        results = bench([tmp_path / "fast.gguf"], config)
    assert [m.name for m in results.models] == ["fast", "IQ1_M", "Q2_K"]
    assert results.baseline == {"": "IQ1_M"}
    made = [c[-2] for c in calls(tmp_path, "llama-quantize")]
    assert made == ["IQ1_M", "Q2_K"] and len(calls(tmp_path, "llama-imatrix")) == 1
    assert all("--imatrix" in c for c in calls(tmp_path, "llama-quantize"))
    same = setup(baselines=wanted, imatrix_text=str(tmp_path / "text.txt"))
    with pytest.raises(PT2Error, match="--imatrix-text is the text that is scored"):
        bench([tmp_path / "fast.gguf"], same)


def test_the_tools_get_the_text_that_is_scored_elsewhere(tmp_path: Path, setup: Setup) -> None:
    """Line ends, byte order marks and JSON records are read here; plain files go as they are."""
    words = [f"word{i}" for i in range(300)]
    (tmp_path / "crlf.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(words).encode())
    lines = "\n".join(json.dumps({"text": w}) for w in words)
    (tmp_path / "calibration.jsonl").write_text(lines)
    short = write_gguf(
        tmp_path / "source.gguf",
        [(n, s, "F16" if len(s) > 1 else "F32") for n, s, _ in TENSORS],
        {**METADATA, "llama.context_length": 300},
    )
    config = setup(
        text=str(tmp_path / "crlf.txt"), imatrix_text=str(tmp_path / "calibration.jsonl")
    )
    results = bench([tmp_path / "fast.gguf"], config)
    assert (tmp_path / "bin/TEXT-llama-perplexity").read_text() == "\n".join(words) + "\n"
    assert (tmp_path / "bin/TEXT-llama-imatrix").read_text() == "\n\n".join(words) + "\n"
    matrix = calls(tmp_path, "llama-imatrix")[0]
    assert matrix[matrix.index("-c") + 1] == "256", f"{short.name} has a context of 300"
    for name in ("llama-perplexity", "llama-imatrix"):
        call = calls(tmp_path, name)[0]
        assert not Path(call[call.index("-f") + 1]).exists(), "the temporary file is gone"
    assert results.config["text"] == "crlf.txt"
    bench([tmp_path / "fast.gguf"], setup())
    call = calls(tmp_path, "llama-perplexity")[-1]
    assert call[call.index("-f") + 1] == str(tmp_path / "text.txt")


def test_the_source_is_found_by_the_fingerprint(
    tmp_path: Path, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifact names the folder; here that folder is then refused for want of weights."""
    model = write_gguf(tmp_path / "m.gguf", None, {**METADATA, "pt2.model_fingerprint": "f00"})
    for name, fingerprint in (("other", "bad"), ("artifact", "f00")):
        folder = tmp_path / name
        folder.mkdir()
        hf = tmp_path / f"hf-{name}"
        hf.mkdir()
        (hf / "config.json").write_text("{}")
        manifest = {"model": {"fingerprint": fingerprint}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / "run.json").write_text(json.dumps({"model_dir": str(hf)}))
    found: list[Path] = []
    monkeypatch.setattr(
        "llamacpp_bench.baselines._convert", lambda s, f, say, **given: found.append(s)
    )
    with pytest.raises(PT2Error):
        bench([model], setup(source=None))
    assert found == [tmp_path / "hf-artifact"]


def test_a_source_of_another_shape_is_refused(tmp_path: Path, setup: Setup) -> None:
    floats = [(n, s, "F16") for n, s, _ in TENSORS]
    write_gguf(tmp_path / "source.gguf", floats, {**METADATA, "llama.block_count": 3})
    with pytest.raises(PT2Error, match="block_count is 3, the model has 2"):
        bench([tmp_path / "fast.gguf"], setup())
