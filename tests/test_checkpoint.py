"""One reading of a model's folder: what counts, what is left out and named, what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantize_support import tiny_model, token_file
from safetensors.torch import load_file, save_file

from pt2_core.errors import PT2Error
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.model.settings import read_config
from pt2_core.model.tied_tables import EMBEDDING, HEAD
from pt2_core.model.widths import width_problem
from quantize.config import Config
from quantize.evaluate import perplexity
from quantize.model.streamed import StreamedModel
from quantize.plan import make_plan

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> dict[str, Any]:
    folder = tiny_model(tmp_path_factory.mktemp("checkpoint") / "m", num_hidden_layers=2)
    config = json.loads((folder / "config.json").read_text())
    return {"config": config, "tensors": load_file(folder / SINGLE)}


@pytest.fixture
def folder(template, tmp_path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    save(path / SINGLE, template["tensors"])
    (path / "config.json").write_text(json.dumps(template["config"]))
    return path


def save(path: Path, tensors: dict[str, Any]) -> None:
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path)


def config(folder: Path, **changes: Any) -> None:
    value = json.loads((folder / "config.json").read_text())
    value.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in value.items() if v != "gone"}))


def tensors(folder: Path, **changes: Any) -> None:
    value = {**load_file(folder / SINGLE), **changes}
    save(folder / SINGLE, {k: v for k, v in value.items() if v is not None})


def shards(folder: Path, stem: str = "model", count: int = 2) -> dict[str, str]:
    """Turn the single file into shards; tensor name -> file."""
    value = load_file(folder / SINGLE)
    home = {n: f"{stem}-{i % count + 1:05d}-of-{count:05d}.safetensors"
            for i, n in enumerate(sorted(value))}  # fmt: skip
    for file in set(home.values()):
        save(folder / file, {n: value[n] for n, f in home.items() if f == file})
    (folder / SINGLE).unlink()
    return home


def index(folder: Path, home: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": home}))


def refused(folder: Path, words: str) -> None:
    with pytest.raises(PT2Error, match=words) as error:
        StreamedModel(Checkpoint.open(folder))
    assert "\n" not in str(error.value)
    assert "download" not in str(error.value) or "16-bit" not in str(error.value)


# Files --------------------------------------------------------------------------------------------


def copied(folder: Path, *names: str) -> None:
    data = (folder / SINGLE).read_bytes()
    for name in names:
        (folder / name).write_bytes(data)


@pytest.mark.parametrize(
    "others", [["model_old.safetensors"], ["consolidated.safetensors"],
               ["a.safetensors", "b.safetensors"], ["model-00001-of-00002.safetensors"],
               ["pytorch_model.safetensors"]],
)  # fmt: skip
def test_other_files_beside_the_model_are_ignored_and_named(folder, others):
    copied(folder, *others)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.shards == [SINGLE]
    assert all(any(name in note for note in checkpoint.notes) for name in others)


def test_consolidated_and_old_sets_beside_shards_are_ignored(folder):
    copied(folder, "consolidated.safetensors")
    shards(folder)
    (folder / "old-00001-of-00002.safetensors").write_bytes(b"")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.shards == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert "consolidated" in checkpoint.notes[0] and "old-00001" in checkpoint.notes[0]


@pytest.mark.parametrize("name", ["pytorch_model", "weights", "model.fp16"])
def test_a_single_file_of_another_name_counts(name, folder):
    (folder / SINGLE).rename(folder / f"{name}.safetensors")
    assert Checkpoint.open(folder).shards == [f"{name}.safetensors"]


def test_several_files_without_an_index_are_refused(folder):
    copied(folder, "one.safetensors", "two.safetensors")
    (folder / SINGLE).unlink()
    refused(folder, "several sets of weights")


def test_a_config_that_names_other_weights_is_refused(folder):
    copied(folder, "other.safetensors")
    config(folder, transformers_weights="other.safetensors")
    refused(folder, "names 'other.safetensors' as the weights")
    config(folder, transformers_weights=SINGLE)
    assert Checkpoint.open(folder).shards == [SINGLE]


def test_an_incomplete_set_names_the_missing_file(folder):
    shards(folder, count=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, "lacks file 2 of 3")


def test_an_index_and_a_single_file_of_different_models_are_refused(folder):
    copied(folder, "keep.bin")
    index(folder, shards(folder))
    (folder / "keep.bin").rename(folder / SINGLE)
    refused(folder, "two models")


def test_an_index_whose_files_are_gone_gives_way_to_the_single_file(folder):
    index(folder, {"model.norm.weight": "model-00001-of-00009.safetensors"})
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.shards == [SINGLE] and INDEX in checkpoint.notes[0]


def test_what_a_shard_holds_counts_and_what_none_holds_is_refused(folder):
    home = shards(folder)
    index(folder, {n: f for n, f in home.items() if n != "model.norm.weight"})
    checkpoint = Checkpoint.open(folder)
    assert "model.norm.weight" in checkpoint.tensors and "model.norm" in checkpoint.notes[0]
    index(folder, {**home, "model.layers.9.extra.weight": home[HEAD]})
    refused(folder, "names model.layers.9.extra.weight")
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    index(folder, {**home, buffer: home[HEAD]})
    assert buffer in Checkpoint.open(folder).notes[0]
    index(folder, {**home, "x": "../elsewhere.safetensors"})
    refused(folder, "no file of this folder")


def test_a_tensor_in_two_files_is_refused(folder):
    home = shards(folder)
    last = folder / "model-00002-of-00002.safetensors"
    save(last, {**load_file(last), "model.norm.weight": torch.ones(128)})
    first = folder / "model-00001-of-00002.safetensors"
    save(first, {**load_file(first), "model.norm.weight": torch.ones(128)})
    index(folder, home)
    refused(folder, "model.norm.weight twice")


# Tensors ------------------------------------------------------------------------------------------

LAYER = "model.layers.0.self_attn.q_proj"
SMALL = torch.zeros(4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (f"{LAYER}.qweight", torch.zeros(4, 4, dtype=torch.int32)),
        (f"{LAYER}.scales", SMALL), (f"{LAYER}.weight_scale", SMALL),
        (f"{LAYER}.weight_scale_inv", SMALL), (f"{LAYER}.weight.absmax", SMALL),
        (f"{LAYER}.weight.quant_state.bitsandbytes__nf4", torch.zeros(4, dtype=torch.uint8)),
        (f"{LAYER}.SCB", SMALL), (f"{LAYER}.weight_packed", torch.zeros(4, dtype=torch.int32)),
        (f"{LAYER}.input_scale", SMALL), ("model.layers.0.mlp.down_proj_blocks", SMALL),
        (f"{LAYER}.anything", torch.zeros(4, dtype=torch.uint8).view(torch.float8_e8m0fnu)),
        (f"{LAYER}.weight", torch.zeros(128, 128).to(torch.float8_e5m2)),
        (f"{LAYER}.weight", torch.zeros(128, 128, dtype=torch.int8)),
    ],
)  # fmt: skip
def test_remains_of_a_quantiser_ask_for_the_16_bit_model(name, value, folder):
    tensors(folder, **{name: value})
    refused(folder, "already quantised .*16-bit model")


def test_packed_types_of_the_format_are_known(folder):
    """F4 and F6 have no whole bytes; a header with them is judged, not called damaged."""
    header = {"w": {"dtype": "F4", "shape": [4, 4], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    refused(folder, "already quantised .*F4")


@pytest.mark.parametrize(
    "name", [f"{LAYER}.lora_A.default.weight", f"base_model.{LAYER}.lora_B.weight",
             f"{LAYER}.base_layer.weight", f"{LAYER}.lora_magnitude_vector.weight",
             "model.layers.0.adapter.down.weight"],
)  # fmt: skip
def test_parts_of_an_adapter_ask_for_merging(name, folder):
    tensors(folder, **{name: SMALL})
    refused(folder, "adapter .*merge it")


def test_a_folder_with_an_adapter_alone_asks_for_merging(folder):
    (folder / SINGLE).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "is an adapter, not a model: merge it")
    (folder / "config.json").unlink()
    refused(folder, "is an adapter, not a model: merge it")


@pytest.mark.parametrize(
    "name", ["v_head.summary.weight", "score.weight", "classifier.out.bias", "reward_head.weight",
             f"{LAYER.rpartition('.')[0]}.rotary_emb.inv_freq", "model.rotary_emb.inv_freq",
             "some_other_head.weight"],
)  # fmt: skip
def test_heads_of_other_tasks_and_buffers_are_dropped_and_named(name, folder):
    tensors(folder, **{name: SMALL})
    model = StreamedModel(Checkpoint.open(folder))
    assert name in model.checkpoint.dropped and name not in model.checkpoint.tensors
    assert any(name in note for note in model.checkpoint.notes)
    assert name not in model.checkpoint.identity("")["tensors"]


def test_position_ids_are_dropped_although_they_are_integers(folder):
    tensors(folder, **{"model.embeddings.position_ids": torch.arange(4)})
    assert "model.embeddings.position_ids" in Checkpoint.open(folder).dropped


def test_a_tensor_that_the_class_does_not_use_within_the_model_is_refused(folder):
    config(folder, attention_bias=False)
    refused(folder, r"_proj\.bias, which LlamaForCausalLM .*does not use")


@pytest.mark.parametrize("said", [1, 3])
def test_another_number_of_blocks_than_the_files_hold_is_refused_with_both(said, folder):
    config(folder, num_hidden_layers=said)
    refused(folder, f"num_hidden_layers {said}, but the files hold 2 decoder blocks")


def test_a_missing_block_is_named(folder):
    tensors(folder, **{n: None for n in load_file(folder / SINGLE) if "layers.0" in n})
    refused(folder, "model.layers.0 is missing")


def test_shapes_are_compared_with_the_class_before_any_weight_is_read(folder):
    config(folder, vocab_size=97)
    refused(folder, r"embed_tokens.weight .* has shape \[96, 128\].* \[97, 128\]")


# Ties ---------------------------------------------------------------------------------------------


def test_a_tied_flag_with_an_equal_head_drops_it(folder):
    config(folder, tie_word_embeddings=True)
    tensors(folder, **{HEAD: load_file(folder / SINGLE)[EMBEDDING]})
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tied and HEAD in checkpoint.dropped and HEAD not in checkpoint.tensors
    tensors(folder, **{HEAD: load_file(folder / SINGLE)[EMBEDDING].float()})
    assert Checkpoint.open(folder).tied


@pytest.mark.parametrize("flag", [True, False, "gone"])
def test_ties_are_those_of_transformers(flag, folder):
    """The head's logits by our reading and by transformers' own loading of the folder."""
    import transformers

    config(folder, tie_word_embeddings=flag)
    checkpoint = Checkpoint.open(folder)
    assert not checkpoint.tied and checkpoint.settings["tie_word_embeddings"] is False
    assert any("tie_word" in n for n in checkpoint.notes) == (flag is True)
    tokens = torch.arange(24)[None]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    nll = torch.nn.functional.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:])
    assert perplexity(folder, tokens).perplexity == pytest.approx(nll.exp().item(), rel=1e-4)


def test_no_head_and_no_tie_is_refused_at_once(folder):
    tensors(folder, **{HEAD: None})
    for flag in (False, "gone"):
        config(folder, tie_word_embeddings=flag)
        refused(folder, "no tensor lm_head.weight")
    config(folder, tie_word_embeddings="yes")
    refused(folder, "must be true or false")
    config(folder, tie_word_embeddings=True)
    assert Checkpoint.open(folder).tied


# Settings -----------------------------------------------------------------------------------------


def test_a_leftover_quantization_config_is_dropped_and_named(folder):
    config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    model = StreamedModel(Checkpoint.open(folder))
    assert "quantization_config" not in model.checkpoint.settings
    assert "quantization_config" in model.checkpoint.notes[0]
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize("key", ["pad_token_id", "bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", [-1, 96, 10**9])
def test_token_ids_outside_of_the_vocabulary_are_dropped_and_named(key, value, folder):
    config(folder, **{key: value})
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.settings[key] is None and f"{key} {value}" in checkpoint.notes[0]
    config(folder, **{key: [5, value]})
    assert Checkpoint.open(folder).settings[key] == [5]


def test_a_missing_model_type_is_that_of_the_architecture(folder):
    config(folder, model_type="gone")
    model = StreamedModel(Checkpoint.open(folder))
    assert model.config.model_type == "llama" and "model_type" in model.checkpoint.notes[0]
    config(folder, model_type="mistral")
    refused(folder, "do not belong together")


def test_a_number_of_heads_that_the_files_lack_is_transformers_default(tmp_path):
    """Mistral's is 8, whatever the number of heads; llama.cpp would take all of them."""
    folder = tiny_model(tmp_path / "m", "Mistral", num_attention_heads=16, num_key_value_heads=8)
    config(folder, num_key_value_heads="gone")
    checkpoint = Checkpoint.open(folder)
    StreamedModel(checkpoint)
    assert checkpoint.settings["num_key_value_heads"] == 8
    assert checkpoint.filled == {"num_key_value_heads": 8}
    assert "num_key_value_heads: 8" in checkpoint.notes[0]
    other = Checkpoint.open(folder)
    other.as_made(checkpoint.identity("x"))
    assert other.settings == checkpoint.settings


