"""Grids of stock llama.cpp's types: no offset, a scale of either sign, and the bytes of Q2_0."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from export_support import make_model, read
from quantize_support import moments, weights

from export import gguf_types
from export.config import ExportConfig
from export.ggml import Ggml
from export.pipeline import export_gguf
from pt2_core import upstream
from pt2_core.artifact.folder import Artifact
from pt2_core.errors import PT2Error
from pt2_llama import api
from quantize.config import Config, load_recipe
from quantize.method import descent
from quantize.method.gptq import Errors, Method, quantize_matrix, ternarize_block
from quantize.method.ternary import Grid, iterative_ternary_fitting, scale_only, scale_start

GRIDS = {"q2_0": (4, 64), "tq2_0": (3, 256)}


def error(w, t, grid, c):
    e = w - grid.dequantize(t)
    return ((e @ c) * e).sum(dim=1)


@pytest.mark.parametrize("levels", [3, 4])
def test_each_stage_lowers_the_error_and_there_is_no_offset(levels):
    w, c = weights(0, 64, 64), moments(0, 64)
    grid, t = scale_start(w, levels)
    fitted, t2 = iterative_ternary_fitting(w, t, 50, levels, offset=False)
    assert bool(
        (error(w, t2, fitted, torch.eye(64)) <= error(w, t, grid, torch.eye(64)) * 1.0001).all()
    )
    aligned = scale_only(w, t2, c)
    assert bool((error(w, t2, aligned, c) <= error(w, t2, fitted, c) * 1.0001).all())
    assert not fitted.mu.any() and not aligned.mu.any()


def test_a_row_whose_long_side_is_below_gets_a_negative_scale():
    w = -(weights(1, 32, 64).abs() ** 1.5)
    c, method = moments(1, 64), Method(64, 4, offset=False, reround=0)
    grid, t = ternarize_block(w, c, method, None, Errors())
    assert bool((grid.alpha < 0).all()) and bool((t == 2).any())
    _, s = scale_start(w, 4)
    _, s = iterative_ternary_fitting(w, s, 50, 4, offset=False)
    positive = scale_only(w, s, c)
    assert error(w, t, grid, c).sum() < 0.8 * error(w, s, positive, c).sum()


@pytest.mark.parametrize("levels", [3, 4])
def test_whole_rows_get_better_and_are_stored_exactly(levels):
    w, h = weights(9, 32, 128), moments(9, 128, tokens=512).double()
    result, errors = quantize_matrix(w, h, Method(32, levels, offset=False, rounds=2))
    sums = errors.rows_of(0, 32)["E_x"]
    assert sums["final"] < 0.97 * sums["blockwise"]
    assert not result.mu.any() and torch.equal(result.alpha, result.alpha.half().float())
    assert bool((result.alpha < 0).any()) == (levels == 4)
    grid = Grid(result.alpha, result.mu)
    before = descent.objective(w, result.t.float(), grid, h.float())
    new, t = descent.joint_grid(w, result.t.float(), grid, h.float(), levels, "float16", False)
    assert bool((descent.objective(w, t, new, h.float()) <= before * 1.00001).all())


def test_settings_of_a_grid():
    config = Config(grid="q2_0")
    assert (config.levels, config.block_size, config.offset) == (4, 64, False)
    assert Config().identity().keys() == Config(grid="q2_0").identity().keys() - {"grid"}
    with pytest.raises(PT2Error, match="grid q2_0 has block_size 64, not 256"):
        Config(grid="q2_0", block_size=256)
    # Given beside the grid, also what is the default without one is refused.
    for name, value in (("levels", 3), ("block_size", 128)):
        with pytest.raises(PT2Error, match=f"grid q2_0 has {name} .*, not {value}: leave it out"):
            load_recipe("fast", grid="q2_0", **{name: value})
    assert load_recipe("best", grid="q2_0", levels=4).block_size == 64


@pytest.mark.llama
@pytest.mark.parametrize("name", list(GRIDS))
def test_ggml_decodes_what_is_packed(name):
    gguf_types.register()
    levels, block = GRIDS[name]
    rng = np.random.default_rng(0)
    codes = rng.integers(0, levels, (5, 512), dtype=np.uint8)
    d = rng.normal(size=(5, 512 // block)).astype(np.float16)
    data = upstream.TYPES[name].pack(codes, d)
    ggml = Ggml(api.require_build().lib_dir)
    kind = gguf.GGMLQuantizationType[name.upper()]
    assert data.shape[1] == ggml.row_size(kind, 512)
    want = (codes.astype(np.float32) - 1) * np.repeat(d.astype(np.float32), block, axis=1)
    assert np.array_equal(ggml.dequantize(data, kind), want)


@pytest.mark.llama("stock")
@pytest.mark.parametrize("name", list(GRIDS))
def test_from_model_to_a_file_that_the_unmodified_build_proves(name, tmp_path):
    from quantize.pipeline import ternarize

    model = make_model(tmp_path / "model")
    from safetensors.torch import save_file

    tokens = torch.randint(3, 300, (16, 64), dtype=torch.int32)
    save_file({"c": tokens}, tmp_path / "t.safetensors")
    config = Config(grid=name, calibration=f"{tmp_path / 't.safetensors'}:c", samples=16, seqlen=64)
    ternarize(model, tmp_path / "a", config)
    artifact = Artifact.open(tmp_path / "a")
    assert not any(m.mu.any() for i in range(2) for m in artifact.block(i).values())
    report = export_gguf(tmp_path / "a", tmp_path / "m.gguf", ExportConfig(type=name))
    assert report.verified and report.proof is not None and report.proof.difference.kl < 0.01
    tensors, fields = read(tmp_path / "m.gguf")
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == name.upper()
    assert fields["general.file_type"] == upstream.TYPES[name].file_type
    with pytest.raises(PT2Error, match=f"use --type {name}"):
        export_gguf(tmp_path / "a", tmp_path / "n.gguf", ExportConfig(type="q2_k"))
