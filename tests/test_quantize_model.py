"""Adapters and streaming: block by block must give what transformers' own model gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantize_support import ARCHITECTURES, SEQLEN, VOCAB, tiny_model
from safetensors.torch import load_file, save_file

from pt2_core.errors import PT2Error
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.model.widths import check_linears
from quantize.evaluate import perplexity
from quantize.method.hessian import InputMoments
from quantize.model.streamed import StreamedModel


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
    hidden = model.embed(tokens)
    for index in range(model.n_blocks):
        hidden = model.forward_block(model.load_block(index), hidden, index)
    got = torch.stack([model.head()(h) for h in hidden])
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
    for site in model.adapter.sites:
        for linear in site.linears:
            full.get_submodule(model.linear_name(1, linear)).register_forward_pre_hook(
                lambda _, args, linear=linear: seen.__setitem__(linear, args[0])
            )
    with torch.no_grad():
        full(tokens)
    hidden = model.embed(tokens)
    hidden = model.forward_block(model.load_block(0), hidden, 0)
    got: dict[int, torch.Tensor] = {}
    model.capture_inputs(model.load_block(1), hidden, 1, got.__setitem__)
    for number, site in enumerate(model.adapter.sites):
        for linear in site.linears:
            assert torch.allclose(got[number], seen[linear], atol=1e-4), linear


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


def test_widths_and_skipped_linears(tmp_path):
    folder = tiny_model(tmp_path / "m", intermediate_size=192)
    model = Checkpoint.open(folder)
    with pytest.raises(PT2Error, match=r"128 do not fit down_proj \(192 columns\).*--skip 'down_"):
        check_linears(model, 128, None)
    assert len(check_linears(model, 64, None, exported=False)[0]) == 21
    ternary, kept = check_linears(model, 128, "down_proj")
    assert len(ternary) == 18 and all("down_proj" in n for n in kept) and len(kept) == 3
    with pytest.raises(PT2Error, match="matches every linear"):
        check_linears(model, 128, ".")
