"""Decoders that nobody told us of: streamed, their matrices found, quantised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from decoder_support import FAMILIES, QUICK, VOCAB, small_model
from safetensors.torch import load_file, save_file

import quantize
from pt2_core.artifact.folder import Artifact
from pt2_core.errors import PT2Error
from pt2_core.model.checkpoint import Checkpoint
from quantize.config import Config, load_recipe
from quantize.method.hessian import ENOUGH, InputMoments, blend
from quantize.model.streamed import StreamedModel
from quantize.moments import gather_experts
from quantize.plan import GATE, ROUTER, UNREAD, make_plan

SLOW = [pytest.param(k, marks=() if k in QUICK else pytest.mark.slow) for k in FAMILIES]


def token_ids(count: int = 6, length: int = 24, seed: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (count, length), generator=g)


@pytest.fixture
def calibration(tmp_path) -> str:
    save_file({"t": token_ids()}, tmp_path / "tokens.safetensors")
    return f"{tmp_path / 'tokens.safetensors'}:t"


def settings(calibration: str, **changes) -> Config:
    base = {"calibration": calibration, "samples": 6, "seqlen": 24, "threads": 1, "device": "cpu",
            "order_samples": 4}  # fmt: skip
    return load_recipe("fast", **{**base, **changes})


@pytest.mark.parametrize("kind", SLOW)
def test_streamed_logits_are_the_models_own_to_the_bit(kind, tmp_path):
    full = small_model(kind, tmp_path / "m")
    tokens = token_ids(2, 40)
    model = StreamedModel(Checkpoint.open(tmp_path / "m"))
    stream = model.start(tokens, 2)
    found = 0
    for index in range(model.n_blocks):
        block = model.block(index)
        found += len(block.matrices)
        # A matrix that is put back in the place it was read from changes nothing.
        plain = [n for n, m in block.matrices.items() if not m.reason]
        stream.advance(block.module({n: block.weight(n) for n in plain}), index)
    assert found >= 4 * model.n_blocks
    with torch.no_grad():
        want = full(tokens, use_cache=False).logits
        got = torch.stack(list(model.logits(stream)))
    assert want.std() > 0.01
    assert torch.allclose(got, want, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("kind", ["phi3", "gpt2", "qwen3_moe"])
def test_an_artifact_of_any_decoder_computes_what_it_says(kind, tmp_path, calibration):
    """The artifact's matrices, put into transformers' own model by their names and places in the
    files, give the logits that streaming gives."""
    small_model(kind, tmp_path / "m")
    # Without compensation, which for so few tokens moves the weights far.
    config = settings(calibration, compensate=False, reround=0)
    result = quantize.ternarize(tmp_path / "m", tmp_path / "a", config)
    artifact = Artifact.open(result.path)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    for index in range(artifact.n_blocks):
        for name, matrix in artifact.block(index).items():
            entry = artifact.matrices[name]
            weight = torch.from_numpy(matrix.dequantize())
            weight = weight.T if entry.get("transposed") else weight
            whole = tensors[entry.get("tensor", f"{name}.weight")]
            place = whole[int(name.partition("[")[2][:-1])] if name.endswith("]") else whole
            off = (place.float() - weight).square().mean() / place.float().square().mean()
            assert 0 < off < 0.5, name
            place.copy_(weight.to(place.dtype))
    (tmp_path / "t").mkdir()
    save_file(tensors, tmp_path / "t" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "t" / "config.json").write_text((tmp_path / "m" / "config.json").read_text())
    from transformers import AutoModelForCausalLM

    tokens = token_ids(2, 24, seed=5)
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "t", dtype=torch.float32).eval()
    model = StreamedModel(Checkpoint.open(tmp_path / "m"))
    stream = model.start(tokens, 2)
    for index in range(model.n_blocks):
        weights = {n: torch.from_numpy(m.dequantize()) for n, m in artifact.block(index).items()}
        rounded = {n: w.bfloat16().float() for n, w in weights.items()}
        stream.advance(model.block(index).module(rounded), index)
    with torch.no_grad():
        want = full(tokens, use_cache=False).logits
    got = torch.stack(list(model.logits(stream)))
    assert torch.allclose(got, want, atol=2e-4 * float(want.abs().max()))


def test_rows_of_joined_experts_are_found_in_the_files(tmp_path):
    """Mixtral's class holds w1 over w3 of all experts in one parameter, the files a linear each."""
    small_model("mixtral", tmp_path / "m")
    model = StreamedModel(Checkpoint.open(tmp_path / "m"))
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    block = model.block(2)
    name = "model.layers.2.block_sparse_moe.experts.3."
    assert {n for n, m in block.matrices.items() if m.expert == 3} == {
        name + w for w in ("w1", "w2", "w3")
    }
    fused = dict(block.module().named_parameters())["mlp.experts.gate_up_proj"][3]
    for part in ("w1", "w3"):
        (rows,) = block.matrices[name + part].parts
        assert rows.param == "model.layers.2.mlp.experts.gate_up_proj" and rows.param_slice == 3
        want = tensors[f"{name}{part}.weight"].float()
        assert torch.equal(fused[rows.param_rows], want[rows.rows])
        assert torch.equal(block.weight(name + part), want)


