"""What llama.cpp predicts from exported files, against the artifact's weights in transformers."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
import torch
from export_support import FAMILIES, TEXT, dequantized_model, make_artifact, make_model, read

from export import ExportConfig, export_gguf
from pt2_core.formats import DEFAULT, SMALLEST
from pt2_llama import api

pytestmark = pytest.mark.llama


@pytest.mark.parametrize(
    ("family", "tied", "kind"),
    [
        *((f, f == "qwen3", DEFAULT.ggml_name) for f in FAMILIES),
        ("qwen2", True, SMALLEST.ggml_name),
        ("qwen3", False, "q2_k"),
    ],
)
def test_llama_cpp_predicts_as_the_artifacts_weights_do(family, tied, kind, made, tmp_path):
    """Folded, converted and quantised, on llama.cpp, against transformers with alpha T + mu."""
    model, artifact = made(family, tied=tied)
    assert divergence(model, artifact, tmp_path, kind) < 0.003


@pytest.mark.llama("stock")
def test_an_unmodified_llama_cpp_predicts_the_same_from_q2_k(made, tmp_path):
    """Q2_K files need no patch: the same comparison with the programs of the stock build."""
    model, artifact = made("qwen3", tied=False)
    assert divergence(model, artifact, tmp_path, "q2_k", "stock") < 0.003
    text = tmp_path / "text.txt"
    other = llama_predictions(tmp_path / "m.gguf", text, "cpu")[1]
    assert np.abs(other - llama_predictions(tmp_path / "m.gguf", text, "stock")[1]).max() < 0.05


def test_rope_factors_of_llama_3_pass_through(tmp_path):
    scaling = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    model = make_model(tmp_path / "model", rope_parameters=scaling)
    artifact = make_artifact(tmp_path / "artifact", model)
    assert divergence(model, artifact, tmp_path, DEFAULT.ggml_name) < 0.003
    factors = read(tmp_path / "m.gguf")[0]["rope_freqs.weight"]
    assert factors.tensor_type.name == "F32" and float(np.max(factors.data)) == 8.0


def test_the_comparison_notices_a_missing_fold(made, tmp_path, monkeypatch):
    """A control: without the order of one block's v rows the predictions are visibly others."""
    from export import source

    plan = source.fold_plan

    def forgetful(*args):
        result = plan(*args)
        del result.rows["model.layers.1.self_attn.v_proj.weight"]
        return result

    monkeypatch.setattr(source, "fold_plan", forgetful)
    assert divergence(*made(), tmp_path, DEFAULT.ggml_name) > 0.1


def test_splits_are_named_and_hold_everything(made, tmp_path):
    _, artifact = made()
    whole = export_gguf(artifact, tmp_path / "one.gguf")
    report = export_gguf(artifact, tmp_path / "m.gguf", ExportConfig(split_max_size=150_000))
    n = len(report.files)
    assert n > 1
    assert [f.name for f in report.files] == [f"m-{i + 1:05d}-of-{n:05d}.gguf" for i in range(n)]
    assert not (tmp_path / "m.gguf").exists()
    parts = {}
    for i, file in enumerate(report.files):
        tensors, fields = read(file)
        assert (fields["split.no"], fields["split.count"]) == (i, n)
        parts |= {k: bytes(np.asarray(t.data).data) for k, t in tensors.items()}
    one, _ = read(whole.files[0])
    assert parts == {k: bytes(np.asarray(t.data).data) for k, t in one.items()}
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 12, encoding="utf-8")
    predictions = [llama_predictions(r.files[0], text)[1] for r in (whole, report)]
    assert np.array_equal(*predictions)


def divergence(model, artifact, folder, kind, variant="cpu"):
    """Export and return the mean KL divergence in nats of llama.cpp's predictions from torch's.

    Activations in eight bits cost 0.0002 to 0.0004 here, Q2_K's scales 0.001.
    """
    # The comparison here is one of its own.
    config = ExportConfig(type=kind, embedding_type="f32", output_type="f32", proof_tokens=0)
    export_gguf(artifact, folder / "m.gguf", config)
    text = folder / "text.txt"
    words = np.random.default_rng(0).choice(TEXT.split(), 900)
    text.write_text(" ".join(words), encoding="utf-8")
    tokens, got = llama_predictions(folder / "m.gguf", text, variant)
    with torch.no_grad():
        logits = dequantized_model(model, artifact)(torch.from_numpy(tokens)).logits
    meant = logits[:, tokens.shape[1] // 2 : -1].double().log_softmax(-1)
    got = torch.from_numpy(got).double().log_softmax(-1)
    return float((meant.exp() * (meant - got)).sum(-1).mean())


def llama_predictions(file, text, variant="cpu", chunks=4, context=128):
    """What llama-perplexity saves for its --kl-divergence.

    Returns:
        tokens int64 ``[chunks, context]``, BOS first where there is one, and log-probabilities
        float32 ``[chunks, context - 1 - context / 2, vocab]`` of the second halves.
    """
    build = api.require_build(variant)
    saved = file.with_suffix(".logits")
    command = [build.tool("llama-perplexity"), "-m", file, "-f", text, "-c", str(context),
               "--chunks", str(chunks), "-t", "1", "--save-all-logits", saved]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=build.env())
    assert done.returncode == 0, done.stderr[-2000:]
    data = saved.read_bytes()
    assert data[:8] == b"_logits_"
    _, vocab, n = np.frombuffer(data, "<i4", 3, offset=8)
    assert n == chunks
    tokens = np.frombuffer(data, "<i4", chunks * context, offset=20).reshape(chunks, context)
    tokens = tokens.astype(np.int64)
    if read(file)[1].get("tokenizer.ggml.add_bos_token"):
        tokens[:, 0] = 1
    rows = chunks * (context - 1 - context // 2)
    row_size = 2 * ((vocab + 1) // 2) + 4
    values = np.frombuffer(data, "<u2", offset=20 + 4 * tokens.size).reshape(rows, row_size)
    scale, least = np.ascontiguousarray(values[:, :4]).view("<f4").T
    result = values[:, 4 : 4 + vocab] * scale[:, None] + least[:, None]
    return tokens, result.reshape(chunks, -1, vocab)
