"""The artifact's proof: what it holds, where it is cut, and that it is the ternary model's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from export_support import dequantized_model, make_artifact, make_model
from quantize_support import tiny_model, token_file

from pt2_core.artifact import proof_text
from pt2_core.artifact.folder import PROOF, Artifact, read_manifest
from pt2_core.artifact.proof import Proof, cut, difference, scored, shape, with_bos
from pt2_core.errors import PT2Error
from pt2_core.model.checkpoint import Checkpoint
from quantize.config import Config
from quantize.pipeline import ternarize
from quantize.proof_run import make_proof, plan_proof
from quantize.refinement.config import RefineConfig
from quantize.refinement.loop import refine


def some_proof(windows: int = 2, length: int = 12, k: int = 4) -> Proof:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((windows, scored(length), 20)).astype(np.float32)
    logprob = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    top = np.argsort(-logprob, axis=-1)[..., :k].astype(np.int32)
    tokens = rng.integers(0, 20, (windows, length)).astype(np.int32)
    lines = (("one", "a b"), ("two", "\u00e9"))
    ids = (np.array([1, 2, 3], np.int32), np.array([], np.int32))
    return Proof("text", tokens, 1, top, np.take_along_axis(logprob, top, -1), lines, ids)


def test_a_proof_reads_back_as_it_was_written():
    proof = some_proof()
    again = Proof.of_arrays(proof.arrays())
    for field in dataclasses.fields(Proof):
        a, b = getattr(proof, field.name), getattr(again, field.name)
        if field.name == "ids":
            assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
        else:
            assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


@pytest.mark.parametrize(
    "change",
    [
        {"record": np.frombuffer(b"{}", np.uint8)},
        {"record": np.frombuffer(b"[" * 100_000, np.uint8)},
        {"tokens": np.zeros((2, 10), np.int32)},
        {"top": np.zeros((2, 5, 4), np.int64)},
        {"logprob": np.full((2, 5, 4), np.nan, np.float32)},
        {"logprob": np.full((2, 5, 4), 1.0, np.float32)},
        {"line_lengths": np.array([3, 1], np.int32)},
        {"line_lengths": np.array([4, -1], np.int32)},
    ],
)
def test_a_damaged_proof_is_refused(change):
    with pytest.raises((KeyError, ValueError, TypeError, RecursionError)):
        Proof.of_arrays({**some_proof().arrays(), **change})


def test_the_divergence_is_that_of_the_top_tokens_and_the_rest_together():
    proof = some_proof()
    rng = np.random.default_rng(1)
    theirs = proof.logprob + 0.05 * rng.standard_normal(proof.logprob.shape).astype(np.float32)
    p, q = np.exp(proof.logprob.astype(np.float64)), np.exp(theirs.astype(np.float64))
    p = np.concatenate([p, 1 - p.sum(-1, keepdims=True)], -1)
    q = np.concatenate([q, 1 - q.sum(-1, keepdims=True)], -1)
    found = difference(proof, theirs, proof.top[..., 0])
    assert found.kl == pytest.approx(float((p * np.log(p / q)).sum(-1).mean()), rel=1e-5)
    assert found.same_top == 1.0
    assert difference(proof, proof.logprob, proof.top[..., 1]).same_top == 0.0
    assert difference(proof, proof.logprob, proof.top[..., 0]).kl == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("settings", "tokens", "longest", "wanted"),
    [
        ({}, 1024, 0, (2, 512)),
        ({"max_position_embeddings": 64}, 1024, 0, (16, 64)),
        ({}, 300, 0, (1, 288)),
        ({"sliding_window": 64}, 1024, 0, (2, 512)),
        ({"sliding_window": 4096}, 1024, 0, (1, 5120)),
        ({"sliding_window": 4096}, 1024, 4096, (1, 4096)),
        ({"sliding_window": 4096}, 512, 0, (1, 512)),
        ({"sliding_window": 4096, "use_sliding_window": False}, 1024, 0, (2, 512)),
        ({"sliding_window": 100_000}, 1024, 0, (2, 512)),
        (
            {"max_position_embeddings": 1024, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            1024, 0, (1, 1280),
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn",
                                                    "original_max_position_embeddings": 4096}}},
            1024, 0, (1, 5120),
        ),
    ],
)  # fmt: skip
def test_windows_pass_what_changes_with_the_distance(settings, tokens, longest, wanted):
    settings = {"max_position_embeddings": 8192, **settings}
    assert shape(settings, tokens, longest) == wanted


def test_the_first_token_of_every_window_is_bos():
    tokens = cut(range(10, 40), 2, 8)
    assert tokens.tolist() == [[*range(10, 18)], [*range(18, 26)]]
    assert with_bos(tokens, 1)[:, 0].tolist() == [1, 1] and tokens[1, 0] == 18
    assert np.array_equal(with_bos(tokens, None), tokens)


def test_a_line_s_name_is_its_own_and_special_tokens_stand_among_words():
    named = proof_text.lines(["<s>", "</s>"])
    names = [name for name, _ in named]
    assert len(set(names)) == len(names) and names[0] == proof_text.ALL
    texts = dict(named)
    assert texts["special tokens"].endswith("<s></s>")
    assert texts["Thai and Khmer"] in texts[proof_text.ALL]
    assert texts[proof_text.DECOMPOSED] not in texts[proof_text.ALL]


def predictions_in_transformers(model_dir, artifact_dir, proof: Proof):
    with torch.no_grad():
        logits = dequantized_model(model_dir, artifact_dir)(
            torch.from_numpy(proof.inputs()).long()
        ).logits
    logprob = logits[:, proof.length // 2 : -1].log_softmax(-1).numpy()
    return np.take_along_axis(logprob, proof.top, -1), logprob.argmax(-1)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_quantiser_s_proof_is_what_transformers_predicts(family, tmp_path):
    model = make_model(tmp_path / "model", family, tied=family == "qwen3")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(np.random.default_rng(0).choice(proof_text.PROSE.split(), 900)))
    config = Config(calibration=str(text), samples=4, seqlen=64, device="cpu", threads=1)
    ternarize(model, tmp_path / "artifact", config)
    artifact = Artifact.open(tmp_path / "artifact")
    proof = Proof.read(artifact)
    assert proof is not None and artifact.manifest["proof"] == proof.record()
    found = difference(proof, *predictions_in_transformers(model, artifact.path, proof))
    assert found.kl < 1e-6 and found.same_top > 0.99
    checkpoint = Checkpoint.open(model)
    again = make_proof(checkpoint, artifact, plan_proof(checkpoint, 1024))
    assert np.array_equal(again.top, proof.top) and np.array_equal(again.tokens, proof.tokens)
    assert np.allclose(again.logprob, proof.logprob, atol=1e-5)


def test_a_refinement_renews_the_proof(tmp_path):
    model = make_model(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(np.random.default_rng(0).choice(proof_text.PROSE.split(), 1500)))
    config = Config(calibration=str(text), samples=4, seqlen=64, device="cpu", threads=1)
    ternarize(model, tmp_path / "artifact", config)
    small = RefineConfig(
        steps=6, batch_size=2, micro_batch=1, seqlen=32, held_out=2, eval_every=1, save_every=9,
        device="cpu", dtype="float32", threads=1, lr=0.01, lr_codes=0.002, embeddings=True,
        text=str(text),
    )  # fmt: skip
    refine(tmp_path / "artifact", tmp_path / "refined", small)
    before = Proof.read(Artifact.open(tmp_path / "artifact"))
    after = Proof.read(Artifact.open(tmp_path / "refined"))
    assert before is not None and after is not None
    assert np.array_equal(before.tokens, after.tokens)
    assert not np.allclose(before.logprob, after.logprob, atol=1e-3)
    checkpoint = Checkpoint.open(model)
    made = make_proof(checkpoint, Artifact.open(tmp_path / "refined"), before)
    assert np.array_equal(made.logprob, after.logprob)


def test_a_model_without_a_tokenizer_says_that_it_has_no_proof(tmp_path):
    model = tiny_model(tmp_path / "model")
    tokens = token_file(tmp_path / "t.safetensors")
    config = Config(calibration=tokens, samples=4, seqlen=24, device="cpu", threads=1)
    result = ternarize(model, tmp_path / "artifact", config)
    manifest = read_manifest(tmp_path / "artifact")
    assert manifest["proof"] == {"left_out": "the model has no tokenizer"}
    assert PROOF not in manifest["files"] and any("no proof" in w for w in result.warnings)
    assert Proof.read(Artifact.open(tmp_path / "artifact")) is None


def test_a_tokenizer_that_is_not_the_model_s_is_refused_before_the_work(tmp_path):
    model = make_model(tmp_path / "model", vocab_size=300)
    artifact = make_artifact(tmp_path / "artifact", model)
    assert artifact.is_dir()
    with pytest.raises(PT2Error, match=r"gives token id \d+, and the model has embeddings for 300"):
        plan_proof(Checkpoint.open(model), 1024)
