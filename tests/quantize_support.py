"""Tiny random models of each architecture, made on the spot, for the quantiser's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCAB = 96
SAMPLES, SEQLEN = 6, 24
ARCHITECTURES = ("Llama", "Mistral", "Qwen2", "Qwen3")


def tiny_config(architecture: str, **changes: Any) -> Any:
    import transformers

    settings: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }  # fmt: skip
    # What sets each architecture apart: own head width, biases, sliding windows, tied embeddings.
    special: dict[str, dict[str, Any]] = {
        "Llama": {"attention_bias": True},
        "Mistral": {"sliding_window": 8, "head_dim": 32},
        "Qwen2": {"tie_word_embeddings": True},
        "Qwen3": {"head_dim": 64},
    }
    settings.update(special[architecture])
    settings.update(changes)
    config = getattr(transformers, f"{architecture}Config")(**settings)
    config.architectures = [f"{architecture}ForCausalLM"]
    return config


def tiny_model(folder: Path, architecture: str = "Llama", **changes: Any) -> Path:
    """Write a model with random weights, biases and norms, bf16, as transformers saves it."""
    import transformers

    torch.manual_seed(0)
    config = tiny_config(architecture, **changes)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "norm" in name:
                parameter.normal_(mean=1.0, std=0.2)
            elif "embed" not in name and parameter.dim() == 2:
                parameter.normal_(std=0.08)
            else:
                parameter.normal_()
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def token_file(path: Path, samples: int = SAMPLES, seqlen: int = SEQLEN) -> str:
    """Write random token ids; returns what --calibration takes."""
    g = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCAB, (samples, seqlen), generator=g, dtype=torch.int32)
    save_file({"calibration": tokens, "other": tokens.float()}, path)
    return f"{path}:calibration"


def artifact_bytes(folder: Path) -> dict[str, bytes]:
    """Everything that belongs to an artifact's identity, and any file that should not be there."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "run.json"}


def weights(seed: int, rows: int = 24, k: int = 32, tails: bool = False) -> torch.Tensor:
    """A weight matrix float32 ``[rows, k]`` with an offset of its own in each row."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, k, generator=g) * 0.05 + 0.01 * torch.randn(rows, 1, generator=g)
    return w * torch.exp(torch.randn(rows, k, generator=g)) if tails else w


def moments(seed: int, k: int = 32, tokens: int = 200) -> torch.Tensor:
    """Second moments of correlated inputs with a mean and a few loud channels."""
    g = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(tokens, k, generator=g) @ torch.randn(k, k, generator=g) / k**0.5 + 0.3
    x *= torch.exp(0.7 * torch.randn(k, generator=g))
    return (x.T @ x / tokens).contiguous()
