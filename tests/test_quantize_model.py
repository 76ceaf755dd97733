"""Streaming: block by block must give what transformers' own model gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantize_support import ARCHITECTURES, SEQLEN, VOCAB, tiny_model
from safetensors.torch import load_file, save_file

from pt2_core.errors import PT2Error
from pt2_core.model.checkpoint import Checkpoint
from quantize.config import Config
from quantize.evaluate import perplexity
from quantize.method.hessian import InputMoments
from quantize.model.streamed import StreamedModel
from quantize.moments import watch
from quantize.plan import make_plan


def full_model(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCAB, (5, SEQLEN), generator=g)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streamed_logits_are_the_models_own(architecture, tmp_path, tokens):
    folder = tiny_model(tmp_path / "m", architecture)
    model = StreamedModel(Checkpoint.open(folder))
    stream = model.start(tokens, 2)
    for index in range(model.n_blocks):
        stream.advance(model.block(index).module(), index)
    got = torch.stack(list(model.logits(stream)))
    with torch.no_grad():
        want = full_model(folder)(tokens).logits
    assert torch.allclose(got, want, atol=2e-4), (got - want).abs().max()
    assert want.std() > 0.1
    nll = torch.nn.functional.cross_entropy(
        want[:, :-1].reshape(-1, VOCAB), tokens[:, 1:].reshape(-1)
    )
    score = perplexity(folder, tokens)
    assert score.perplexity == pytest.approx(nll.exp().item(), rel=1e-4)
    assert score.tokens == 5 * (SEQLEN - 1)
    half = perplexity(folder, tokens, second_half=True)
    nll = torch.nn.functional.cross_entropy(
        want[:, SEQLEN // 2 : -1].reshape(-1, VOCAB), tokens[:, SEQLEN // 2 + 1 :].reshape(-1)
    )
    assert half.perplexity == pytest.approx(nll.exp().item(), rel=1e-4)


@pytest.mark.parametrize("architecture", ["Mistral", "Qwen3"])
def test_sites_see_the_inputs_of_their_linears(architecture, tmp_path, tokens):
    folder = tiny_model(tmp_path / "m", architecture)
    model = StreamedModel(Checkpoint.open(folder))
    seen: dict[str, torch.Tensor] = {}
    full = full_model(folder)
    block = model.block(1)
    assert [[m.param.split(".")[1] for m in s.members] for s in block.sites] == [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"],
    ]  # fmt: skip
    for name in block.matrices:
        full.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0])
        )
    with torch.no_grad():
        full(tokens)
    stream = model.start(tokens, 5)
    stream.advance(model.block(0).module(), 0)
    layer, batch = block.module(), stream.batches[0]
    found, out = watch(layer, block.sites, range(4), lambda: batch.run(layer, 1), streams=True)
    assert out is None  # nothing behind the last product is run
    for name, matrix in block.matrices.items():
        assert torch.allclose(found.inputs[matrix.site], seen[name], atol=1e-4), name
    assert torch.equal(found.streams[1], batch.hidden)
    assert set(found.streams) == {1, 3}


def test_moments_are_the_mean_of_outer_products():
    x = torch.randn(3, 50, 600, generator=torch.Generator().manual_seed(0))
    moments = InputMoments()
    for batch in x:
        moments.add(batch)
    flat = x.reshape(-1, 600).double()
    assert torch.allclose(moments.mean("x"), flat.T @ flat / 150, atol=1e-5)
    moments.add(torch.full((1, 600), float("nan")))
    with pytest.raises(PT2Error, match=r"NaN or Inf in the activations \(input of q\)"):
        moments.mean("input of q")


def test_shards_are_read_where_they_lie(tmp_path, tokens):
    folder = tiny_model(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    half = len(names) // 2
    parts = {"model-00001-of-00002.safetensors": names[:half],
             "model-00002-of-00002.safetensors": names[half:]}  # fmt: skip
    want = perplexity(folder, tokens).perplexity
    single = Checkpoint.open(folder).fingerprint()[0]
    (folder / "model.safetensors").unlink()
    for file, members in parts.items():
        save_file({n: tensors[n] for n in members}, folder / file)
    import json

    weight_map = {n: file for file, members in parts.items() for n in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint.open(folder)
    assert perplexity(folder, tokens).perplexity == want
    digest, record = checkpoint.fingerprint()
    assert digest != single
    assert checkpoint.fingerprint(record)[0] == digest
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(PT2Error, match="lacks model-00002-of-00002"):
        Checkpoint.open(folder)


def plan_of(folder: Path, strict: bool = False, **settings):
    model = StreamedModel(Checkpoint.open(folder))
    return make_plan(model, Config(proof_tokens=0, **settings), strict=strict)


def test_what_fits_no_block_stays_as_it_is_and_is_named(tmp_path):
    folder = tiny_model(tmp_path / "m", intermediate_size=192)
    plan = plan_of(folder)
    assert len(plan.ternary) == 18 and len(plan.kept) == 3
    assert set(plan.kept.values()) == {"blocks of 128 do not fit its 192 columns"}
    (note,) = plan.notes(Config(order="foldable"))
    assert note.startswith("model.layers.0.mlp.down_proj and 2 more stay as they are: blocks of")
    with pytest.raises(PT2Error, match=r"128 do not fit down_proj \(192 columns\).*--skip 'down_"):
        plan_of(folder, strict=True)
    assert len(plan_of(folder, block_size=64, order="ssr").ternary) == 21
    skipped = plan_of(folder, strict=True, skip="down_proj")
    assert len(skipped.ternary) == 18 and not skipped.by_need
    assert set(skipped.kept.values()) == {"matches --skip down_proj"}
    with pytest.raises(PT2Error, match="matches every linear"):
        plan_of(folder, skip=".")


def test_a_model_of_which_nothing_fits_is_refused(tmp_path):
    folder = tiny_model(tmp_path / "m", hidden_size=192, intermediate_size=192, head_dim=48)
    with pytest.raises(PT2Error, match="cannot be ternarised"):
        plan_of(folder)
