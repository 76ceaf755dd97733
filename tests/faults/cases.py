"""The inputs by name. A name's letter and number are its kind; what follows, its member."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.faults.models import (
    EXAMPLES,
    bundled,
    edit_json,
    packaged_tokenizer,
    random_model,
    settings,
    tensors,
)

Maker = Callable[[Path], None]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.0.mlp.up_proj"


def cases(tokenizers: Path | None) -> dict[str, Maker]:
    """Name -> maker of the input in a folder that does not exist yet.

    Args:
        tokenizers: folder with unpacked npm packages of real tokenizers; None leaves these out.
    """
    return {
        **weight_files(), **ties(), **token_ids(tokenizers), **cards(), **leftovers(), **windows(),
        **ropes(), **biases_and_heads(), **templates(), **ranges(), **code(), **generation(),
        **tokenizers_of(tokenizers),
    }  # fmt: skip


def changed(**more: Any) -> Maker:
    """The bundled model with other settings."""

    def make(folder: Path) -> None:
        settings(bundled(folder), **more)

    return make


def made(family: str = "Llama", **more: Any) -> Maker:
    """A random model."""
    return lambda folder: void(random_model(folder, family, **more))


def void(_: object) -> None:
    """For makers that return what they made."""


def weight_files() -> dict[str, Maker]:
    """c01, c19 to c21: which files and tensors are the model."""

    def second_set(folder: Path) -> None:
        file = bundled(folder) / "model.safetensors"
        shutil.copy(file, folder / "model_old.safetensors")
        g = torch.Generator().manual_seed(3)
        tensors(folder, lambda d: {k: (torch.randn(v.shape, generator=g) * v.float().std()
                                       + (v.ndim == 1)).to(v.dtype) for k, v in d.items()},
                "model_old.safetensors")  # fmt: skip

    def more_blocks(folder: Path) -> None:
        settings(random_model(folder), num_hidden_layers=1)

    def value_head(folder: Path) -> None:
        more = {"v_head.summary.weight": torch.zeros(1, 256), "v_head.summary.bias": torch.zeros(1)}
        tensors(random_model(folder), lambda d: {**d, **more})

    def adapter(folder: Path) -> None:
        name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
        tensors(random_model(folder), lambda d: {**d, name: torch.zeros(8, 256)})

    def other_name(folder: Path) -> None:
        (bundled(folder) / "model.safetensors").rename(folder / "pytorch_model.safetensors")

    def short_index(folder: Path) -> None:
        shard = "model-00001-of-00001.safetensors"
        (bundled(folder) / "model.safetensors").rename(folder / shard)
        names = [n for n in load_file(folder / shard) if n != "model.norm.weight"]
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def consolidated(folder: Path) -> None:
        file = bundled(folder) / "model.safetensors"
        shutil.copy(file, folder / "consolidated.safetensors")

    def pickled(folder: Path) -> None:
        file = bundled(folder) / "model.safetensors"
        torch.save(load_file(file), folder / "pytorch_model.bin")
        file.unlink()

    return {
        "c01": second_set, "c19": more_blocks, "c20v": value_head, "c20lora": adapter,
        "c21name": other_name, "c21idx": short_index, "c21cons": consolidated, "c21bin": pickled,
        "c33": lambda f: settings(bundled(f), ("model_type",)),
    }  # fmt: skip


def ties() -> dict[str, Maker]:
    """c02, c03: whether embeddings and head are one table."""

    def with_head(change: Callable[[torch.Tensor], torch.Tensor]) -> Maker:
        return lambda f: tensors(bundled(f), lambda d: {**d, HEAD: change(d[EMBEDDING])})

    return {
        "c02a": with_head(torch.clone), "c02b": with_head(lambda t: t.flip(0)),
        "c03": changed(tie_word_embeddings=False),
    }  # fmt: skip


def token_ids(root: Path | None) -> dict[str, Maker]:
    """c04 to c07: ids and the size of the vocabulary."""
    qwen3 = packaged_tokenizer("qwen3", root)
    ids = {"bos_token_id": 151643, "eos_token_id": 151645, "num_hidden_layers": 1,
           "tie_word_embeddings": True}  # fmt: skip

    def without_model(**more: Any) -> Maker:
        return lambda f: (random_model(f, **more) / "tokenizer.model").unlink()

    return {
        "c04": changed(pad_token_id=-1), "c05": changed(pad_token_id=8192),
        "c06": made("Qwen2", tokenizer=qwen3, vocab_size=151660, **ids),
        "c06ok": made("Qwen2", tokenizer=qwen3, vocab_size=151936, **ids),
        "c07": without_model(vocab_size=8256), "c07ok": made(vocab_size=8256),
        "c07fit": without_model(),
    }  # fmt: skip


def cards() -> dict[str, Maker]:
    """c10: model cards."""
    texts: dict[str, str | bytes] = {
        "a": "---\nlicense: apache-2.0\ntags: []\nlanguage: []\nbase_model: []\n---\n# Card\n",
        "b": "---\nlicense: apache-2.0\ntitle: My model: the second\ntags:\n- a\n  - b\n---\n# C\n",
        "c": "---\nlicense: other\nlanguage:\n- fr\n---\n# Modèle\n".encode("latin-1"),
        "d": "---\nlicense: mit\ntags:\n- 2024\n- 2024-05-01\n- true\n- 1.5\nlanguage: no\n"
             "version: 1.0\nname: 7\n---\nx\n",
        "e": "---\nlicense: llama3.1\nbase_model: meta-llama/Llama-3.1-8B\ndatasets:\n- a/b\n"
             "- name: c\n  type: d\nmodel-index:\n- name: x\n  results: []\n"
             "extra_gated_prompt: >-\n  ### AGREE: yes\n---\n# t\n",
        "g": "",
    }  # fmt: skip

    def card(text: str | bytes) -> Maker:
        data = text if isinstance(text, bytes) else text.encode()
        return lambda f: void((bundled(f) / "README.md").write_bytes(data))

    return {f"c10{k}": card(v) for k, v in texts.items()}


def leftovers() -> dict[str, Maker]:
    """c11, c12: what a quantiser has left in the settings or in the tensors."""
    bnb = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

    def eighth(folder: Path) -> None:
        def go(d: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            out = {k: v.to(torch.float8_e4m3fn) if "proj" in k else v for k, v in d.items()}
            scales = {f"{k}_scale_inv": torch.ones(-(-v.shape[0] // 128), -(-v.shape[1] // 128))
                      for k, v in d.items() if "proj" in k}  # fmt: skip
            return out | scales

        tensors(bundled(folder), go)
        settings(folder, quantization_config=fp8)

    def scales(folder: Path) -> None:
        scale = torch.zeros(768, 8, dtype=torch.uint8).view(torch.float8_e8m0fnu)
        tensors(bundled(folder), lambda d: {**d, f"{UP}.weight_scale": scale})

    def packed(folder: Path) -> None:
        def go(d: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            out = {k: v for k, v in d.items() if "proj" not in k}
            for k, v in d.items():
                if "proj" in k:
                    name, (rows, cols) = k.removesuffix(".weight"), v.shape
                    out[f"{name}.qweight"] = torch.zeros(cols // 8, rows, dtype=torch.int32)
                    out[f"{name}.scales"] = torch.ones(cols // 128, rows, dtype=torch.float16)
                    out[f"{name}.g_idx"] = torch.zeros(cols, dtype=torch.int32)
            return out

        tensors(bundled(folder), go)
        settings(folder, quantization_config=gptq)

    return {
        "c11bnb": changed(quantization_config=bnb), "c11gptq": changed(quantization_config=gptq),
        "c11fp8": changed(quantization_config=fp8),
        "c12fp8": eighth, "c12e8m0": scales, "c12gptq": packed,
    }  # fmt: skip


def windows() -> dict[str, Maker]:
    """c13, c38: sliding windows and activations."""
    sliding = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    return {
        "c13m": made("Mistral", sliding_window=64), "c13moff": made("Mistral", sliding_window=None),
        "c13qoff": made("Qwen2", **{**sliding, "use_sliding_window": False}),
        "c13qon": made("Qwen2", **sliding), "c13q3on": made("Qwen3", **sliding),
        "c38relu": made(hidden_act="relu"), "c38gelu": made("Qwen2", hidden_act="gelu"),
        "c38swish": made(hidden_act="swish"),
    }  # fmt: skip


def ropes() -> dict[str, Maker]:
    """c14 to c16: rotary embeddings, in the settings of today and of before transformers 5."""

    def rope(family: str = "Llama", longest: int = 1024, theta: float = 10000.0, **p: Any) -> Maker:
        def make(folder: Path) -> None:
            random_model(folder, family, max_position_embeddings=longest)
            settings(folder, rope_parameters={"rope_theta": theta,
                                              **(p or {"rope_type": "default"})})  # fmt: skip

        return make

    def old(family: str = "Llama", theta: float = 10000.0, **p: Any) -> Maker:
        def make(folder: Path) -> None:
            random_model(folder, family)
            settings(folder, ("rope_parameters",), rope_theta=theta, rope_scaling=p or None)

        return make

    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 256}  # fmt: skip
    long = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 256,
            "short_factor": [1.0 + i / 64 for i in range(32)],
            "long_factor": [1.0 + i / 8 for i in range(32)]}  # fmt: skip
    return {
        "c14plain": rope(**yarn), "c14attn": rope(**yarn, attention_factor=1.0),
        "c14attn2": rope(**yarn, attention_factor=1.5),
        "c14attnq": rope("Qwen3", **yarn, attention_factor=1.3),
        "c14beta": rope(**yarn, beta_fast=16.0, beta_slow=2.0),
        "c14trunc": rope(**yarn, truncate=False),
        "c14noorig": rope(rope_type="yarn", factor=4.0),
        "c14noorigold": old(type="yarn", factor=4.0),
        "c14mscale": rope(**yarn, mscale=1.0, mscale_all_dim=1.0),
        "c14mscale2": rope(**yarn, mscale=0.707, mscale_all_dim=1.0),
        "c14qwen": rope("Qwen3", **yarn),
        "c14old": old(type="yarn", factor=4.0, original_max_position_embeddings=256),
        "c15linear": rope(rope_type="linear", factor=4.0),
        "c15linold": old(type="linear", factor=4.0),
        "c15dyn": rope(longest=256, rope_type="dynamic", factor=4.0),
        "c15dyn1024": rope(rope_type="dynamic", factor=4.0), "c15long": rope(**long),
        "c15llama3": rope(**llama3), "c15llama3old": old(theta=500000.0, **llama3),
        "c16new": rope(theta=500.0), "c16old": old(theta=500.0),
        "c16qwen": old("Qwen2", theta=500.0),
    }  # fmt: skip


def biases_and_heads() -> dict[str, Maker]:
    """c17, c18: biases, and heads of other widths and numbers."""
    return {
        "c17llama": made(attention_bias=True, mlp_bias=True), "c17att": made(attention_bias=True),
        "c17qwen3": made("Qwen3", attention_bias=True),
        "c18mqa": made(num_key_value_heads=1, head_dim=96),
        "c18mqaq3": made("Qwen3", num_key_value_heads=1, head_dim=128),
        "c18mis": made("Mistral", sliding_window=None, head_dim=None),
        "c18mis96": made("Mistral", sliding_window=None, head_dim=96, num_key_value_heads=4),
        "c18kvnone": lambda f: settings(random_model(f, num_key_value_heads=4),
                                        ("num_key_value_heads", "head_dim")),
        "c18q3nohd": lambda f: settings(random_model(f, "Qwen3", head_dim=128), ("head_dim",)),
    }  # fmt: skip


def templates() -> dict[str, Maker]:
    """c26: chat templates."""

    def files(folder: Path) -> None:
        edit_json(bundled(folder) / "tokenizer_config.json", ("chat_template",))
        text = "{% for m in messages %}[J]{{ m['content'] }}{% endfor %}"
        (folder / "chat_template.jinja").write_text(text)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(text)

    named = [{"name": n, "template": "{{ messages[0]['content'] }}[" + n + "] é \u4e2d"}
             for n in ("default", "tool_use", "rag")]  # fmt: skip
    return {
        "c26jinja": files,
        "c26list": lambda f: edit_json(bundled(f) / "tokenizer_config.json", chat_template=named),
    }


def ranges() -> dict[str, Maker]:
    """c30: values beyond half precision, tiny ones, and dead channels."""

    def values(scale: float, back: float) -> Callable[[Any], None]:
        def go(model: Any) -> None:
            for layer in model.model.layers:
                layer.self_attn.v_proj.weight.mul_(scale)
                layer.self_attn.o_proj.weight.mul_(back)

        return go

    def down(scale: float) -> Callable[[Any], None]:
        return lambda model: void(model.model.layers[0].mlp.down_proj.weight.mul_(scale))

    def dead(model: Any) -> None:
        for layer in model.model.layers:
            layer.input_layernorm.weight[::7] = 0
            layer.post_attention_layernorm.weight[::5] = 0
            layer.mlp.up_proj.weight[100:200] = 0
            layer.self_attn.v_proj.weight[:64] = 0

    full = {"dtype": torch.float32}
    return {
        "c30big": made(change=down(3000.0)), "c30huge": made(change=down(1e5)),
        "c30tiny": made(change=values(1e-6, 1e6), **full),
        "c30tiny4": made(change=values(1e-4, 1e4), **full),
        "c30tiny2": made(change=values(2e-6, 2e5), **full), "c30same": made(**full),
        "c30dead": made(change=dead),
    }  # fmt: skip


MARK = "open('RAN_CODE', 'a').write(__file__ + '\\n')\n"


def code() -> dict[str, Maker]:
    """c31: folders that bring Python code. A file RAN_CODE says that it was run."""

    def own_code(folder: Path) -> Path:
        names = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"}
        settings(bundled(folder), auto_map=names)
        tokenizer = {"AutoTokenizer": ["tokenization_x.XTok", "tokenization_x.XTok"]}
        edit_json(folder / "tokenizer_config.json", auto_map=tokenizer)
        classes = {
            "configuration_x": "from transformers import LlamaConfig\n"
                               "class XConfig(LlamaConfig):\n    pass\n",
            "modeling_x": "class X:\n    pass\n",
            "tokenization_x": "from transformers import LlamaTokenizerFast\n"
                              "class XTok(LlamaTokenizerFast):\n    pass\n",
        }  # fmt: skip
        for name, text in classes.items():
            (folder / f"{name}.py").write_text(MARK + text)
        return folder

    def unknown_tokenizer(folder: Path) -> None:
        edit_json(own_code(folder) / "tokenizer_config.json", tokenizer_class="XTok")
        settings(folder, ("auto_map",))

    def converter_trusts(folder: Path) -> None:
        name = "HybridDNATokenizer"
        (bundled(folder) / "evil.py").write_text(
            MARK + f"from transformers import PreTrainedTokenizerFast\n"
            f"class {name}(PreTrainedTokenizerFast):\n    pass\n"
        )
        wanted = {"AutoTokenizer": [f"evil.{name}", f"evil.{name}"]}
        edit_json(folder / "tokenizer_config.json", tokenizer_class=name, auto_map=wanted)

    return {
        "c31": lambda f: void(own_code(f)), "c31b": unknown_tokenizer, "c31dna": converter_trusts,
    }  # fmt: skip


def generation() -> dict[str, Maker]:
    """c34: generation_config.json."""

    def written(text: str) -> Maker:
        return lambda f: void((bundled(f) / "generation_config.json").write_text(text))

    return {
        "c34b": written("{ not json"),
        "c34d": written(json.dumps({"temperature": 1, "top_k": 20, "top_p": 0.95})),
        "c34e": written(json.dumps({"temperature": "hot", "top_k": -5, "eos_token_id": [2, "x"]})),
    }


def tokenizers_of(root: Path | None) -> dict[str, Maker]:
    """c08, c09, c27, c35 and real tokenizers."""
    llama3 = {"tokenizer": packaged_tokenizer("llama3_1", root), "vocab_size": 128256,
              "tie_word_embeddings": True, "num_hidden_layers": 1, "bos_token_id": 128000,
              "eos_token_id": 128001}  # fmt: skip
    qwen3 = {"tokenizer": packaged_tokenizer("qwen3", root), "vocab_size": 151936,
             "tie_word_embeddings": True, "num_hidden_layers": 1, "bos_token_id": 151643,
             "eos_token_id": 151645}  # fmt: skip

    def tiktoken(folder: Path) -> None:
        lines = [base64.b64encode(bytes([i])).decode() + f" {i}" for i in range(256)]
        (random_model(folder, **llama3) / "tokenizer.model").write_text("\n".join(lines))

    def own_bpe(folder: Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        random_model(folder, "Qwen2", tokenizer=lambda _: None, vocab_size=2304)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=2048, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        tokenizer.train([str(EXAMPLES / "text" / "austen.test.txt")], trainer)
        tokenizer.save(str(folder / "tokenizer.json"))
        named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>",
                 "bos_token": "<s>"}  # fmt: skip
        (folder / "tokenizer_config.json").write_text(json.dumps(named))

    def tokenizer_class(**more: Any) -> Maker:
        return lambda f: edit_json(bundled(f) / "tokenizer_config.json", **more)

    return {
        "c08": tiktoken, "c09": own_bpe,
        "c27list": tokenizer_class(extra_special_tokens=["<s>", "</s>"]),
        "c27cls": tokenizer_class(tokenizer_class="NoSuchTokenizer"),
        "c27none": tokenizer_class(tokenizer_class=None),
        "c27fast": tokenizer_class(tokenizer_class="PreTrainedTokenizerFast"),
        "c35": lambda f: (bundled(f) / "tokenizer.model").unlink(),
        "Llama3-tok": made(**llama3), "Qwen3-tok": made("Qwen3", **qwen3),
    }  # fmt: skip
