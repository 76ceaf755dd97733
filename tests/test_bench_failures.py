"""pt2-bench on bad input, and with programs that fail, hang or lose lines: one line says why."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_support import Setup

from llamacpp_bench import bench, cli, load_results
from pt2_core.errors import PT2Error


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


# ----------------------------------------------------------------------------------------- programs


def test_a_missing_tool_is_said_before_anything_is_measured(tmp_path: Path, setup: Setup) -> None:
    (tmp_path / "bin" / "llama-perplexity").unlink()
    with pytest.raises(PT2Error, match="there is no llama-perplexity in"):
        bench([tmp_path / "fast.gguf"], setup())
    assert not (tmp_path / "bin" / "CALLS").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("crash", r"llama-bench was killed by SIGSEGV; .* \(log: .*\.log\)"),
        ("fail", r"llama-bench failed \(exit 1\): error: the model is purple \(log: "),
        ("garbage", r"log does not say where the tensors ran"),
        ("short", r"text.txt has only 17 tokens; llama.cpp windows of 512 need 1024"),
        ("lost", r"llama-perplexity lost its last lines 5 times"),
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
