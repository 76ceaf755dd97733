"""Any architecture: every tensor of the file is what llama.cpp's own converter makes of the model
with ``alpha T + mu`` for weights, whatever it does to them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from any_support import dequantized_folder, make_any_artifact, make_any_model
from export_support import read

from export.config import ExportConfig
from export.converter import run_converter
from export.fold import FoldPlan, dense_plan
from export.ggml import Ggml
from export.pipeline import export_gguf
from export.source import TernarySource
from pt2_core.artifact.folder import Artifact
from pt2_core.formats import SMALLEST
from pt2_core.model.checkpoint import Checkpoint
from pt2_llama import api

pytestmark = pytest.mark.llama
EXPERTS = r"experts\.(gate_up|down)_proj$"
# kind -> options of the model, of the artifact, and GGUF tensors that cannot be ternary.
MODELS = {
    "llama": ({"spm": True}, {}, ()),
    "mixtral": ({"spm": True}, {}, ()),
    "qwen3_moe": ({}, {}, ()),
    "granitemoe": ({}, {}, ()),
    "phi3": ({"spm": True}, {}, ()),
    "gemma3_text": ({"spm": True}, {}, ()),
    "gpt2": ({"n_ctx": 256}, {"transposed": r"c_(attn|proj|fc)\.weight"}, ()),
    "gpt_neox": ({"rotary_pct": 0.25}, {}, ()),
    "bloom": ({}, {}, ()),
    "gpt_oss": ({}, {"transposed": EXPERTS}, ()),
    "starcoder2": ({}, {}, ()),
    # One expert is kept: what joins it with the others cannot be ternary.
    "olmoe": ({}, {"skip": r"layers\.1\.mlp\.experts\.2\.up_proj"}, ("blk.1.ffn_up_exps.weight",)),
}


def converted(folder, source, artifact, tmp_path):
    """GGUF name -> float32 values, of the converter on the dequantised and folded model."""
    model = Checkpoint.open(folder)
    orders = {n: m.perm for i in range(artifact.n_blocks) for n, m in artifact.block(i).items()}
    plan = dense_plan(source.plan, source.places, orders)
    folded = {}
    for name in model.tensors:
        value = model.read(name).float().numpy()
        turned = name in source.targets and source.targets[name].transposed
        value = value.swapaxes(-1, -2) if turned else value
        value = plan.apply(name, value)
        folded[name] = np.ascontiguousarray(value.swapaxes(-1, -2) if turned else value)
    work = tmp_path / "work"
    work.mkdir()
    carrier = run_converter(api.source_dir(), model, work, {}, FoldPlan(), folded, lambda n: None)
    return {t.name: t.data for t in carrier.tensors}


@pytest.mark.parametrize("kind", MODELS)
def test_the_file_is_the_converters(kind, tmp_path):
    options, more, falling = MODELS[kind]
    model = make_any_model(tmp_path / "model", kind, **options)
    path = make_any_artifact(tmp_path / "artifact", model, **more)
    out = tmp_path / "m.gguf"
    report = export_gguf(
        path, out, ExportConfig(type=SMALLEST.ggml_name, proof_tokens=0, output_type="f32",
                                embedding_type="f32"))  # fmt: skip
    artifact = Artifact.open(path)
    source = TernarySource.read(artifact, Checkpoint.open(model), lambda *a: None)
    dequantized = dequantized_folder(tmp_path / "dequantised", model, path)
    meant = converted(dequantized, source, artifact, tmp_path)
    tensors, _ = read(out)
    ggml = Ggml(api.require_build().lib_dir)
    assert tensors.keys() == meant.keys()
    counts = {"ternary": 0, "rounded": 0}
    for name, tensor in tensors.items():
        data, wanted = np.asarray(tensor.data), np.asarray(meant[name], np.float32)
        kind_of = tensor.tensor_type
        assert tuple(reversed(tensor.shape.tolist())) == wanted.shape, name
        if kind_of == gguf.GGMLQuantizationType.F32:
            assert np.array_equal(data.reshape(wanted.shape), wanted), name
            continue
        got = ggml.dequantize(data.reshape(-1, data.shape[-1]).view(np.uint8), kind_of)
        wanted = wanted.reshape(got.shape)
        if kind_of.name == SMALLEST.name:
            counts["ternary"] += 1
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6, err_msg=name)
        else:
            counts["rounded"] += 1
            assert np.square(got - wanted).sum() < 1e-3 * np.square(wanted).sum(), name
    assert counts["ternary"] >= 8
    assert tuple(n for n in report.fallbacks if n.endswith("weight")) == falling
    assert sum(m["rows"] * m["cols"] for m in artifact.matrices.values()) >= (
        report.ternary_parameters
    )
