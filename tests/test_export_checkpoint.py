"""Exports of models whose folders hold more, less or other things than they seem to."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from export_support import make_artifact, make_model, read
from safetensors.torch import load_file, save_file
from test_export_predictions import divergence

from export import ExportConfig, export_gguf
from export.encode import check_group_size
from llamacpp_bench.run.baselines import _convert
from pt2_core.artifact.folder import Artifact, ArtifactWriter
from pt2_core.errors import PT2Error
from pt2_core.formats import DEFAULT, SMALLEST
from pt2_core.model.checkpoint import Checkpoint

pytestmark = pytest.mark.llama
SINGLE = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BROKEN_CARD = "---\ntitle: a: b\n  - c\n---\n"


def config(folder, **changes):
    value = json.loads((folder / "config.json").read_text())
    value = {k: v for k, v in {**value, **changes}.items() if v != "gone"}
    (folder / "config.json").write_text(json.dumps(value))


def tensors(folder, **changes):
    save_file({**load_file(folder / SINGLE), **changes}, folder / SINGLE)


def stale_second_set(folder):
    noise = {k: torch.randn_like(v) for k, v in load_file(folder / SINGLE).items()}
    save_file(noise, folder / "model_old.safetensors")
    (folder / "README.md").write_text(BROKEN_CARD)


def another_head_stored(folder):
    config(folder, tie_word_embeddings=True)


def leftovers(folder):
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)}
    tensors(folder, **{"v_head.summary.weight": torch.zeros(1, 256), **inv_freq})
    config(folder, pad_token_id=-1, quantization_config={"quant_method": "gptq", "bits": 4})
    (folder / "generation_config.json").write_text("{ not json")


def other_names(folder):
    (folder / SINGLE).rename(folder / "pytorch_model.safetensors")
    config(folder, model_type="gone")


def no_head_dim(folder):
    config(folder, head_dim="gone")


CASES = {
    "stale second set": ("llama", {}, stale_second_set),
    "another head stored": ("llama", {}, another_head_stored),
    "leftovers": ("mistral", {}, leftovers),
    "other names": ("llama", {"tied": True}, other_names),
    "no head_dim": ("qwen3", {}, no_head_dim),
}


@pytest.mark.parametrize("case", CASES)
def test_what_counts_is_exported_and_nothing_else(case, tmp_path):
    """Against the artifact's weights in transformers, made from the folder as it was."""
    family, options, change = CASES[case]
    good = make_model(tmp_path / "good", family, **options)
    model = shutil.copytree(good, tmp_path / "model")
    change(model)
    artifact = make_artifact(tmp_path / "artifact", model)
    assert divergence(good, artifact, tmp_path, DEFAULT.ggml_name) < 0.003


def test_a_trained_table_of_a_tied_model_with_a_stored_head_is_not_lost(tmp_path):
    model = make_model(tmp_path / "model", tied=True)
    table = load_file(model / SINGLE)[EMBEDDING]
    tensors(model, **{HEAD: table.clone()})
    path = make_artifact(tmp_path / "artifact", model)
    trained = np.random.default_rng(0).normal(size=table.shape).astype(np.float32)
    artifact = Artifact.open(path)
    ArtifactWriter(path, artifact.manifest).write_replaced({EMBEDDING: trained})
    report = export_gguf(path, tmp_path / "m.gguf", ExportConfig(output_type="f32"))
    assert report.tied and any(HEAD in note for note in report.notes)
    found, _ = read(tmp_path / "m.gguf")
    assert "output.weight" not in found
    order = artifact.residual_perm
    written = np.asarray(found["token_embd.weight"].data).view(np.float32).reshape(table.shape)
    assert np.array_equal(written, trained[:, order])


