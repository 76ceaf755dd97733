"""Names that llama.cpp's tools take for something else: commas, braces, dashes, other scripts."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_support import Setup, calls, write_gguf
from quantize_support import tiny_model

from export import converter
from llamacpp_bench import bench, cli
from llamacpp_bench.baselines import Wanted, cache_name, check_name, find_source, source_gguf
from pt2_core.errors import PT2Error


def test_a_comma_is_refused_before_anything_runs(tmp_path: Path, setup: Setup) -> None:
    model = write_gguf(tmp_path / "a,b.gguf")
    with pytest.raises(PT2Error, match=r"a,b\.gguf: llama-bench takes a comma for the end"):
        bench([model], setup())
    with pytest.raises(PT2Error, match=r"a,b\.gguf: llama-bench takes a comma"):
        bench([tmp_path / "fast.gguf"], setup(baselines=(Wanted(file=model),)))
    assert not (tmp_path / "bin" / "CALLS").exists()


def test_a_model_s_folder_may_have_any_name(
    tmp_path: Path, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup()
    seen = []

    def convert(source_dir, checkpoint, out, options, log):
        seen.append((checkpoint.path, out))
        out.write_bytes((tmp_path / "source.gguf").read_bytes())
        return []

    monkeypatch.setattr(converter, "convert_whole", convert)
    monkeypatch.setattr("pt2_llama.api.source_dir", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("-rf", "{v}", "a,b", "[b]x", "mön 模型"):
        folder = tiny_model(tmp_path / name)
        made = source_gguf(find_source([], name), lambda text: None)
        source, out = seen[-1]
        assert source == folder, "absolute, so that it is not taken for an option"
        assert not set(",{}") & set(out.name) and made.path.is_file()
    assert cache_name("-a,b {v}") == "_a_b _v_"
    assert check_name(Path("-x.gguf")) == tmp_path / "-x.gguf"


def test_markup_in_a_file_s_name_is_shown_as_it_is(
    tmp_path: Path, setup: Setup, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    config = setup(baselines=())
    name = "fast [b]x[-b] :smile:"
    write_gguf(tmp_path / f"{name}.gguf")
    monkeypatch.setenv("COLUMNS", "200")
    code = cli.main(
        [str(tmp_path / f"{name}.gguf"), "--bin", str(config.bin_dir), "--baseline", "none",
         "--no-perplexity", "--bandwidth", "1", "-r", "1", "-t", "1", "--no-report", "--out",
         str(tmp_path / "out")],
    )  # fmt: skip
    assert code == 0 and name in capsys.readouterr().out
    assert f"{name}.gguf" in calls(tmp_path, "llama-bench")[0][1]


def test_a_kill_s_leftovers_in_the_cache_go_with_the_next_run(tmp_path: Path, setup: Setup) -> None:
    config = setup(perplexity=False, rounds=1)
    cache = tmp_path / "cache" / "bench"
    cache.mkdir(parents=True)
    (cache / ".m-0123-bf16.gguf.abc123.tmp").write_bytes(bytes(1000))
    bench([tmp_path / "fast.gguf"], config)
    assert not list(cache.glob(".*")) and list(cache.glob("*.gguf"))