def test_a_missing_head_dim_is_transformers_default_where_the_files_fit_it(tmp_path):
    """128, which is not the hidden size over the heads."""
    folder = tiny_model(tmp_path / "m", "Qwen3", num_hidden_layers=1, head_dim=128)
    config(folder, head_dim="gone")
    checkpoint = Checkpoint.open(folder)
    assert StreamedModel(checkpoint).config.head_dim == checkpoint.settings["head_dim"] == 128
    assert "head_dim" in checkpoint.notes[0]
    other = tiny_model(tmp_path / "n", "Qwen3", num_hidden_layers=1, head_dim=64)
    config(other, head_dim="gone")
    refused(other, "has shape")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_folder_that_asks_for_its_own_code_is_refused(name, folder):
    (folder / "tokenizer_config.json").write_text("{}")
    value = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**value, "auto_map": {"AutoTokenizer": "x.X"}}))
    refused(folder, "auto_map.*never run")


# Tokenizer ----------------------------------------------------------------------------------------


def sentencepiece(pieces: int = 3) -> bytes:
    piece = b"\x0a\x02ab\x15\x00\x00\x00\x00"
    return b"".join(b"\x0a" + bytes([len(piece)]) + piece for _ in range(pieces))


def test_tiktokens_tokenizer_model_is_left_out_beside_tokenizer_json(folder):
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    refused(folder, "tiktoken's, which is not read")
    (folder / "tokenizer.json").write_text("{}")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tokenizer_files == ["tokenizer.json"] and "tiktoken" in checkpoint.notes[0]
    (folder / "tokenizer.model").write_bytes(sentencepiece())
    assert "tokenizer.model" in Checkpoint.open(folder).tokenizer_files
    for damaged in (sentencepiece()[:-2], b"", b"\x00" * 40, b"version https://git-lfs.github"):
        (folder / "tokenizer.model").write_bytes(damaged)
        refused(folder, r"tokenizer.model is (damaged|a Git LFS)")