def test_what_the_files_hold_transposed_is_said(tmp_path):
    small_model("gpt2", tmp_path / "m")
    model = StreamedModel(Checkpoint.open(tmp_path / "m"))
    plan = make_plan(model, Config())
    name = next(n for n in plan.ternary if n.endswith("h.1.mlp.c_fc"))
    assert plan.ternary[name] == (256, 128) and plan.tensors[name] == {"transposed": True}
    assert plan.fold is None and "natural order" in plan.notes(Config(order="foldable"))[-1]
    small_model("gpt_oss", tmp_path / "n")
    plan = make_plan(StreamedModel(Checkpoint.open(tmp_path / "n")), Config())
    name = "model.layers.1.mlp.experts.gate_up_proj[2]"
    want = {"tensor": name.partition("[")[0], "transposed": True}
    assert plan.tensors[name] == want


def test_routers_and_gates_stay_as_they_are(tmp_path):
    small_model("qwen2_moe", tmp_path / "m")
    plan = make_plan(StreamedModel(Checkpoint.open(tmp_path / "m")), Config(), strict=True)
    assert {n.partition("layers.")[2][2:]: r for n, r in plan.kept.items()} == {
        "mlp.gate": ROUTER, "mlp.shared_expert_gate": GATE,
    }  # fmt: skip
    assert len(plan.ternary) == 4 * (4 + 3 + 3 * 4)


def test_a_linear_that_the_trial_run_does_not_reach_is_named(tmp_path, monkeypatch):
    small_model("llama", tmp_path / "m")
    model = StreamedModel(Checkpoint.open(tmp_path / "m"))
    whole = model.sites
    monkeypatch.setattr(model, "sites", lambda index: whole(index)[:-1])  # down_proj's is not seen
    plan = make_plan(model, Config())
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(model.n_blocks)]
    assert plan.by_need == plan.kept == dict.fromkeys(names, UNREAD)
    with pytest.raises(PT2Error, match=r"--strict: \S+\.0\.mlp\.down_proj must stay"):
        make_plan(model, Config(), strict=True)


def test_moments_of_experts_are_those_of_their_tokens(tmp_path):
    """Against the class's own experts: a hook sees their input and which token goes where."""
    full = small_model("qwen3_moe", tmp_path / "m")
    model = StreamedModel(Checkpoint.open(tmp_path / "m"))
    tokens = token_ids(4, 24)
    seen = []
    experts = full.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    with torch.no_grad():
        full(tokens, use_cache=False)
    ((hidden, chosen),) = seen
    stream, block = model.start(tokens, 2), model.block(0)
    number = next(n for n, s in enumerate(block.sites) if s.slices)
    moments = gather_experts(block, block.module(), stream, number, range(1, 3), True, lambda: None)
    assert set(moments.own) == {1, 2}
    for expert, own in moments.own.items():
        x = hidden[(chosen == expert).any(dim=-1)].double()
        assert own.count == len(x) > 0
        assert torch.allclose(own.mean("x"), x.T @ x / len(x), atol=1e-5)
    every = torch.cat([hidden[(chosen == e).any(dim=-1)] for e in range(4)]).double()
    assert torch.allclose(moments.common.mean("x"), every.T @ every / len(every), atol=1e-5)