# GGUF's names of what pt2-refine may replace, and whether the residual stream's order is in it.
REPLACED = {
    EMBEDDING: ("token_embd.weight", True),
    HEAD: ("output.weight", True),
    "model.norm.weight": ("output_norm.weight", True),
    "model.layers.{}.input_layernorm.weight": ("blk.{}.attn_norm.weight", True),
    "model.layers.{}.post_attention_layernorm.weight": ("blk.{}.ffn_norm.weight", True),
    "model.layers.{}.self_attn.q_norm.weight": ("blk.{}.attn_q_norm.weight", False),
    "model.layers.{}.self_attn.k_norm.weight": ("blk.{}.attn_k_norm.weight", False),
}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_replaced_tensor_is_in_the_file(family, tmp_path):
    """Refined norms, embeddings and head, read back from the file: to the bit, in their order."""
    model = make_model(tmp_path / "model", family)
    path = make_artifact(tmp_path / "artifact", model)
    artifact, source = Artifact.open(path), Checkpoint.open(model)
    names = {a.format(i): (b.format(i), on) for a, (b, on) in REPLACED.items() for i in range(2)}
    names = {a: b for a, b in names.items() if a in source.tensors}
    assert len(names) == 3 + 2 * (4 if family == "qwen3" else 2)
    rng = np.random.default_rng(0)
    trained = {n: rng.normal(size=source.info(n).shape).astype(np.float32) for n in names}
    ArtifactWriter(path, artifact.manifest).write_replaced(trained)
    config = ExportConfig(embedding_type="f32", output_type="f32", proof_tokens=0)
    export_gguf(path, tmp_path / "m.gguf", config)
    found, _ = read(tmp_path / "m.gguf")
    for name, (written, on_stream) in names.items():
        values = np.asarray(found[written].data).view(np.float32).reshape(trained[name].shape)
        meant = trained[name][..., artifact.residual_perm] if on_stream else trained[name]
        assert np.array_equal(values, meant), name


def test_a_baseline_is_made_of_what_counts(tmp_path):
    model = make_model(tmp_path / "model", tied=True)
    tensors(model, **{HEAD: load_file(model / SINGLE)[EMBEDDING].clone()})
    leftovers(model)
    stale_second_set(model)
    said: list[str] = []
    _convert(model, tmp_path / "m.gguf", said.append)
    found, fields = read(tmp_path / "m.gguf")
    assert "output.weight" not in found and len(found) == 2 + 9 * 2
    table = load_file(model / SINGLE)[EMBEDDING]
    assert found["token_embd.weight"].data.shape[0] == len(table)
    assert "tokenizer.ggml.padding_token_id" not in fields
    assert any("v_head" in line for line in said) and any("README" in line for line in said)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "m.log", "model"]


def test_the_artifact_says_which_tensors_count(tmp_path):
    """One that came into the folder's files later is left out, one that is gone is missed."""
    model = make_model(tmp_path / "model")
    artifact = make_artifact(tmp_path / "artifact", model)
    tensors(model, extra_head=torch.zeros(4))
    report = export_gguf(artifact, tmp_path / "m.gguf", ExportConfig(verify=False))
    assert any("extra_head" in note for note in report.notes)
    checkpoint = Checkpoint.open(model)
    with pytest.raises(PT2Error, match=r"no tensor model\.gone"):
        checkpoint.as_made({"tensors": ["model.gone"]})


def test_a_changed_tokenizer_is_another_model(tmp_path):
    model = make_model(tmp_path / "model")
    artifact = make_artifact(tmp_path / "artifact", model)
    (model / "added_tokens.json").write_text('{"<x>": 5}')
    with pytest.raises(PT2Error, match="is not the model"):
        export_gguf(artifact, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_block_size_that_no_type_holds_does_not_go_in_a_circle():
    small = {"model.layers.0.self_attn.q_proj": 576, "model.layers.0.mlp.down_proj": 1536}
    for kind in (DEFAULT.ggml_name, "q2_k"):
        with pytest.raises(PT2Error, match=r"quantise again, use --skip 'q_proj'"):
            check_group_size(64, kind, small)
    with pytest.raises(PT2Error, match="use --type q2_k, or quantise again"):
        check_group_size(64, SMALLEST.ggml_name, {"a.down_proj": 1536})
    check_group_size(64, "q2_k", {"a.down_proj": 1536})
    check_group_size(128, SMALLEST.ggml_name, {"a.q_proj": 640})
