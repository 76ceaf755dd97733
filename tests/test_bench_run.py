"""pt2-bench end to end with programs that play llama.cpp's tools; its statistics and outputs."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench_support import METADATA, TENSORS, fake_tools, make_results, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from llamacpp_bench import Config, bench, cli, load_results, speed
from llamacpp_bench.baselines import Wanted, parse_baselines
from llamacpp_bench.compare import compare, remarks, verdict
from llamacpp_bench.gguf_info import read_gguf
from llamacpp_bench.perplexity import plan, standard_error
from llamacpp_bench.plots import quality_figure, write_plots
from llamacpp_bench.report import caption, markdown, to_csv, write_reports
from llamacpp_bench.results import Results, paired_ratio, summarise, to_json, token_bytes
from llamacpp_bench.runner import interleave, parse_placement
from quantize.common import PT2Error

Setup = Callable[..., Config]


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """A configuration that runs the fake tools on slow.gguf (the source) and fast.gguf."""
    monkeypatch.setenv("PT2_CACHE", str(tmp_path / "cache"))
    bin_dir = fake_tools(tmp_path / "bin")
    (tmp_path / "text.txt").write_text("some words " * 100)
    (tmp_path / "calibration.txt").write_text("other words " * 100)
    write_gguf(tmp_path / "fast.gguf")
    floats = [(n, s, "F16" if len(s) > 1 else "F32") for n, s, _ in TENSORS]
    write_gguf(tmp_path / "source.gguf", floats)

    def make(**options: object) -> Config:
        settings = {
            "bin_dir": str(bin_dir),
            "source": str(tmp_path / "source.gguf"),
            "text": str(tmp_path / "text.txt"),
            "out": str(tmp_path / "out"),
            "bandwidth": 1e9,
            "rounds": 3,
            "threads": 1,
            "quiet": True,
        }
        return Config(**{**settings, **options})  # type: ignore[arg-type]

    return make


def calls(tmp_path: Path, name: str) -> list[list[str]]:
    lines = (tmp_path / "bin" / "CALLS").read_text().splitlines()
    return [c[1:] for c in map(json.loads, lines) if c[0] == name]


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
    assert [p.protocol for p in fast.perplexity] == ["llama.cpp", "gptq"]


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


def test_placement_is_stated(tmp_path: Path, setup: Setup) -> None:
    m = bench([tmp_path / "fast.gguf"], setup(baselines=(), perplexity=False)).models[0]
    assert m.placement.ops == {"Q8_0": {"MUL_MAT": {"CPU": 2}, "GET_ROWS": {"CPU": 1}}}
    assert m.placement.repacked == {"Q8_0": {"q8_0_4x8": 1}}
    assert m.buffers == {"CPU_Mapped model": 3.24}
    assert m.placement.elsewhere == []  # the CPU is where it should be


def test_an_operation_on_the_cpu_in_a_gpu_run_is_said_by_name(tmp_path: Path) -> None:
    info = read_gguf(write_gguf(tmp_path / "m.gguf"))
    line = (
        "node #  {i} (   MUL_MAT):  out-{i} (  1K) [{b} ] use=1,c=1: blk.{i}.ffn_up.weight "
        "( 21K) [{b} ]  x (  1K) [  CPU   ]\n"
    )
    log = line.format(i=0, b="CUDA0       ") + line.format(i=1, b="  CPU       ")
    log += (
        "node #3 (  GET_ROWS): embd (1K) [ CPU   ] use=1,c=1: token_embd.weight ( 1K) [ CPU   ]\n"
    )
    found = parse_placement(log, info)
    assert found.ops["Q8_0"]["MUL_MAT"] == {"CUDA0": 1, "CPU": 1}
    assert found.elsewhere == ["MUL_MAT out-1 of blk.1.ffn_up.weight (Q8_0)"]
    assert found.expected == ["GET_ROWS of token_embd.weight (Q8_0)"]


def test_a_graph_that_was_only_asked_about_is_not_counted(tmp_path: Path) -> None:
    """llama.cpp plans a graph with fused attention to see where it would run, and drops it."""
    info = read_gguf(write_gguf(tmp_path / "m.gguf"))
    reserve = "graph_reserve: reserving a graph for ubatch with n_tokens =    1\n"
    product = (
        "node #  0 (   MUL_MAT):  out-0 (  1K) [CUDA0 ] use=1,c=1: blk.0.ffn_up.weight "
        "( 21K) [CUDA0 ]  x (  1K) [CUDA0   ]\n"
    )
    fused = (
        "node # 21 (FLASH_ATTN):  node_21 (  16K) [  CPU   ] use=1,c=1: Qcur-0 (  16K) [ NULL ]\n"
    )
    dropped = "resolve_fused_ops: Flash Attention not supported, set to disabled\n"
    found = parse_placement(reserve + product + fused + dropped + reserve + product, info)
    assert found.ops["Q8_0"]["MUL_MAT"] == {"CUDA0": 1} and found.elsewhere == []
    kept = parse_placement(reserve + product + fused + reserve + product, info)
    assert kept.elsewhere == ["FLASH_ATTN node_21"]


def test_strict_refuses_it(tmp_path: Path, setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "llamacpp_bench.runner.parse_placement",
        lambda log, info: _placement_with_cpu(),
    )
    config = setup(baselines=(), perplexity=False)
    assert "ran on the CPU: MUL_MAT x" in bench([tmp_path / "fast.gguf"], config).warnings[-2]
    with pytest.raises(PT2Error, match=r"1 operations ran on the CPU: MUL_MAT x \(--strict\)"):
        bench([tmp_path / "fast.gguf"], setup(baselines=(), perplexity=False, strict=True))


def _placement_with_cpu() -> object:
    from llamacpp_bench.results import Placement

    return Placement(ops={"Q8_0": {"MUL_MAT": {"CUDA0": 1}}}, elsewhere=["MUL_MAT x"])


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
    monkeypatch.setattr("llamacpp_bench.baselines._convert", lambda s, f: found.append(s))
    with pytest.raises(PT2Error):
        bench([model], setup(source=None))
    assert found == [tmp_path / "hf-artifact"]


def test_a_source_of_another_shape_is_refused(tmp_path: Path, setup: Setup) -> None:
    floats = [(n, s, "F16") for n, s, _ in TENSORS]
    write_gguf(tmp_path / "source.gguf", floats, {**METADATA, "llama.block_count": 3})
    with pytest.raises(PT2Error, match="block_count is 3, the model has 2"):
        bench([tmp_path / "fast.gguf"], setup())


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


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("crash", r"llama-bench was killed by SIGSEGV; .* \(log: .*\.log\)"),
        ("fail", r"llama-bench failed \(exit 1\): error: the model is purple \(log: "),
        ("garbage", r"log does not say where the tensors ran"),
        ("short", r"text.txt has only 17 tokens; llama.cpp windows of 512 need 1024"),
        ("lost", r"llama-perplexity lost its last lines 4 times"),
    ],
)
def test_a_failing_tool_gives_one_line_and_a_log(
    tmp_path: Path, setup: Setup, monkeypatch: pytest.MonkeyPatch, mode: str, words: str
) -> None:
    monkeypatch.setenv("FAKE_MODE", mode)
    with pytest.raises(PT2Error, match=words) as e:
        bench([tmp_path / "fast.gguf"], setup(baselines=()))
    assert "\n" not in str(e.value)
    assert list((tmp_path / "out" / "logs").iterdir())


def test_what_was_measured_before_a_failure_is_kept(tmp_path: Path, setup: Setup) -> None:
    (tmp_path / "bin" / "llama-perplexity").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(PT2Error, match=r"llama-perplexity failed \(exit 3\): it said nothing"):
        bench([tmp_path / "fast.gguf"], setup())
    kept = load_results(tmp_path / "out" / "results.json")
    assert not kept.complete and len(kept.samples) == 2 * 3 * 3


def test_a_missing_tool_is_said_before_anything_is_measured(tmp_path: Path, setup: Setup) -> None:
    (tmp_path / "bin" / "llama-perplexity").unlink()
    with pytest.raises(PT2Error, match="there is no llama-perplexity in"):
        bench([tmp_path / "fast.gguf"], setup())
    assert not (tmp_path / "bin" / "CALLS").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "give at least one .gguf file"),
        (["none.gguf", "--no-perplexity"], "none.gguf: no such file"),
        (["text.txt", "--no-perplexity"], "text.txt is not a GGUF file"),
        (["fast.gguf"], "no text for the perplexity: give --text FILE, or --no-perplexity"),
        (["fast.gguf", "--text", "gone.txt"], "gone.txt: no such text file"),
        (["fast.gguf", "--text", "empty.txt"], "empty.txt is empty"),
        (["fast.gguf", "--no-perplexity", "--baseline", "q9_z"], "unknown baseline 'q9_z'"),
        (["fast.gguf", "--no-perplexity"], "no full-precision source for the baselines of fast"),
        (["fast.gguf", "--no-perplexity", "--source", "fast.gguf"], "is Q8_0, not F16"),
        (["fast.gguf", "--no-perplexity", "--source", "nowhere"], "nowhere: no such GGUF file or"),
        (["fast.gguf", "--no-perplexity", "--pg", "1"], "--pg 1: give a prompt and a generated"),
        (["fast.gguf", "--no-perplexity", "--depth", "x"], "--depth x: give whole numbers"),
        (["fast.gguf", "--synthetic", "1b"], "either model files or --synthetic"),
        (["--synthetic", "3b"], "unknown shape '3b'"),
        (["--synthetic", "1b", "--types", "zz"], "unknown type 'zz'"),
        (["--synthetic", "tiny", "--variant", "stock"], "no stock build of llama.cpp"),
        (["fast.gguf", "--no-perplexity", "--bin", "empty"], "there is no llama-bench in"),
        (["compare", "text.txt", "text.txt"], "text.txt is not valid JSON"),
        (["compare", "list.json", "list.json"], "is not a results file of pt2-bench"),
        (["compare", "future.json", "future.json"], "has schema version 99"),
        (["compare", "damaged.json", "damaged.json"], "damaged.json is damaged"),
    ],
)
def test_bad_input_gives_one_line(
    tmp_path: Path,
    setup: Setup,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    words: str,
) -> None:
    setup()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "future.json").write_text('{"schema": "pt2-bench", "schema_version": 99}')
    (tmp_path / "damaged.json").write_text('{"schema": "pt2-bench", "schema_version": 1}')
    monkeypatch.chdir(tmp_path)
    needs_tools = argv[:1] != ["compare"] and "--bin" not in argv and "--variant" not in argv
    code = cli.main([*argv, "--bin", str(tmp_path / "bin")] if needs_tools else argv)
    err = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("warning:")]
    errors = [x for x in err if "error:" in x]
    assert code == 2 and len(errors) == 1 and words in errors[0], err


def test_truncated_file_at_the_command_line(tmp_path: Path, setup: Setup) -> None:
    setup()
    path = tmp_path / "fast.gguf"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PT2Error, match=r"truncated: tensor 'output\.weight' ends at byte"):
        bench([path], setup())


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


# ------------------------------------------------------------------- when time is short, on a GPU


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


def test_a_hanging_program_is_stopped(
    tmp_path: Path, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MODE", "hang")
    monkeypatch.setenv("FAKE_ONLY", "fast")
    config = setup(perplexity=False, tool_timeout=3, rounds=2)
    with pytest.raises(PT2Error, match="llama-bench was stopped after 3 s"):
        bench([tmp_path / "fast.gguf"], config)


def test_keep_going_leaves_out_the_model_that_fails(
    tmp_path: Path, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MODE", "fail")
    monkeypatch.setenv("FAKE_ONLY", "fast")
    config = setup(perplexity=False, keep_going=True, rounds=2)
    results = bench([tmp_path / "fast.gguf"], config)
    assert len(results.failures) == 1 and "fast: llama-bench failed" in results.failures[0]
    assert not results.complete and not results.values("fast", "tg256")
    assert len(results.values("Q2_K", "tg256")) == 2
    again = load_results(tmp_path / "out" / "results.json")
    assert again.failures == results.failures
    monkeypatch.chdir(tmp_path)
    argv = "fast.gguf --baseline source.gguf --no-perplexity -r 1 --bin bin --bandwidth 1 --quiet"
    assert cli.main([*argv.split(), "--keep-going", "--no-report", "--out", "o"]) == 1
    assert {p.name for p in (tmp_path / "o").iterdir()} == {"results.json", "logs"}


def test_placement_of_ternary_files_only(tmp_path: Path, setup: Setup) -> None:
    ternary = [(n, s, "TQ2_1" if "ffn" in n else k) for n, s, k in TENSORS]
    layout = {**METADATA, "pt2.tq2_1.layout": 1}
    write_gguf(tmp_path / "ternary.gguf", ternary, layout)
    config = setup(baselines=(Wanted(file=tmp_path / "fast.gguf"),), perplexity=False, rounds=1)
    config = replace(config, placement="ternary")
    results = bench([tmp_path / "ternary.gguf"], config)
    asked = [c for c in calls(tmp_path, "llama-bench") if "-v" in c]
    assert [Path(c[c.index("-m") + 1]).name for c in asked] == ["ternary.gguf"]
    assert [bool(m.placement.ops) for m in results.models] == [True, False]


def test_weights_on_the_gpu_count_as_they_lie_there(tmp_path: Path) -> None:
    """llama.cpp reports 1.5 times the file's bytes on two GPUs: so much more a token reads."""
    info = read_gguf(write_gguf(tmp_path / "m.gguf"))
    here = sum(t.nbytes for t in info.tensors) - info.tensors[0].nbytes  # the embeddings stay
    mib = 1.5 * here / (1 << 20)
    buffers = {"CUDA0 model": mib / 3, "CUDA1 model": 2 * mib / 3, "CPU_Mapped model": 99.0}
    assert speed.device_bytes(info, {**buffers, "CUDA0 KV": 5.0}) == round(
        1.5 * info.decode_bytes()
    )
    # a part of the layers only, or nothing at all
    assert speed.device_bytes(info, {"CUDA0 model": mib / 3}) == info.decode_bytes()
    assert speed.device_bytes(info, {"CPU_Mapped model": mib, "CUDA_Host model": 1.0}) == 0


