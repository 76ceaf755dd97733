"""Write the tiny random model of a class, and what its own code predicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pt2_core.artifact import proof_text
from pt2_core.artifact.proof import Proof, cut, scored
from tests.zoo import tokenizers
from tests.zoo.configs import special, tiny_config

LENGTH, WINDOWS = 128, 2
# Rounded activations send a token near a tie to another expert; in a random model experts have
# nothing in common, so that theirs must be the smaller part of a block's output.
EXPERTS_GAIN = 0.6


class WrongFile(Exception):
    """A file from which llama.cpp predicts something else than transformers does."""


def write_model(folder: Path, name: str, kind: str) -> Path:
    """Write a class's tiny model with random weights and its tokenizer, as transformers saves it.

    Args:
        folder: is made.
        name: of the class.
        kind: transformers' model type.
    """
    import transformers

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = getattr(transformers, name)(tiny_config(name, kind)).float()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            _randomise(path, parameter, special(name).gain)
            for part, factor in special(name).factors.items():
                parameter.mul_(factor if part in path else 1)
        for path, buffer in model.named_buffers():
            if path.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    more = special(name)
    if more.renamed:
        _rename(folder / "model.safetensors", more.renamed)
    _change(folder / "config.json", more.raw)
    tokenizers.write(more.tokenizer, folder)
    _change(folder / "tokenizer_config.json", more.settings)
    return folder


def _rename(file: Path, parts: dict[str, str]) -> None:
    weights = load_file(file)
    for old, new in parts.items():
        weights = {name.replace(old, new): value for name, value in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})


def _change(file: Path, more: dict[str, Any]) -> None:
    value = json.loads(file.read_text(encoding="utf-8")) | more
    file.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _randomise(name: str, value: nn.Parameter, gain: float) -> None:
    """Norms around what they are made as, biases that are felt, linears that keep the size."""
    if value.dim() < 2:
        value.add_(torch.randn_like(value) * 0.2)
    else:
        gain *= EXPERTS_GAIN if "experts" in name else 1
        value.copy_(torch.randn_like(value) * gain * value.shape[-1] ** -0.5)


def load(folder: Path) -> nn.Module:
    """transformers' model of a folder, float32, as its own code runs it."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@torch.no_grad()
def predictions(model: nn.Module, tokens: Tensor) -> Tensor:
    """Log-probabilities float32 ``[windows, length, vocab]`` of int64 ``[windows, length]``."""
    return torch.stack(
        [model(window[None], use_cache=False).logits[0].float().log_softmax(-1)
         for window in tokens]
    )  # fmt: skip


def proof_of(folder: Path, model: nn.Module) -> Proof:
    """What a file of this model has to predict: whole distributions, and the tokenizer's lines."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    whole = tokenizer.encode(proof_text.PROSE)
    plain = tokenizer.encode(proof_text.PROSE, add_special_tokens=False)
    bos = whole[0] if whole[0] != plain[0] else None
    tokens = cut(whole, WINDOWS, LENGTH)
    lines = tuple(proof_text.lines([t for t in tokenizer.all_special_tokens]))
    ids = tuple(
        np.array(tokenizer.encode(text, add_special_tokens=False), np.int32) for _, text in lines
    )
    inputs = tokens.copy()
    if bos is not None:
        inputs[:, 0] = bos
    found = predictions(model, torch.from_numpy(inputs).long())
    half = LENGTH // 2
    found = found[:, half : half + scored(LENGTH)]
    top = found.sort(-1, descending=True)
    return Proof(
        proof_text.PROSE, tokens, bos, top.indices.int().numpy(), top.values.numpy(), lines, ids
    )


def fields(file: Path) -> dict[str, object]:
    """A file's metadata."""
    import gguf

    return {k: v.contents() for k, v in gguf.GGUFReader(file).fields.items()
            if k.startswith("tokenizer.ggml.") and k.count(".") == 2
            and not k.endswith(("tokens", "merges", "scores", "token_type"))}  # fmt: skip
