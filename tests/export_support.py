"""Small random models and artifacts for the exporter's tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from export import gguf_types
from pt2_core.artifact.folder import RUN, ArtifactWriter
from pt2_core.artifact.matrix import TernaryMatrix, pack_ternary
from pt2_core.files import write_json
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.model.expected import load_config

Orders = dict[str, NDArray[np.int32]]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LINEARS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
TEXT = (
    "the quick brown fox jumps over the lazy dog while seven wizards boil a pot of jade soup "
    "and nobody in the village knows why the river turns north before it reaches the sea "
)


def make_model(
    folder: Path,
    family: str = "llama",
    *,
    tied: bool = False,
    hidden: int = 256,
    ffn: int = 512,
    max_shard: str = "5GB",
    **extra: Any,
) -> Path:
    """Save a random model with a tokenizer; biases and norms are random too, so nothing is neutral.

    Grouped-query attention of 4 heads over 2; the Qwen3 has a head_dim other than hidden / heads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab = make_byte_tokenizer(folder) if family.startswith("qwen") else make_tokenizer(folder)
    settings: dict[str, Any] = {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "tie_word_embeddings": tied,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, **extra,
    }  # fmt: skip
    if family in ("qwen3", "mistral"):
        settings.setdefault("head_dim", hidden // (2 if family == "qwen3" else 4))
    if family == "llama":
        settings.setdefault("attention_bias", False)
    config = transformers.AutoConfig.for_model(family, **settings)
    torch.manual_seed(len(family))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(torch.rand_like(p) + 0.5 if "norm" in name else torch.randn_like(p) * 0.2)
            else:
                p.copy_(torch.randn_like(p) * (p.shape[1] ** -0.5))
    model.save_pretrained(folder, max_shard_size=max_shard)
    return folder


def make_tokenizer(folder: Path) -> int:
    """Train a small SentencePiece model on :data:`TEXT`; returns its vocabulary's size."""
    import sentencepiece as spm

    source = folder / "text.txt"
    source.write_text("\n".join(TEXT.split(" ")) + "\n" + TEXT, encoding="utf-8")
    size = 320
    spm.SentencePieceTrainer.train(
        input=str(source), model_prefix=str(folder / "tokenizer"), vocab_size=size,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        # As Llama's: a text is taken as it stands.
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    source.unlink()
    (folder / "tokenizer.vocab").unlink()
    tokenizer = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>",
              "eos_token": "</s>", "unk_token": "<unk>",
              "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return int(tokenizer.vocab_size())


def make_byte_tokenizer(folder: Path) -> int:
    """Train a small byte-level BPE on :data:`TEXT`, as Qwen's; returns its vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>",
              "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return int(tokenizer.get_vocab_size())


def linears(config: dict[str, Any]) -> list[str]:
    """The module names of all linears of the decoder blocks."""
    return [
        f"model.layers.{i}.{part}.{name}"
        for i in range(config["num_hidden_layers"])
        for part, names in LINEARS.items()
        for name in names
    ]


def settled(model_dir: Path) -> Checkpoint:
    """A checkpoint with the settings that ``config.json`` lacks filled in, as in the quantiser."""
    model = Checkpoint.open(model_dir)
    load_config(model)
    return model


def foldable_orders(model_dir: Path, seed: int = 0) -> tuple[NDArray[np.int32], Orders]:
    """Random orders of every foldable kind: the residual stream's, and one per linear."""
    rng = np.random.default_rng(seed)
    config = settled(model_dir).settings
    n_head, n_kv = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // n_head
    residual = rng.permutation(config["hidden_size"]).astype(np.int32)
    orders = {}
    for module in linears(config):
        if module.endswith("down_proj"):
            orders[module] = rng.permutation(config["intermediate_size"]).astype(np.int32)
        elif module.endswith("o_proj"):
            within = np.stack([rng.permutation(dim) for _ in range(n_kv)])
            within = np.repeat(within, n_head // n_kv, axis=0)
            heads = np.arange(n_head)[:, None] * dim
            orders[module] = (within + heads).reshape(-1).astype(np.int32)
        else:
            orders[module] = residual
    return residual, orders


def ternarise(
    weight: NDArray[np.float32], order: NDArray[np.int32], group: int
) -> tuple[NDArray[np.int8], NDArray[np.float16], NDArray[np.float16]]:
    """T, alpha and mu of ``weight[:, order]`` by the plain threshold rule."""
    w = weight[:, order].reshape(len(weight), -1, group)
    mu = w.mean(-1, keepdims=True)
    t = np.where(np.abs(w - mu) > 0.75 * np.abs(w - mu).mean(-1, keepdims=True), np.sign(w - mu), 0)
    alpha = (np.abs(w - mu) * np.abs(t)).sum(-1) / np.maximum(np.abs(t).sum(-1), 1)
    return (
        t.reshape(weight.shape).astype(np.int8),
        alpha.astype(np.float16),
        mu[..., 0].astype(np.float16),
    )


def four_levels(
    weight: NDArray[np.float32], order: NDArray[np.int32], group: int
) -> tuple[NDArray[np.int8], NDArray[np.float16], NDArray[np.float16]]:
    """T of {-1, 0, 1, 2}, alpha and mu of ``weight[:, order]``: 3/4 of its range."""
    w = weight[:, order].reshape(len(weight), -1, group)
    low, high = w.min(-1, keepdims=True), w.max(-1, keepdims=True)
    alpha = ((high - low) / 4).astype(np.float16)
    mu = ((high + low) / 2 - alpha / 2).astype(np.float16)
    t = np.clip(np.rint((w - mu) / alpha), -1, 2)
    return t.reshape(weight.shape).astype(np.int8), alpha[..., 0], mu[..., 0]


def make_artifact(
    folder: Path,
    model_dir: Path,
    *,
    orders: tuple[NDArray[np.int32], Orders] | None = None,
    group: int = 128,
    kept: dict[str, str] | None = None,
    complete: bool = True,
    levels: int = 3,
) -> Path:
    """Write an artifact of a model with the format's own writer."""
    model = settled(model_dir)
    residual, per_linear = orders or foldable_orders(model_dir)
    kept = kept or {}
    writer = ArtifactWriter.create(
        folder,
        {
            "model": model.identity(model.fingerprint()[0]),
            "settings": {"order": "foldable", "block_size": group},
            "versions": {}, "calibration": {}, "kept": kept,
        },
    )  # fmt: skip
    writer.write_global(residual)
    for block in range(model.settings["num_hidden_layers"]):
        matrices, records = [], {}
        for module in linears(model.settings):
            if f"layers.{block}." not in module or module in kept:
                continue
            weight = model.read(f"{module}.weight").float().numpy()
            cut = ternarise if levels == 3 else four_levels
            t, alpha, mu = cut(weight, per_linear[module], group)
            matrices.append(TernaryMatrix(module, pack_ternary(t), alpha, mu, per_linear[module]))
            rows, cols = t.shape
            records[module] = {"rows": rows, "cols": cols, "block_size": group, "order": "foldable"}
            if levels != 3:
                records[module]["levels"] = levels
        writer.write_block(block, matrices, records)
    if complete:
        writer.finish()
    write_json(folder / RUN, {"model_dir": str(model_dir)})
    return folder


def dequantized_model(model_dir: Path, artifact_dir: Path) -> Any:
    """The transformers model with the artifact's ``alpha * T + mu`` in place of its linears."""
    from pt2_core.artifact.folder import Artifact

    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    artifact = Artifact.open(artifact_dir)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for block in range(artifact.n_blocks):
            for name, matrix in artifact.block(block).items():
                weights[f"{name}.weight"].copy_(torch.from_numpy(matrix.dequantize()))
    return model.eval()


def model_maker(new_folder: Callable[[str], Path]) -> Callable[..., tuple[Path, Path]]:
    """Makes a model and its artifact, once for each set of arguments; tests must not change them.

    Args:
        new_folder: makes a folder of a name, such as tmp_path_factory.mktemp.
    """
    cache: dict[Any, tuple[Path, Path]] = {}

    def make(
        family: str = "llama", group: int = 128, levels: int = 3, **options: Any
    ) -> tuple[Path, Path]:
        key = (family, group, levels, *sorted(options.items()))
        if key not in cache:
            root = new_folder(family)
            model = make_model(root / "model", family, **options)
            cache[key] = (
                model,
                make_artifact(root / "artifact", model, group=group, levels=levels),
            )
        return cache[key]

    return make


def read(path: Path) -> tuple[dict[str, gguf.ReaderTensor], dict[str, Any]]:
    """GGUF name -> reader's tensor, and metadata."""
    gguf_types.register()
    reader = gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in reader.fields.items()}
    return {t.name: t for t in reader.tensors}, fields