def program(path: Path, text: str) -> str:
    path.write_text(f"#!{sys.executable}\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_program_can_measure_the_bandwidth(tmp_path: Path, setup: Setup) -> None:
    good = program(
        tmp_path / "good",
        'print(\'starting\'); print(\'{"bytes_per_second": 2e9, "method": "read"}\')',
    )
    config = setup(perplexity=False, rounds=1, bandwidth=None, bandwidth_program=good)
    results = bench([tmp_path / "fast.gguf"], config)
    assert results.bandwidth == {"bytes_per_second": 2e9, "method": "read", "note": ""}
    for text, words in (
        ("print('fast')", "ended with 'fast', not with a JSON object"),
        ('print(\'{"bytes_per_second": 0, "method": ""}\')', "gave 0.0 bytes per second"),
        ("raise SystemExit('error: no GPU')", "failed .* no GPU"),
    ):
        bad = program(tmp_path / "bad", text)
        with pytest.raises(PT2Error, match=words):
            bench([tmp_path / "fast.gguf"], replace(config, bandwidth_program=bad))
    with pytest.raises(PT2Error, match="there is no such program"):
        bench([tmp_path / "fast.gguf"], replace(config, bandwidth_program="gone"))


# --------------------------------------------------------------------------------------- statistics


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
    p = plan("gptq", info, None)
    assert p is not None and (p.window, p.scored) == (1024, 1023)
    assert p.note == "window 1024: the model's context is 1024"
    ctx, stride = int(p.arguments[1]), int(p.arguments[5])
    assert ctx + stride // 2 == 1024 and stride == 1023  # what llama-perplexity makes of it
    q = plan("llama.cpp", info, 6)
    assert q is not None and q.arguments == ("-c", "512", "--chunks", "6") and q.scored == 255
    short = read_gguf(
        write_gguf(tmp_path / "s.gguf", None, {**METADATA, "llama.context_length": 99})
    )
    assert plan("gptq", short, None) is None


def test_baseline_words() -> None:
    assert [w.label for w in parse_baselines("q2_k, IQ1_M,dir/other.gguf")] == [
        "Q2_K",
        "IQ1_M",
        "other",
    ]
    assert parse_baselines("none") == []


# -------------------------------------------------------------------------------- compare and plots


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


def grouped_results() -> Results:
    results = make_results(
        {f"{g} {k}": [1.0, 2.0] for g in ("7b", "13b") for k in ("Q2_K", "TQ2_1")}
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
