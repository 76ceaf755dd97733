"""What the families say of their orders is true: a model with random orders folded in gives the
logits it gave before. And what a manifest says of a fold is checked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pt2_core.errors import PT2Error
from pt2_core.model.fold_edges import (
    Edge,
    FoldEdges,
    Heads,
    Rows,
    check_edges,
    edges_for,
    split_expert,
)
from pt2_core.model.folds import families

HIDDEN, HEADS, KV, DIM = 64, 4, 2, 24
SMALL = dict(
    vocab_size=96, hidden_size=HIDDEN, intermediate_size=40, ffn_dim=40, num_hidden_layers=2,
    num_attention_heads=HEADS, num_key_value_heads=KV, head_dim=DIM, max_position_embeddings=64,
    num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=24, shared_expert_intermediate_size=32, n_shared_experts=1, n_group=1,
    topk_group=1, first_k_dense_replace=1, moe_num_experts=4, moe_k=2, moe_num_shared_experts=1,
    moe_layer_start_index=1, shared_intermediate_size=28, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, word_embed_proj_dim=HIDDEN,
)  # fmt: skip
# The heads have another width than hidden / heads, but for these classes, which cannot.
NO_HEAD_DIM = {"gpt_neox", "helium", "opt", "phi", "phi3", "starcoder2", "granitemoe",
               "granitemoeshared"}  # fmt: skip


def tiny(kind: str):
    """A random model in which no norm, bias or scale is neutral."""
    known = transformers.CONFIG_MAPPING[kind]()
    settings = {k: v for k, v in SMALL.items() if hasattr(known, k)}
    if kind in NO_HEAD_DIM:
        settings["head_dim"] = HIDDEN // HEADS
    for name in ("layer_types", "mlp_layer_types"):
        if types := getattr(known, name, None):
            settings[name] = (list(dict.fromkeys(types)) * 2)[:2]
    config = transformers.CONFIG_MAPPING[kind](**settings)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(torch.rand_like(p) + 0.5 if "norm" in name else torch.randn_like(p) * 0.2)
            elif p.ndim > 1:
                p.copy_(torch.randn_like(p) * (p.shape[-1] ** -0.5))
    return model


def shapes(tensors):
    return {name: list(t.shape) for name, t in tensors.items()}


def fold(tensors, edges: FoldEdges, rng):
    """The tensors with a random order in every place where the edges allow one."""
    out = {name: t.clone() for name, t in tensors.items()}
    stream = torch.from_numpy(rng.permutation(HIDDEN))
    for name in edges.columns:
        out[name] = out[name][..., stream]
    for name in edges.rows:
        axis = max(out[name].ndim - 2, 0)
        out[name] = out[name].index_select(axis, stream)

    def part(place):
        name, expert = split_expert(place)
        return out[name] if expert is None else out[name][expert]

    for matrix, edge in edges.edges.items():
        name, expert = split_expert(matrix)
        name = f"{name}.weight" if f"{name}.weight" in out else name
        reader = out[name] if expert is None else out[name][expert]
        if edge.heads is None:
            order = made = torch.from_numpy(rng.permutation(reader.shape[1]))
        else:
            h = edge.heads
            inner = np.stack([rng.permutation(h.dim) for _ in range(h.n_kv)])
            made = torch.from_numpy((inner + np.arange(h.n_kv)[:, None] * h.dim).reshape(-1))
            queries = np.repeat(inner, h.n_head // h.n_kv, axis=0)
            order = torch.from_numpy((queries + np.arange(h.n_head)[:, None] * h.dim).reshape(-1))
        reader.copy_(reader[:, order].clone())
        for r in edge.rows:
            rows = part(r.tensor)[r.start : r.stop]
            rows.copy_(rows[made].clone())
    return out


@pytest.mark.parametrize("kind", sorted(families()))
def test_a_folded_model_gives_the_same_logits(kind, tmp_path):
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    edges = edges_for(model.config.to_dict(), shapes(tensors))
    assert edges is not None
    check_edges(edges, shapes(tensors), {}, HIDDEN)
    folded = fold(tensors, edges, np.random.default_rng(7))
    save_file(folded, file, metadata={"format": "pt"})
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for each in (model, other):  # the other ways know no float64
        each.set_experts_implementation("eager")
    tokens = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.double()(tokens, use_cache=False).logits
        after = other.double().eval()(tokens, use_cache=False).logits
    assert float(before.std()) > 0.05
    # float64, but transformers' norms and routers work in float32 whatever the weights are.
    torch.testing.assert_close(after, before, rtol=1e-3, atol=5e-5 * float(before.abs().max()))
    # Something of every kind has moved, and what stood still is what every order leaves alone.
    roles = {edges.role(name.removesuffix(".weight")) for name in tensors if name not in edges.rows}
    assert "residual" in roles
    assert ({e.heads is None for e in edges.edges.values()} == {True, False}) == (
        kind != "gpt_neox"
    )
    still = {n.partition(".layers.")[2].partition(".")[2] for n, t in tensors.items()
             if torch.equal(t, folded[n])} - {""}  # fmt: skip
    left = ("norm", "q_proj.bias", "k_proj.bias", "query_key_value.bias", "act_fn", "correction")
    assert all(any(word in name for word in left) for name in still), still


def test_json_comes_back_as_it_was():
    edges = FoldEdges(
        ("embed",), ("norm.weight",),
        {"a.o": Edge((Rows("a.v.weight", 8, 24),), Heads(4, 2, 8)),
         "a.down[3]": Edge((Rows("a.gate_up[3]", 0, 5), Rows("a.gate_up[3]", 5, 10)))},
    )  # fmt: skip
    assert FoldEdges.from_json(json.loads(json.dumps(edges.to_json()))) == edges
    assert [edges.role(m) for m in ("embed", "a.o", "a.down[3]", "a.q")] == [
        "residual", "heads", "free", "none",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f.pop("columns"), "fold.columns"),
        (lambda f: f["rows"].append(3), "fold.rows[1]"),
        (lambda f: f["edges"]["o"].pop("rows"), "fold.edges.o.rows"),
        (lambda f: f["edges"]["o"]["rows"][0].pop(), "fold.edges.o.rows[0][2]"),
        (lambda f: f["edges"]["o"]["rows"][0].append(1), "fold.edges.o.rows[0]"),
        (lambda f: f["edges"]["o"].update(heads=[4, 0, 8]), "fold.edges.o.heads[1]"),
        (lambda f: f["edges"]["o"].update(heads=[4, 2]), "fold.edges.o.heads"),
    ],
)
def test_a_manifest_that_is_no_fold_is_refused(change, said):
    value = FoldEdges(("e",), ("n",), {"o": Edge((Rows("v", 0, 16),), Heads(4, 2, 8))}).to_json()
    change(value)
    with pytest.raises(PT2Error, match=r"manifest\.json") as e:
        FoldEdges.from_json(value)
    assert said in str(e.value)


SHAPES = {"e": [9, 32], "n": [32], "v": [16, 32], "o": [32, 32], "up": [2, 48, 32], "x": [1] * 4}
GOOD = dict(
    columns=("e", "v", "up"),
    rows=("n", "o"),
    edges={"o": Edge((Rows("v", 0, 16),), Heads(4, 2, 8)), "d[1]": Edge((Rows("up[1]", 0, 48),))},
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"columns": ("gone",)}, "names gone"),
        ({"columns": ("x",)}, "names x"),
        ({"columns": ("n",)}, "columns of n"),
        ({"rows": ("v",)}, "rows of v"),
        ({"edges": {"o": Edge((Rows("gone", 0, 16),))}}, "folds into gone"),
        ({"edges": {"o": Edge((Rows("up", 0, 48),))}}, "another shape"),
        ({"edges": {"d[1]": Edge((Rows("up[2]", 0, 48),))}}, "another shape"),
        ({"edges": {"d[1]": Edge((Rows("up[1]", 1, 49),))}}, "rows that up"),
        ({"edges": {"d[1]": Edge((Rows("up[1]", 0, 47),))}}, "into 47 rows"),
        ({"edges": {"o": Edge((Rows("v", 0, 16),), Heads(4, 3, 8))}}, "4 heads over 3"),
        ({"edges": {"o": Edge((Rows("v", 0, 16),), Heads(2, 2, 8))}}, "columns of its heads"),
        ({"edges": {"o": Edge((Rows("o", 0, 32),))}}, "follow two orders"),
        ({"edges": {"a": Edge((Rows("v", 0, 9),)), "b": Edge((Rows("v", 8, 16),))}}, "two orders"),
    ],
)
def test_a_fold_that_does_not_fit_the_model_is_refused(change, said):
    matrices = {"o": 32, "d[1]": 48}
    check_edges(FoldEdges(**GOOD), SHAPES, matrices, 32)
    with pytest.raises(PT2Error, match="fold") as e:
        check_edges(FoldEdges(**{**GOOD, **change}), SHAPES, matrices, 32)
    assert said in str(e.value)


def test_what_no_family_names_has_no_edges():
    model = {"model.embed_tokens.weight": [9, 32], "model.norm.weight": [32]}
    assert edges_for({"model_type": "llama"}, model) is not None
    assert edges_for({"model_type": "gpt9"}, model) is None
    assert edges_for({"model_type": "llama"}, {**model, "model.adapter.weight": [4, 32]}) is None


def test_an_attention_of_unknown_layout_has_no_order_within_heads():
    tensors = {f"model.layers.0.self_attn.{n}_proj.weight": [32, 32] for n in "qkvo"}
    known = {"model_type": "llama", "num_attention_heads": 4}
    o = "model.layers.0.self_attn.o_proj"
    found = edges_for(known, tensors)
    assert found is not None and found.edges[o].heads == Heads(4, 4, 8)
    for settings in ({"num_attention_heads": 5}, {"head_dim": 16}, {"num_attention_heads": None}):
        found = edges_for({**known, **settings}, tensors)
        assert found is not None and found.role(o) == "none"


def test_the_howto_shows_a_file_as_it_is():
    root = Path(__file__).parents[1]
    page = (root / "docs/howto/architecture.md").read_text(encoding="utf-8")
    file = (root / "pt2_core/model/folds/opt.py").read_text(encoding="utf-8")
    assert f"```python\n{file}```" in page


def test_a_family_is_short():
    folder = Path(__file__).parents[1] / "pt2_core" / "model" / "folds"
    found = [p for p in folder.glob("*.py") if p.stem not in ("__init__", "family")]
    assert len(found) > 5
    assert all(p.read_text(encoding="utf-8").count("\n") < 40 for p in found)
