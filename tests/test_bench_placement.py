"""pt2-bench: where the operations of a run lie, what a token reads there, and how fast that is."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bench_support import METADATA, TENSORS, Setup, calls, write_gguf

from llamacpp_bench import bench, speed
from llamacpp_bench.results import Placement
from llamacpp_bench.run.baselines import Wanted
from llamacpp_bench.run.placement import parse_placement
from pt2_core.errors import PT2Error
from pt2_core.formats import DEFAULT
from pt2_core.gguf_info import read_gguf


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
        "llamacpp_bench.run.placement.parse_placement",
        lambda log, info: _placement_with_cpu(),
    )
    config = setup(baselines=(), perplexity=False)
    assert "ran on the CPU: MUL_MAT x" in bench([tmp_path / "fast.gguf"], config).warnings[-2]
    with pytest.raises(PT2Error, match=r"1 operations ran on the CPU: MUL_MAT x \(--strict\)"):
        bench([tmp_path / "fast.gguf"], setup(baselines=(), perplexity=False, strict=True))


def _placement_with_cpu() -> object:
    return Placement(ops={"Q8_0": {"MUL_MAT": {"CUDA0": 1}}}, elsewhere=["MUL_MAT x"])


def test_placement_of_ternary_files_only(tmp_path: Path, setup: Setup) -> None:
    ternary = [(n, s, DEFAULT.name if "ffn" in n else k) for n, s, k in TENSORS]
    layout = {**METADATA, DEFAULT.layout_key(): 1}
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


# ---------------------------------------------------------------------------------------- bandwidth


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
