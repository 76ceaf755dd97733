"""Refinement: the pieces against plain autograd, and whole runs on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_support import artifact_bytes, tiny_model, token_file
from safetensors.torch import save_file

from pt2_core.artifact.folder import Artifact, read_manifest
from pt2_core.artifact.matrix import pack_ternary
from pt2_core.errors import PT2Error
from quantize.config import Config
from quantize.evaluate import perplexity
from quantize.model.latent import EDGE, HALF, Latent, initial_latent, round_codes, soft_codes
from quantize.model.student import TernaryLinear
from quantize.pipeline import ternarize
from quantize.refinement.config import RefineConfig
from quantize.refinement.distill import Windows, kl_divergence
from quantize.refinement.loop import refine
from quantize.refinement.store import pack_codes
from quantize.refinement.texts import text_tokens
from quantize.refinement.training import schedule

SMALL = {
    "steps": 12, "batch_size": 4, "micro_batch": 2, "seqlen": 16, "held_out": 4, "eval_every": 4,
    "save_every": 4, "device": "cpu", "dtype": "float32", "threads": 1,
    "lr": 0.02, "lr_codes": 0.01,
}  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_matrix(rows: int = 6, cols: int = 32, blocks: int = 4):
    g = generator()
    t = torch.randint(-1, 2, (rows, cols), generator=g, dtype=torch.int8)
    alpha = torch.rand(rows, blocks, generator=g) + 0.1
    mu = torch.randn(rows, blocks, generator=g) * 0.1
    return t, alpha, mu, torch.randperm(cols, generator=g)


@given(st.integers(0, 2**31), st.sampled_from([3, 4]))
@settings(max_examples=25, deadline=None)
def test_a_latent_starts_in_its_code_s_cell(seed, levels):
    g = generator(seed)
    t = torch.randint(-1, levels - 1, (5, 24), generator=g)
    alpha = torch.rand(5, 3, generator=g)
    alpha[0, 0] = 0
    w = torch.randn(5, 24, generator=g) * 3
    z = initial_latent(w, t, alpha, torch.randn(5, 3, generator=g))
    assert torch.equal(round_codes(z, levels), t.float())
    assert ((z - t).abs() <= HALF - EDGE + 1e-6).all()


@pytest.mark.parametrize("levels", [3, 4])
def test_the_soft_staircase_has_the_slope_it_claims_and_hardens(levels):
    z = torch.linspace(-1.4, levels - 1.6, 57, dtype=torch.float64).requires_grad_()
    value, slope = soft_codes(z, 0.2, levels)
    (wanted,) = torch.autograd.grad(value.sum(), z)
    assert torch.allclose(slope, wanted, atol=1e-12)
    apart = ((z - z.floor() - 0.5).abs() > 0.05).detach()
    hard = round_codes(z.detach().clone(), levels)
    assert set(hard.tolist()) == set(range(-1, levels - 1))
    assert torch.allclose(soft_codes(z, 0.005, levels)[0][apart], hard[apart], atol=1e-3)


@pytest.mark.parametrize("natural", [True, False])
def test_gradients_are_those_of_the_dense_linear(natural):
    t, alpha, mu, perm = some_matrix()
    perm = torch.arange(32) if natural else perm
    latent = Latent(initial_latent(torch.randn(6, 32, generator=generator()), t, alpha, mu), 4)
    layer = TernaryLinear(t, alpha, mu, perm, torch.randn(6), latent)
    with torch.no_grad():
        layer.a.normal_(std=0.1)
        layer.b.normal_(std=0.1)
    x = torch.randn(3, 5, 32, requires_grad=True)
    up = torch.randn(3, 5, 6)
    (layer(x) * up).sum().backward()
    got = (x.grad.clone(), layer.a.grad, layer.b.grad)

    a, b, x2 = (v.detach().clone().requires_grad_() for v in (layer.a, layer.b, x))
    codes = t.float().requires_grad_()
    blocks = (alpha * (1 + a))[..., None] * codes.view(6, 4, 8) + (mu + alpha * b)[..., None]
    weight = torch.empty(6, 32).index_copy(1, perm, blocks.view(6, 32))
    ((x2 @ weight.T + layer.bias) * up).sum().backward()
    for mine, theirs in zip(got, (x2.grad, a.grad, b.grad), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)
    assert torch.allclose(latent.grad.float(), codes.grad, rtol=0.01, atol=1e-3)


def test_latents_of_four_levels_reach_all_of_them_and_go_no_further():
    latent = Latent(torch.zeros(2, 8), 2, levels=4)
    for number in range(1, 200):
        latent.add_gradient(torch.tensor([1.0, -1.0]).repeat(8).view(2, 8))
        latent.step(0.1, number)
    assert set(latent.codes().unique().tolist()) == {-1.0, 2.0}
    assert set(latent.z.unique().tolist()) == {-1.5, 2.5}


@pytest.mark.parametrize("per_weight", [True, False])
def test_latents_go_downhill_by_about_lr(per_weight):
    latent = Latent(torch.zeros(2, 8), 2, per_weight=per_weight)
    target = torch.tensor([1.0, -1.0]).repeat(8).view(2, 8)
    for number in range(1, 31):
        latent.add_gradient(-target)
        latent.step(0.02, number)
        if number == 1:
            assert torch.allclose(latent.z, 0.02 * target, atol=1e-3)
    assert torch.equal(round_codes(latent.z), target)


def test_kl_is_torch_s_own_in_pieces(monkeypatch):
    g = generator()
    s, t = torch.randn(7, 5, generator=g, requires_grad=True), torch.randn(7, 5, generator=g)
    hs, ht = torch.randn(11, 5, generator=g), torch.randn(11, 5, generator=g)
    ours = torch.log_softmax(s @ hs.T, dim=-1)
    theirs = torch.softmax(t @ ht.T, dim=-1)
    want = (theirs * (theirs.log() - ours)).sum(dim=-1).mean()
    (slope,) = torch.autograd.grad(want, s)
    monkeypatch.setattr("quantize.refinement.distill.LOGITS", 22)  # two rows at a time
    got = kl_divergence(s, t, hs, ht)
    assert torch.allclose(got, want, atol=1e-6)
    assert torch.allclose(torch.autograd.grad(got, s)[0], slope, atol=1e-6)


def test_windows_cover_the_text_and_repeat():
    ids = torch.arange(100)
    a, b = Windows(ids, 8, 3, seed=1), Windows(ids, 8, 3, seed=1)
    assert all(torch.equal(a.step(i), b.step(i)) for i in (0, 9, 2))
    one_pass = torch.cat([a._window(i) for i in range(a.per_pass)])
    assert len(set(one_pass.tolist())) == a.per_pass * 8
    assert not torch.equal(a._window(0), a._window(a.per_pass))


def test_schedule_rises_and_falls_to_zero():
    values = [schedule(i, 100, 0.1) for i in range(100)]
    assert values[0] == pytest.approx(0.1) and max(values) == 1.0 and values[-1] < 1e-3
    assert values[9:] == sorted(values[9:], reverse=True)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> tuple[Path, Path, str]:
    """(model, its closed-form artifact, the training text)."""
    folder = tmp_path_factory.mktemp("refine")
    model = tiny_model(folder / "m", "Qwen3")
    config = Config(calibration=token_file(folder / "t.safetensors"), samples=6, seqlen=24,
                    device="cpu", threads=1)  # fmt: skip
    ternarize(model, folder / "a", config)
    ids = torch.randint(0, 96, (1200,), generator=generator(5), dtype=torch.int32)
    save_file({"train": ids}, folder / "train.safetensors")
    return model, folder / "a", f"{folder / 'train.safetensors'}:train"


@pytest.mark.parametrize("codes", ["frozen", "ste", "soft"])
def test_refinement_comes_closer_and_is_stored(codes, start, tmp_path):
    model, source, text = start
    settings = {**SMALL, "lr_codes": 0.002} if codes == "soft" else SMALL
    config = RefineConfig(**settings, codes=codes, tau=0.05, text=text)
    result = refine(source, tmp_path / "r", config)
    assert result.after.kl < 0.95 * result.before.kl
    assert (result.changed == 0) == (codes == "frozen")
    artifact = Artifact.open(tmp_path / "r")
    names = {"model.layers.0.self_attn.q_norm.weight", "model.norm.weight"}
    assert names <= set(artifact.replaced())
    # What was stored is what was measured: float16 grids in the streamed evaluation.
    ids = torch.from_numpy(np.asarray(_ids(text)))[-4 * 16 :].view(4, 16).long()
    for folder, held in ((source, result.before), (tmp_path / "r", result.after)):
        score = perplexity(model, ids, artifact=folder, device="cpu", threads=1)
        assert score.perplexity == pytest.approx(held.perplexity, rel=2e-3)


def test_four_levels_are_refined_as_four(start, tmp_path):
    model, _, text = start
    config = Config(levels=4, calibration=text, samples=6, seqlen=24, device="cpu", threads=1,
                    proof_tokens=0)  # fmt: skip
    ternarize(model, tmp_path / "a", config)
    result = refine(tmp_path / "a", tmp_path / "r", RefineConfig(**SMALL, codes="ste", text=text))
    assert result.after.kl < 0.95 * result.before.kl and result.changed > 0
    matrices = Artifact.open(tmp_path / "r").block(1).values()
    assert all(m.levels == 4 and set(np.unique(m.codes())) == {-1, 0, 1, 2} for m in matrices)
    ids = torch.from_numpy(np.asarray(_ids(text)))[-4 * 16 :].view(4, 16).long()
    score = perplexity(model, ids, artifact=tmp_path / "r", device="cpu", threads=1)
    assert score.perplexity == pytest.approx(result.after.perplexity, rel=2e-3)


def test_embeddings_can_be_trained(start, tmp_path):
    _, source, text = start
    config = RefineConfig(**SMALL, codes="frozen", embeddings=True, text=text)
    refine(source, tmp_path / "r", config)
    replaced = Artifact.open(tmp_path / "r").replaced()
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(replaced)


def test_restored_linears_have_their_weights_back(start, tmp_path):
    model, source, text = start
    config = RefineConfig(**SMALL, restore=r"k_proj|layers\.0\.mlp\.down", text=text)
    result = refine(source, tmp_path / "r", config)
    plain = refine(source, tmp_path / "p", RefineConfig(**SMALL, text=text))
    assert result.before.kl < plain.before.kl
    artifact, whole = Artifact.open(tmp_path / "r"), Artifact.open(tmp_path / "p")
    restored = set(whole.matrices) - set(artifact.matrices)
    assert "model.layers.0.mlp.down_proj" in restored
    assert all("k_proj" in n or "down_proj" in n for n in restored)
    assert set(artifact.kept) - set(whole.kept) == restored
    ids = torch.from_numpy(np.asarray(_ids(text)))[-4 * 16 :].view(4, 16).long()
    score = perplexity(model, ids, artifact=tmp_path / "r", device="cpu", threads=1)
    assert score.perplexity == pytest.approx(result.after.perplexity, rel=2e-3)
    for pattern, message in (("no_such", "none of"), (".", "every linear"), ("(", "regular")):
        with pytest.raises(PT2Error, match=message):
            refine(source, tmp_path / "x", RefineConfig(**SMALL, restore=pattern, text=text))


def test_several_texts_and_a_held_out_one(start, tmp_path):
    _, source, text = start
    ids = torch.from_numpy(np.asarray(_ids(text)))
    save_file({"a": ids[:600], "b": ids[600:]}, tmp_path / "two.safetensors")
    two = f"{tmp_path}/two.safetensors:a,{tmp_path}/two.safetensors:b"
    config = RefineConfig(**SMALL, text=two, held_out_text=text)
    tokens = text_tokens(config, tmp_path, 96)
    assert torch.equal(tokens, torch.cat([ids, ids[: 4 * 16]]).long())
    few = RefineConfig(**{**SMALL, "held_out": 76}, text=text, held_out_text=text)
    with pytest.raises(PT2Error, match="fewer than 76 windows"):
        refine(source, tmp_path / "r", few)


def test_a_run_by_the_clock_ends_in_time(start, tmp_path):
    _, source, text = start
    settings = {**SMALL, "steps": 10**6, "minutes": 2 / 60}
    result = refine(source, tmp_path / "r", RefineConfig(**settings, text=text))
    assert 0 < result.history[-1]["step"] < 10**6
    assert result.seconds < 60
    assert result.after.kl < result.before.kl


def test_the_last_step_by_the_clock_is_looked_at(start, tmp_path, monkeypatch):
    """On a clock that every question moves by a second, so that time is up between two of them."""
    _, source, text = start
    import quantize.refinement.loop as module

    for limit in (7, 8, 9, 10):
        now, steps = [0.0], [0]
        one_step = module.Run.one_step

        def tick(run, now=now):
            now[0] += 1
            return now[0]

        def counted(run, steps=steps, one_step=one_step):
            steps[0] += 1
            return one_step(run)

        with monkeypatch.context() as patch:
            patch.setattr(module.Run, "elapsed", tick)
            patch.setattr(module.Run, "one_step", counted)
            settings = {**SMALL, "steps": 10**6, "minutes": limit / 60, "eval_every": 1000}
            config = RefineConfig(**settings, text=text)
            result = refine(source, tmp_path / f"r{limit}", config)
        assert steps[0] > 1 and result.history[-1]["step"] == steps[0]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_codes_are_packed_as_in_the_artifact(dtype):
    t = torch.randint(-1, 2, (5, 24), generator=generator(), dtype=torch.int8)
    assert np.array_equal(pack_codes(t.to(dtype)).numpy(), pack_ternary(t.numpy()))


class Killed(Exception):
    pass


def test_a_resumed_run_ends_in_the_same_bytes(start, tmp_path, monkeypatch):
    _, source, text = start
    config = RefineConfig(**SMALL, text=text)
    refine(source, tmp_path / "whole", config)

    import quantize.refinement.loop as module

    save = module.save_state

    def save_and_die(*args):
        save(*args)
        raise Killed

    monkeypatch.setattr(module, "save_state", save_and_die)
    with pytest.raises(Killed):
        refine(source, tmp_path / "cut", config)
    monkeypatch.undo()
    assert not (tmp_path / "cut/manifest.json").exists()
    other = RefineConfig(**{**SMALL, "lr": 0.01}, text=text)
    with pytest.raises(PT2Error, match=r"settings\.lr was 0\.02 and is now 0\.01"):
        refine(source, tmp_path / "cut", other, resume=True)
    refine(source, tmp_path / "cut", config, resume=True)
    assert artifact_bytes(tmp_path / "cut") == artifact_bytes(tmp_path / "whole")


def test_patience_ends_a_run_that_does_not_gain(start, tmp_path):
    _, source, text = start
    settings = {**SMALL, "lr": 1.0, "lr_codes": 1.0, "eval_every": 1, "patience": 2, "warmup": 0.0}
    result = refine(source, tmp_path / "r", RefineConfig(**settings, text=text))
    assert result.history[-1]["step"] < SMALL["steps"]
    assert result.after.kl == min(r["held_out"]["kl"] for r in result.history)


def test_bad_input(start, tmp_path):
    _, source, text = start
    config = RefineConfig(**SMALL, text=text)
    with pytest.raises(PT2Error, match="two to train on"):
        refine(source, tmp_path / "r", RefineConfig(**{**SMALL, "held_out": 80}, text=text))
    with pytest.raises(PT2Error, match="name another folder"):
        refine(source, source, config)
    with pytest.raises(PT2Error, match="no state to resume from"):
        refine(source, tmp_path / "r", config, resume=True)
    other = tiny_model(tmp_path / "other", "Qwen3", num_hidden_layers=2)
    with pytest.raises(PT2Error, match="was not made from"):
        refine(source, tmp_path / "r", config, model_dir=other)
    with pytest.raises(PT2Error, match="codes must be one of"):
        RefineConfig(codes="melted")
    with pytest.raises(PT2Error, match="lr must be above 0"):
        RefineConfig(lr=0.0)


def test_replaced_tensors_are_checked(start, tmp_path):
    _, source, text = start
    refine(source, tmp_path / "r", RefineConfig(**{**SMALL, "steps": 1}, text=text))
    manifest = read_manifest(tmp_path / "r")
    assert manifest["format_version"] == 2
    manifest["model"]["tensors"]["model.norm.weight"] = [3]
    (tmp_path / "r/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PT2Error, match=r"model\.norm\.weight does not fit"):
        Artifact.open(tmp_path / "r").replaced()


def _ids(source: str):
    from safetensors.torch import load_file

    path, _, name = source.rpartition(":")
    return load_file(path)[name]


def test_the_recipe_refined_runs_both_stages(tmp_path, capsys):
    from quantize.cli import main

    model = tiny_model(tmp_path / "m", num_hidden_layers=1)
    ids = torch.randint(0, 96, (1200,), generator=generator(5), dtype=torch.int32)
    save_file({"train": ids}, tmp_path / "t.safetensors")
    options = [str(model), "-o", str(tmp_path / "o"), "--recipe", "refined", "--samples", "4"]
    options += ["--seqlen", "16", "--calibration", f"{tmp_path / 't.safetensors'}:train"]
    options += ["--device", "cpu", "--threads", "1", "--refine-steps", "2"]
    assert main(options) == 0
    said = "".join(capsys.readouterr().out.split())  # rich breaks long lines
    assert "held-outKL" in said and f"--from{tmp_path / 'o'}" in said
    assert Artifact.open(tmp_path / "o").manifest["refinement"]
    assert "refinement" not in Artifact.open(tmp_path / "o/closed-form").manifest
    assert main([*options, "--resume", "-q"]) == 0
    assert main(options) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([str(model), "--refine-steps", "2"]) == 2
    assert "--recipe refined" in capsys.readouterr().err
