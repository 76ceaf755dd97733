"""The fold is exact: a model with every kind of order folded gives the logits it gave before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from export_support import FAMILIES, foldable_orders, linears, make_model

from export.fold import dense_plan, fold_plan
from pt2_core.errors import PT2Error
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.model.fold_edges import edges_for

SETTINGS = {"model_type": "llama", "num_attention_heads": 4}


def tensors_of(hidden=32, ffn=48):
    rows = {"k_proj": 16, "v_proj": 16, "gate_proj": ffn, "up_proj": ffn}
    shapes = {n: [64, hidden] for n in ("model.embed_tokens.weight", "lm_head.weight")}
    shapes |= {"model.norm.weight": [hidden], "model.layers.0.input_layernorm.weight": [hidden]}
    for m in linears({"num_hidden_layers": 1}):
        kind = m.rpartition(".")[2]
        shapes[f"{m}.weight"] = [rows.get(kind, hidden), ffn if kind == "down_proj" else hidden]
    return shapes


def plan_of(residual, orders, tensors=None):
    tensors = tensors or tensors_of()
    places = {m: f"{m}.weight" for m in orders}
    return fold_plan(edges_for(SETTINGS, tensors), tensors, places, residual, orders)


def orders_of(hidden=32, ffn=48):
    identity = np.arange(hidden, dtype=np.int32)
    orders = {m: identity for m in linears({"num_hidden_layers": 1})}
    orders["model.layers.0.mlp.down_proj"] = np.arange(ffn, dtype=np.int32)
    return identity, orders


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_folded_model_gives_the_same_logits(family, tied, tmp_path):
    folder = make_model(tmp_path / family, family, tied=tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokens = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens).logits
        residual, orders = foldable_orders(folder)
        tensors = {k: list(v.shape) for k, v in model.state_dict().items()}
        edges = edges_for(Checkpoint.open(folder).settings, tensors)
        places = {m: f"{m}.weight" for m in orders}
        plan = dense_plan(fold_plan(edges, tensors, places, residual, orders), places, orders)
        folded = {k: torch.from_numpy(plan.apply(k, v.numpy().copy()))
                  for k, v in model.state_dict().items()}  # fmt: skip
        moved = [k for k, v in model.state_dict().items() if not torch.equal(v, folded[k])]
        if tied:
            del folded["lm_head.weight"]
        model.load_state_dict(folded, strict=not tied)
        after = model(tokens).logits
    # All that has an order moved, and only the per-head norms and q, k biases did not.
    still = [k for k in folded if k not in moved]
    assert all(".q_norm." in k or ".k_norm." in k or k.endswith(("q_proj.bias", "k_proj.bias"))
               for k in still), still  # fmt: skip
    assert float(before.std()) > 0.1
    # float64, but transformers' RMSNorm works in float32 whatever the weights are.
    torch.testing.assert_close(after, before, rtol=1e-4, atol=2e-5)


def test_natural_order_needs_no_fold_and_no_known_names():
    residual, orders = orders_of()
    plan = fold_plan(None, {"anything.at.all": [3]}, {}, residual, orders)
    assert not plan.rows and not plan.cols


def test_kept_linears_are_folded_in_their_columns_too():
    residual, orders = orders_of()
    residual = residual[::-1].copy()
    kept = "model.layers.0.self_attn.q_proj"
    for m in orders:
        if not m.endswith(("down_proj", "o_proj")):
            orders[m] = residual
    del orders[kept]
    plan = plan_of(residual, orders)
    assert np.array_equal(plan.cols[f"{kept}.weight"], residual)
    assert "model.layers.0.self_attn.k_proj.weight" not in plan.cols


@pytest.mark.parametrize(
    ("module", "change", "said"),
    [
        ("self_attn.k_proj", lambda o: np.roll(o, 1), "column order of its own"),
        ("mlp.up_proj", lambda o: np.roll(o, 1), "column order of its own"),
        ("self_attn.o_proj", lambda o: np.roll(o, 1), "one head to another"),
        ("self_attn.o_proj", lambda o: swap(o, 0, 1), "share a key-value head differently"),
        ("mlp.down_proj", lambda o: np.zeros_like(o), "not a permutation"),
    ],
)
def test_orders_that_cannot_be_folded_are_refused(module, change, said):
    residual, orders = orders_of()
    name = f"model.layers.0.{module}"
    orders[name] = change(orders[name].copy())
    with pytest.raises(PT2Error, match=said) as e:
        plan_of(residual, orders)
    assert said == "not a permutation" or "--order foldable" in str(e.value)


def test_one_order_for_the_heads_of_a_group_is_accepted():
    residual, orders = orders_of()
    name = "model.layers.0.self_attn.o_proj"
    orders[name] = swap(swap(orders[name].copy(), 0, 1), 8, 9)
    plan = plan_of(residual, orders)
    v = plan.rows["model.layers.0.self_attn.v_proj.weight"]
    assert v.tolist() == [1, 0, *range(2, 16)]


def test_an_order_that_nothing_is_known_to_fold_is_refused():
    residual, orders = orders_of()
    turned = residual[::-1].copy()
    with pytest.raises(PT2Error, match=r"residual stream has an order.*--order none"):
        fold_plan(None, tensors_of(), {}, turned, orders)
    with pytest.raises(PT2Error, match=r"fc1 has a column order of its own, which nothing folds"):
        plan_of(residual, {**orders, "model.layers.0.fc1": turned})


def test_the_orders_of_experts_fold_into_their_own_rows():
    """Each expert of a tensor of three dimensions has an order of its own."""
    moe = "model.layers.0.block_sparse_moe."
    tensors = {moe + "input_linear.weight": [3, 8, 4], moe + "output_linear.weight": [3, 4, 4]}
    edges = edges_for({"model_type": "granitemoe"}, tensors)
    rng = np.random.default_rng(0)
    names = [f"{moe}output_linear[{e}]" for e in range(3)]
    orders = {n: rng.permutation(4).astype(np.int32) for n in names}
    places = {n: n.replace("[", ".weight[") for n in names}
    identity = np.arange(4, dtype=np.int32)
    plan = dense_plan(fold_plan(edges, tensors, places, identity, orders), places, orders)
    x = rng.normal(size=4)
    up, down = (rng.normal(size=tensors[n]) for n in tensors)
    folded_up, folded_down = (plan.apply(n, t) for n, t in zip(tensors, (up, down), strict=True))
    assert not np.array_equal(up, folded_up)
    for e in range(3):
        for u, d in ((up[e], down[e]), (folded_up[e], folded_down[e])):
            made = d @ (np.maximum(u[:4] @ x, 0) * (u[4:] @ x))
            expected = down[e] @ (np.maximum(up[e][:4] @ x, 0) * (up[e][4:] @ x))
            np.testing.assert_allclose(made, expected)


def swap(order, i, j):
    order[[i, j]] = order[[j, i]]
    return order