def test_the_fingerprint_knows_the_tokenizer(folder):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("t")
    (folder / "tokenizer.json").write_text("{}")
    seen = {Checkpoint.open(folder).fingerprint()[0]}
    for name, text in {"tokenizer.json": "{} ", "special_tokens_map.json": "{}",
                       "chat_template.jinja": "x",
                       "additional_chat_templates/tool.jinja": "u"}.items():  # fmt: skip
        (folder / name).write_text(text)
        seen.add(Checkpoint.open(folder).fingerprint()[0])
    (folder / "notes.txt").write_text("no part of the model")
    seen.add(Checkpoint.open(folder).fingerprint()[0])
    assert len(seen) == 5


# Widths -------------------------------------------------------------------------------------------


def test_widths_are_named_together_with_the_one_option_that_settles_them():
    small = {"q_proj": [576], "o_proj": [576], "gate_proj": [576], "down_proj": [1536]}
    for size, more in ((128, ""), (64, "--block-size 128 "), (256, "--block-size 128 ")):
        said = str(width_problem(small, size))
        assert "q_proj, o_proj, gate_proj (576 columns)" in said
        assert f"use {more}--skip 'q_proj|o_proj|gate_proj'" in said
    assert width_problem({"down_proj": [1536]}, 128) is None
    assert width_problem({"a": [384], "b": [768]}, 256) == (
        "blocks of 256 do not fit a (384 columns): use --block-size 128"
    )
    assert "--block-size 128" in str(width_problem({"a": [384]}, 64))
    assert width_problem({"a": [768]}, 64) is None
    assert "cannot be ternarised" in str(width_problem({"a": [576], "b": [320]}, 128))
    assert "--skip 'k_proj|q_proj'" in str(
        width_problem({"q_proj": [576], "down_proj": [256]}, 128, "k_proj")
    )


