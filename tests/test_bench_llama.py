"""pt2-bench with the real programs: synthetic files of every type run, and are placed as stated."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamacpp_bench import Config, load_results
from llamacpp_bench.bench_synthetic import bench_synthetic
from llamacpp_bench.run.synthetic import LABEL, SHAPES
from llamacpp_bench.run.tools import open_toolbox
from pt2_core import formats
from pt2_core.errors import PT2Error
from pt2_core.formats import DEFAULT

pytestmark = pytest.mark.llama
STOCK_TYPES = ["Q2_K", "Q2_0", "IQ1_M", "IQ2_XXS", "TQ2_0", "TQ1_0", "Q4_K_M", "F16"]
TINY = {
    "prompt": 16,
    "gen": 4,
    "pg": (),
    "rounds": 1,
    "threads": 1,
    "bandwidth": 1e9,
    "quiet": True,
}


@pytest.mark.parametrize("repack", [True, False])
def test_synthetic_files_of_every_type_run(tmp_path: Path, repack: bool) -> None:
    types = [*formats.NAMES, *STOCK_TYPES]
    config = Config(**TINY, repack=repack, out=str(tmp_path / "out"))  # type: ignore[arg-type]
    results = bench_synthetic([SHAPES["tiny"]], types, config)
    assert [m.main_type for m in results.models[:3]] == [*formats.NAMES, "Q2_K"]
    assert results.baseline == {"tiny": "tiny Q2_K"}
    assert load_results(tmp_path / "out" / "results.json").config["synthetic"] == LABEL
    assert not list((tmp_path / "out").rglob("*.gguf")), "deleted after the run"
    matrices = 2 * 7
    for m in results.models[:2]:
        kind = m.main_type
        assert m.placement.ops[kind]["MUL_MAT"] == {"CPU": matrices}
        assert m.placement.kernels[kind] == open_toolbox("cpu").ternary_path()
        assert not repack or not m.placement.repacked.get("Q2_K")
    if not repack:
        assert not any(m.placement.repacked for m in results.models)


def test_the_forced_path_is_the_one_that_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGML_TQ_CPU", "generic")
    assert open_toolbox("cpu").ternary_path() == "generic"


@pytest.mark.llama("stock")
def test_stock_builds_run_stock_types_only(tmp_path: Path) -> None:
    config = Config(**TINY, variant="stock", out=str(tmp_path / "out"))  # type: ignore[arg-type]
    results = bench_synthetic([SHAPES["tiny"]], STOCK_TYPES, config)
    assert {m.main_type for m in results.models} >= {"Q2_K", "TQ2_0", "IQ1_M"}
    with pytest.raises(PT2Error, match=rf"an unmodified llama\.cpp cannot run {DEFAULT.name}"):
        bench_synthetic([SHAPES["tiny"]], [DEFAULT.name], config)


@pytest.mark.llama("stock")
def test_recipes_are_those_of_llama_quantize(tmp_path: Path) -> None:
    config = Config(**TINY, variant="stock", out=str(tmp_path / "o"))  # type: ignore[arg-type]
    model = bench_synthetic([SHAPES["tiny"]], ["Q2_K"], config).models[0]
    # attn_v, attn_output and ffn_down are Q3_K and the head is Q6_K in llama.cpp's Q2_K files
    assert {k: v["tensors"] for k, v in model.types.items() if k != "F32"} == {
        "Q2_K": 9,
        "Q3_K": 6,
        "Q6_K": 1,
    }
