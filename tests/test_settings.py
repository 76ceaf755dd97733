"""The table of settings that llama.cpp's graphs have: complete, and right about what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from export import converter_metadata
from export.converter_metadata import with_older_names
from export.settings import COMMON, GRAPHS, TABLES, Unsupported, examine, judge

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "vocab_size": 96,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LONG = {
    "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 256,
    "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
}  # fmt: skip


def config(kind: str, **changes):
    settings = {**SMALL, **({"head_dim": 16} if kind == "qwen3" else {}), **changes}
    if "rope_parameters" in settings:
        settings["rope_parameters"] = {"rope_theta": 10000.0, **settings["rope_parameters"]}
    return getattr(transformers, f"{FAMILIES[kind]}Config")(**settings)


def tried(kind: str, max_context: int = 0, **changes) -> list[str]:
    value = config(kind, **changes).to_dict()
    findings, _ = examine(value)
    return judge(findings, value["max_position_embeddings"], max_context)


@pytest.mark.parametrize("kind", TABLES)
def test_every_field_of_the_config_class_is_classed(kind):
    made = config(kind)
    fields = {f.name for f in dataclasses.fields(made)} if dataclasses.is_dataclass(made) else set()
    known = {*COMMON, *TABLES[kind]}
    assert {*fields, *made.to_dict()} - known == set()
    assert {*TABLES} == {*GRAPHS} == {*FAMILIES}


@pytest.mark.parametrize("kind", TABLES)
def test_a_plain_model_has_nothing_to_refuse(kind):
    assert tried(kind) == []
    assert examine(config(kind).to_dict(), config(kind).to_dict())[1] == []


NEVER = {
    "relu": ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
    "gelu": ("qwen2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "gelu_tanh": ("mistral", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act"),
    "bias": ("qwen3", {"attention_bias": True}, "attention_bias is True"),
    "beta_fast": ("llama", {"rope_parameters": {**YARN, "beta_fast": 16}}, "beta_fast is 16"),
    "beta_slow": ("qwen2", {"rope_parameters": {**YARN, "beta_slow": 2}}, "beta_slow is 2"),
    "truncate": ("qwen3", {"rope_parameters": {**YARN, "truncate": False}}, "truncate is False"),
    "part of a head": (
        "llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor is 0.5",
    ),
    "llama3 on qwen2": (
        "qwen2",
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 256}},
        "rope_type is 'llama3'",
    ),
    "longrope on qwen3": ("qwen3", {"rope_parameters": LONG}, "rope_type is 'longrope'"),
    "proportional": (
        "llama", {"rope_parameters": {"rope_type": "proportional", "factor": 2.0}}, "proportional"
    ),
    "another kind of layer": (
        "qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"
    ),
    "wide heads": ("qwen2", {"head_dim": 32}, "head_dim is 32"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEVER)
def test_what_the_graph_does_not_compute_is_refused_by_name(name):
    kind, changes, said = NEVER[name]
    for limit in (0, 8):
        with pytest.raises(Unsupported, match=r".") as e:
            tried(kind, limit, **changes)
        assert said in str(e.value) and "--max-context" not in str(e.value)


WITHIN = {
    "mistral": ("mistral", {"sliding_window": 64}, 64),
    "qwen2": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1}, 100
    ),
    "qwen3 by layer": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 32,
         "layer_types": ["sliding_attention", "full_attention"]},
        32,
    ),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, 1024),
    "longrope": ("mistral", {"sliding_window": None, "rope_parameters": LONG}, 256),
}  # fmt: skip


@pytest.mark.parametrize("name", WITHIN)
def test_what_matters_beyond_some_tokens_is_accepted_with_max_context(name):
    kind, changes, within = WITHIN[name]
    if name == "dynamic":
        with pytest.raises(Unsupported, match=f"--max-context {within}$"):
            tried(kind, **changes)
        assert f"up to {within} tokens" in tried(kind, within, **changes)[0]
    elif within < SMALL["max_position_embeddings"]:
        with pytest.raises(Unsupported, match=f"--max-context {within}$"):
            tried(kind, **changes)
        with pytest.raises(Unsupported, match=f"up to {within} tokens"):
            tried(kind, within + 1, **changes)
        assert f"up to {within} tokens" in tried(kind, within, **changes)[0]
    else:
        assert tried(kind, **changes) == []


def test_a_window_that_is_not_used_is_no_hindrance():
    assert tried("mistral", sliding_window=None) == tried("mistral", sliding_window=4096) == []
    assert tried("qwen2", sliding_window=64, use_sliding_window=False) == []


def test_settings_that_no_table_knows_are_named():
    raw = [*config("llama").to_dict(), "logit_scale"]
    _, unknown = examine(config("llama").to_dict(), raw)
    assert unknown == ["logit_scale"]
    kept, notes = converter_metadata.settings(
        {**config("llama").to_dict(), "logit_scale": 2.0, "num_experts": 8}, raw, 256
    )
    assert "logit_scale" in notes[0]
    # Transformers does not read these, so the converter must not either.
    assert "num_experts" not in kept and kept["max_position_embeddings"] == 256


@pytest.mark.parametrize(
    "rope",
    [
        YARN, {**YARN, "attention_factor": 1.0}, {**YARN, "attention_factor": 1.5},
        {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0}, {**YARN, "mscale": 0.707},
        {**YARN, "factor": 0.5}, LONG, {**LONG, "attention_factor": 1.25}, {**LONG, "factor": 0.5},
        {"rope_type": "linear", "factor": 4.0, "attention_factor": 3.0}, {"rope_type": "default"},
    ],
)  # fmt: skip
def test_the_factor_on_cos_and_sin_is_that_of_transformers(rope):
    made = config("llama", rope_parameters=rope)
    kind = made.rope_parameters["rope_type"]
    theirs = 1.0
    if kind in ROPE_INIT_FUNCTIONS:
        theirs = ROPE_INIT_FUNCTIONS[kind](made, torch.device("cpu"))[1]
    ours = converter_metadata.attention_factor(made.rope_parameters, 1024)
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_the_converter_gets_settings_under_the_names_of_the_published_files():
    saved = {"model_type": "gpt_neox", "max_position_embeddings": 512, "text_config": {"a": 1},
             "rope_parameters": {"partial_rotary_factor": 0.25}}  # fmt: skip
    published = {"scoring_func": "sigmoid", "max_position_embeddings": 7, "text_config": {"b": 2}}
    found = with_older_names(saved, published)
    assert found["rotary_pct"] == 0.25 and found["n_ctx"] == found["max_position_embeddings"] == 512
    assert found["scoring_func"] == "sigmoid" and found["text_config"] == {"a": 1, "b": 2}
    hybrid = {"model_type": "granitemoehybrid", "layer_types": ["linear_attention", "x"]}
    assert with_older_names(hybrid, {})["layer_types"] == ["mamba", "x"]