def test_a_width_that_no_type_holds_is_refused_before_the_work(tmp_path):
    folder = tiny_model(tmp_path / "m", intermediate_size=192, num_hidden_layers=1)
    model = StreamedModel(Checkpoint.open(folder))
    for size in (128, 64):
        with pytest.raises(PT2Error, match="--skip 'down_proj'"):
            make_plan(model, Config(block_size=size), strict=True)
    assert not make_plan(model, Config(skip="down_proj"), strict=True).by_need


# Before torch -------------------------------------------------------------------------------------

PROBE = """
import sys
from quantize.cli import main
code = main(sys.argv[1:])
loaded = [m for m in ("torch", "transformers") if m in sys.modules]
sys.exit(f"loaded {loaded}" if loaded else code)
"""


def quantise(folder: Path, tmp_path: Path, *options: str, said: str = "") -> Any:
    tokens = tmp_path / "ids.safetensors"
    text = token_file(tokens) if not tokens.exists() else f"{tokens}:calibration"
    argv = [str(folder), "-o", str(tmp_path / "out"), "--calibration", text, *options]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *argv], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("pt2-quantize: error: ") and said in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done


CHEAP: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
    "no folder": (lambda f: f.rename(f.parent / "gone"), [], "no model folder"),
    "output exists": (lambda f: (f.parent / "out").write_text("x"), [], "is a file"),
    "option": (lambda f: None, ["--damping", "99"], "damping"),
    "no text": (lambda f: None, ["--calibration", "none.txt"], "none.txt"),
    "no tokenizer": (lambda f: None, ["--calibration", "wikitext2"], "no tokenizer"),
    "no ids": (lambda f: None, ["--calibration", "none.safetensors:x"], "none.safetensors"),
    "quantised": (lambda f: tensors(f, **{f"{LAYER}.qweight": SMALL}), [], "16-bit"),
}


@pytest.mark.parametrize("case", CHEAP)
def test_cheap_refusals_come_before_torch(case, folder, tmp_path):
    change, options, said = CHEAP[case]
    change(folder)
    quantise(folder, tmp_path, *options, said=said)


def test_bfloat16_is_compared_by_value():
    """Two zeros of different sign are one value, as they are to transformers."""
    from pt2_core.model.tied_tables import _float

    bits = np.array([0x8000, 0x3F80], np.uint16)
    assert _float(bits, "BF16").tolist() == [0.0, 1.0]


def test_floats_that_json_has_not_are_read_as_transformers_writes_them(tmp_path):
    limit = {"time_step_limit": [0.0, {"__float__": "Infinity"}], "other": {"__float__": 1, "a": 2}}
    (tmp_path / "config.json").write_text(json.dumps(limit))
    assert read_config(tmp_path) == {"time_step_limit": [0.0, math.inf], "other": limit["other"]}
