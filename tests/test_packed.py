"""Checkpoints in MXFP4 and FP8 are read as the 16-bit values that they stand for, and exported."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from any_support import make_any_artifact, make_any_model
from export_support import read
from safetensors.torch import load_file, save_file

from export.config import ExportConfig
from export.pipeline import export_gguf
from pt2_core.errors import PT2Error
from pt2_core.formats import SMALLEST
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.model.packed import from_fp8, from_mxfp4
from pt2_core.model.weight_files import SINGLE


def mxfp4(shape, seed=0):
    """Blocks and scales of ``[experts, cols, rows]``."""
    generator = torch.Generator().manual_seed(seed)
    e, cols, rows = shape
    blocks = torch.randint(0, 256, (e, rows, cols // 32, 16), generator=generator)
    scales = torch.randint(118, 124, (e, rows, cols // 32), generator=generator)
    return blocks.to(torch.uint8), scales.to(torch.uint8)


def fp8(weight, tile):
    """float8 values and a scale for each tile."""
    rows, cols = (-(-n // tile) for n in weight.shape)
    scale = torch.rand(rows, cols, generator=torch.Generator().manual_seed(1)) + 0.5
    return (weight * 8).to(torch.float8_e4m3fn), scale


def edit_config(folder, **changes):
    value = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**value, **changes}))


def test_mxfp4_is_read_as_transformers_reads_it():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = mxfp4((3, 64, 5))
    ours = from_mxfp4(blocks, scales)
    assert ours.shape == (3, 64, 5) and ours.dtype == torch.bfloat16
    assert torch.equal(ours, convert_moe_packed_tensors(blocks, scales))
    # The lower half of a byte is the earlier value; 0x2 is 1, 0x7 is 6, 0xf is -6.
    one = torch.full((1, 1, 1, 16), 0x72, dtype=torch.uint8)
    assert from_mxfp4(one, torch.tensor([[[128]]], dtype=torch.uint8))[0, :2, 0].tolist() == [2, 12]


def test_fp8_has_a_scale_for_each_tile():
    """Tiles at the end are smaller: 300 columns are two tiles of 128 and one of 44."""
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(2))
    stored, scale = fp8(weight, 128)
    found = from_fp8(stored, scale, (128, 128))
    for r, c in ((0, 0), (127, 128), (128, 127), (199, 299)):
        expected = float(stored[r, c].float() * scale[r // 128, c // 128])
        assert float(found[r, c]) == pytest.approx(expected, rel=1e-2)
    assert torch.equal(from_fp8(stored, torch.tensor(2.0), (1, 1)).float(), stored.float() * 2)


def packed_model(folder, plain):
    """The MXFP4 form of a tiny gpt-oss, and the same values in 16 bits."""
    tensors = load_file(plain / SINGLE)
    folder.mkdir()
    for file in plain.iterdir():
        if file.name != SINGLE:
            (folder / file.name).write_bytes(file.read_bytes())
    packed = dict(tensors)
    for i, name in enumerate(
        n for n in tensors if n.endswith(("experts.gate_up_proj", "down_proj"))
    ):
        blocks, scales = mxfp4(tuple(tensors[name].shape), seed=i)
        packed[f"{name}_blocks"], packed[f"{name}_scales"] = blocks, scales
        tensors[name] = from_mxfp4(blocks, scales)
        del packed[name]
    save_file(tensors, plain / SINGLE, metadata={"format": "pt"})
    save_file(packed, folder / SINGLE, metadata={"format": "pt"})
    edit_config(folder, quantization_config={"quant_method": "mxfp4"})
    return folder


@pytest.mark.llama
def test_a_model_in_mxfp4_gives_the_file_of_the_16_bit_model(tmp_path):
    plain = make_any_model(tmp_path / "plain", "gpt_oss")
    packed = packed_model(tmp_path / "packed", plain)
    model = Checkpoint.open(packed)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert model.tensors[name].shape == Checkpoint.open(plain).tensors[name].shape
    assert torch.equal(model.read(name), Checkpoint.open(plain).read(name))
    assert any("MXFP4" in note for note in model.notes)
    assert "quantization_config" not in model.settings
    found = []
    for folder in (plain, packed):
        # One tensor of experts is left as it is, so that its values are needed too.
        artifact = make_any_artifact(
            tmp_path / f"{folder.name}-artifact", folder, skip=r"layers\.0\.mlp\.experts\.down",
            transposed=r"experts\.(gate_up|down)_proj$",
        )  # fmt: skip
        out = tmp_path / f"{folder.name}.gguf"
        export_gguf(artifact, out, ExportConfig(type=SMALLEST.ggml_name, proof_tokens=0))
        found.append(read(out)[0])
    assert found[0].keys() == found[1].keys()
    for tensor, other in ((found[0][n], found[1][n]) for n in found[0]):
        assert tensor.tensor_type == other.tensor_type
        assert np.array_equal(tensor.data, other.data), tensor.name
    assert found[0]["blk.0.ffn_down_exps.weight"].tensor_type.name == "Q8_0"
    assert found[0]["blk.1.ffn_down_exps.weight"].tensor_type.name == SMALLEST.name


def test_a_model_in_fp8_is_read_as_its_16_bit_values(tmp_path):
    folder = make_any_model(tmp_path / "m", "llama", spm=True)
    tensors = load_file(folder / SINGLE)
    name = "model.layers.0.mlp.up_proj.weight"
    stored, scale = fp8(tensors[name], 128)
    wrong = {**tensors, name: stored}
    edit_config(
        folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}
    )
    save_file({**wrong, f"{name}_scale_inv": scale}, folder / SINGLE, metadata={"format": "pt"})
    model = Checkpoint.open(folder)
    assert torch.equal(model.read(name), from_fp8(stored, scale, (128, 128)))
    assert f"{name}_scale_inv" not in model.tensors and model.parts == {f"{name}_scale_inv"}
    for bad in ({}, {f"{name}_scale_inv": scale[:, :1].contiguous()}):
        save_file({**wrong, **bad}, folder / SINGLE, metadata={"format": "pt"})
        with pytest.raises(PT2Error, match="weight_scale_inv is missing or does not fit"):
            Checkpoint.open(folder)
    # Without the setting it is no model of ours.
    edit_config(folder, quantization_config=None)
    with pytest.raises(PT2Error, match="already quantised"):
        Checkpoint.open(folder)
