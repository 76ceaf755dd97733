"""The fold is exact: a model with every kind of order folded gives the logits it gave before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from export_support import FAMILIES, foldable_orders, linears, make_model

from export.fold import Heads, dense_plan, fold_plan
from pt2_core.errors import PT2Error
from pt2_core.model.checkpoint import Checkpoint

HEADS = Heads(n_head=4, n_kv=2, dim=8)


def tensors_of(hidden=32):
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    config = {"num_hidden_layers": 1}
    names += [f"{m}.weight" for m in linears(config)]
    return [*names, "model.layers.0.input_layernorm.weight"]


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
        heads = Heads.from_config(Checkpoint.open(folder).settings)
        plan = dense_plan(fold_plan(model.state_dict(), heads, residual, orders), orders)
        folded = {k: plan.apply(k, v.clone()) for k, v in model.state_dict().items()}
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
    plan = fold_plan(["anything.at.all"], HEADS, residual, orders)
    assert not plan.rows and not plan.cols


def test_kept_linears_are_folded_in_their_columns_too():
    residual, orders = orders_of()
    residual = residual[::-1].copy()
    kept = "model.layers.0.self_attn.q_proj"
    for m in orders:
        if not m.endswith(("down_proj", "o_proj")):
            orders[m] = residual
    del orders[kept]
    plan = fold_plan(tensors_of(), HEADS, residual, orders)
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
        fold_plan(tensors_of(), HEADS, residual, orders)
    assert said == "not a permutation" or "--order foldable" in str(e.value)


def test_one_order_for_the_heads_of_a_group_is_accepted():
    residual, orders = orders_of()
    name = "model.layers.0.self_attn.o_proj"
    orders[name] = swap(swap(orders[name].copy(), 0, 1), 8, 9)
    plan = fold_plan(tensors_of(), HEADS, residual, orders)
    v = plan.rows["model.layers.0.self_attn.v_proj.weight"]
    assert v.tolist() == [1, 0, *range(2, 16)]


def test_a_tensor_of_unknown_role_is_not_folded_past():
    residual, orders = orders_of()
    residual = residual[::-1].copy()
    orders = {m: residual if len(o) == 32 and "o_proj" not in m else o for m, o in orders.items()}
    with pytest.raises(PT2Error, match=r"experts.*--order none"):
        fold_plan([*tensors_of(), "model.layers.0.mlp.experts.weight"], HEADS, residual, orders)
    with pytest.raises(PT2Error, match=r"fc1.*role is unknown"):
        fold_plan(tensors_of(), HEADS, residual, {**orders, "model.layers.0.fc1": residual})


def test_heads_default_as_transformers_does():
    config = {"num_attention_heads": 8, "hidden_size": 64}
    assert Heads.from_config(config) == Heads(8, 8, 8)
    assert Heads.from_config({**config, "head_dim": 16, "num_key_value_heads": 2}).dim == 16
    with pytest.raises(PT2Error, match="num_attention_heads"):
        Heads.from_config({})


def swap(order, i, j):
    order[[i, j]] = order[[j, i]]
    return order
