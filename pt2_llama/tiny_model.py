"""A tiny random Llama as a GGUF file, for smoke tests and tests: under 2 MB, evaluated in 0.1 s.

    python -m pt2_llama.tiny_model tiny.gguf

The weights are random, so its perplexity only shows that the arithmetic ran.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import gguf
import numpy as np

from pt2_core.errors import PT2Error
from pt2_core.files import atomic_path

SPECIALS = ("<unk>", "<s>", "</s>")
EMBED, FFN, HEADS, KV_HEADS, LAYERS, CONTEXT = 256, 512, 4, 2, 1, 512


def tiny_vocabulary() -> tuple[list[bytes], list[float], list[int]]:
    """Tokens, scores and types of a byte-level SentencePiece vocabulary of 320 entries.

    3 specials, 256 bytes, then letters and frequent pairs, so that any text can be tokenised.
    """
    pairs = ["th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ti", "es", "or", "te"]
    words = [*"abcdefghijklmnopqrstuvwxyz.,", "▁", *pairs, "▁t", "▁a", "▁s", "▁o", "▁w"]
    words += [f"<pad{i}>" for i in range(320 - 259 - len(words))]
    tokens = [*SPECIALS, *(f"<0x{i:02X}>" for i in range(256)), *words]
    kinds = gguf.TokenType
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256]
    types += [kinds.UNUSED if w.startswith("<pad") else kinds.NORMAL for w in words]
    scores = [0.0] * 259 + [-float(i) for i in range(len(words))]
    return [t.encode() for t in tokens], scores, [int(t) for t in types]


def tiny_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights, F16 matrices ``[rows, cols]`` and F32 norms, by GGUF name."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, cols: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((rows, cols)) * gain / np.sqrt(cols)).astype(np.float16)

    ones = np.ones(EMBED, np.float32)
    tensors = {
        "token_embd.weight": matrix(320, EMBED, gain=4.0),
        "output_norm.weight": ones,
        "output.weight": matrix(320, EMBED),
    }
    for i in range(LAYERS):
        kv = EMBED * KV_HEADS // HEADS
        tensors |= {
            f"blk.{i}.attn_norm.weight": ones,
            f"blk.{i}.attn_q.weight": matrix(EMBED, EMBED),
            f"blk.{i}.attn_k.weight": matrix(kv, EMBED),
            f"blk.{i}.attn_v.weight": matrix(kv, EMBED),
            f"blk.{i}.attn_output.weight": matrix(EMBED, EMBED),
            f"blk.{i}.ffn_norm.weight": ones,
            f"blk.{i}.ffn_gate.weight": matrix(FFN, EMBED),
            f"blk.{i}.ffn_up.weight": matrix(FFN, EMBED),
            f"blk.{i}.ffn_down.weight": matrix(EMBED, FFN),
        }
    return tensors


def write_tiny_model(path: str | os.PathLike[str], seed: int = 0) -> Path:
    """Write the model atomically as F16 GGUF; returns its path.

    Raises:
        PT2Error: the file cannot be written.
    """
    with atomic_path(path) as tmp:
        writer = gguf.GGUFWriter(tmp, "llama")
        writer.add_name("pt2 tiny random model")
        writer.add_context_length(CONTEXT)
        writer.add_embedding_length(EMBED)
        writer.add_block_count(LAYERS)
        writer.add_feed_forward_length(FFN)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(EMBED // HEADS)
        writer.add_vocab_size(320)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        tokens, scores, types = tiny_vocabulary()
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        for name, data in tiny_tensors(seed).items():
            writer.add_tensor(name, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return Path(path)


def tiny_text(words: int = 220) -> str:
    """A deterministic text of letters and spaces, long enough for a few windows of 64 tokens."""
    rng = np.random.default_rng(1)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    return " ".join("".join(rng.choice(letters, rng.integers(1, 8))) for _ in range(words)) + ".\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m pt2_llama.tiny_model FILE.gguf")
    try:
        print(write_tiny_model(sys.argv[1]))
    except PT2Error as e:
        raise SystemExit(f"tiny_model: error: {e}") from e