def test_an_expert_of_few_tokens_leans_on_the_others():
    g = torch.Generator().manual_seed(0)
    common = torch.eye(8, dtype=torch.float64)
    assert blend(InputMoments(), common, "x") == (common, 1.0)
    own = InputMoments()
    own.add(torch.randn(ENOUGH * 8 // 4, 8, generator=g))
    hessian, share = blend(own, common, "x")
    assert share == 0.75
    assert torch.allclose(hessian, 0.25 * own.mean("x") + 0.75 * common)
    own.add(torch.randn(ENOUGH * 8, 8, generator=g))
    assert blend(own, common, "x")[1] == 0.0


def test_experts_without_tokens_are_quantised_counted_and_named(tmp_path, calibration):
    """A router that never sends a token to expert 0."""
    full = small_model("qwen3_moe", tmp_path / "m")
    with torch.no_grad():
        for layer in full.model.layers:
            layer.mlp.gate.weight[0] = layer.mlp.gate.weight[1:].mean(dim=0)
            layer.mlp.gate.weight[0] *= 0.01
    full.to(torch.bfloat16).save_pretrained(tmp_path / "m")  # its buffers are not used any more
    result = quantize.ternarize(tmp_path / "m", tmp_path / "a", settings(calibration))
    tokens = {
        n: m["tokens"] for n, m in result.matrices.items() if "tokens" in m and "layers.0." in n
    }
    assert len(tokens) == 12 and sum(tokens.values()) == 3 * 2 * 6 * 24
    for name, count in tokens.items():
        share = result.matrices[name].get("common", 0.0)
        assert share == pytest.approx(max(0, 1 - count / (ENOUGH * 128)), abs=1e-4), name
    (line,) = result.starved()
    assert "saw few calibration tokens" in line and "of 48 matrices" in line
    run = (tmp_path / "a" / "run.json").read_text()
    assert '"few_tokens"' in run and "experts.0.down_proj" in run
    a = Artifact.open(tmp_path / "a")
    assert all(np.isfinite(m.alpha).all() for m in a.block(0).values())


def test_best_runs_on_experts_too_and_is_the_same_twice(tmp_path, calibration):
    small_model("mixtral", tmp_path / "m")
    config = settings(calibration, rounds=1, sequential=True, asymmetry=0.5, stream=0.5)
    for name in "ab":
        quantize.ternarize(tmp_path / "m", tmp_path / name, config)
    files = [sorted(p for p in (tmp_path / n).iterdir() if p.name != "run.json") for n in "ab"]
    for one, other in zip(*files, strict=True):
        assert one.name == other.name and one.read_bytes() == other.read_bytes(), one.name
    plan = make_plan(StreamedModel(Checkpoint.open(tmp_path / "m")), config)
    count = sum("experts" in name for name in plan.ternary)
    assert count and plan.notes(config)[-1].startswith(f"{count} matrices of experts")
    assert not any("experts" in note for note in plan.notes(settings(calibration)))


def test_each_tensor_is_read_at_most_twice_by_best(tmp_path, calibration, monkeypatch):
    small_model("llama", tmp_path / "m")
    reads: dict[str, int] = {}
    plain = Checkpoint.read

    def counted(self, name, shape=None):
        reads[name] = reads.get(name, 0) + 1
        return plain(self, name, shape)

    monkeypatch.setattr(Checkpoint, "read", counted)
    config = settings(calibration, rounds=1, sequential=True, asymmetry=0.5, stream=0.5)
    quantize.ternarize(tmp_path / "m", tmp_path / "a", config)
    assert {n: c for n, c in reads.items() if c > 2} == {}
    assert len(reads) == 4 * 9 + 3


def test_an_unknown_model_is_refused_in_one_line(tmp_path):
    small_model("llama", tmp_path / "m")
    file: Path = tmp_path / "m" / "config.json"
    file.write_text(file.read_text().replace('"llama"', '"nobody"'))
    with pytest.raises(PT2Error, match=r"model_type .nobody., which .* does not know"):
        StreamedModel(Checkpoint.open(tmp_path / "m"))


def test_the_text_model_of_a_model_that_sees_is_taken_alone(tmp_path):
    """Tensors below ``language_model.`` are its, those of the tower are dropped and named."""
    import json

    full = small_model("llama", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors = {f"language_model.{n}": t for n, t in tensors.items()}
    tensors["vision_tower.patch.weight"] = torch.ones(4, 4)
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    file = tmp_path / "m" / "config.json"
    config = {"model_type": "llava", "text_config": json.loads(file.read_text()),
              "architectures": ["LlavaForConditionalGeneration"]}  # fmt: skip
    file.write_text(json.dumps(config))
    model = StreamedModel(Checkpoint.open(tmp_path / "m"))
    assert "vision_tower.patch.weight" in model.checkpoint.dropped
    assert "language_model.model.layers.0.mlp.up_proj" in make_plan(model, Config()).ternary
    tokens = token_ids(2)
    stream = model.start(tokens, 2)
    for index in range(model.n_blocks):
        stream.advance(model.block(index).module(), index)
    with torch.no_grad():
        want = full(tokens).logits
    assert torch.equal(torch.stack(list(model.logits(stream))), want)
