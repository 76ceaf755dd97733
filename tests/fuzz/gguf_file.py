"""GGUF files as plain lists, so that each field can be changed and the rest still fits."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pt2_core import formats
from pt2_llama import tiny_model

U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
           12: "d"}  # fmt: skip
# ggml's number, elements and bytes of a block
TYPES = {
    **{"f32": (0, 1, 4), "f16": (1, 1, 2), "q2_k": (10, 256, 84)},
    **{t.ggml_name: (t.id, t.block, t.nbytes) for t in formats.ALL},
}
ALIGNMENT = 32


@dataclass
class Tensor:
    """One entry of the list of tensors; ``offset`` None is where the data before it ends."""

    name: bytes
    dims: list[int]
    type: int
    data: bytes
    offset: int | None = None


@dataclass
class File:
    """What a GGUF file says; counts of None are the true ones."""

    keys: list[tuple[bytes, int, Any]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    version: int = 3
    n_keys: int | None = None
    n_tensors: int | None = None

    def to_bytes(self) -> bytes:
        """The file."""
        counts = (len(self.tensors) if self.n_tensors is None else self.n_tensors,
                  len(self.keys) if self.n_keys is None else self.n_keys)  # fmt: skip
        head = b"GGUF" + struct.pack("<IQQ", self.version, *counts)
        for key, kind, value in self.keys:
            head += _string(key) + struct.pack("<I", kind) + packed(kind, value)
        at, data = 0, []
        for t in self.tensors:
            place = at if t.offset is None else t.offset
            head += _string(t.name) + struct.pack(f"<I{len(t.dims)}Q", len(t.dims), *t.dims)
            head += struct.pack("<IQ", t.type, place)
            data.append(t.data + bytes(-len(t.data) % ALIGNMENT))
            at += len(data[-1])
        return head + bytes(-len(head) % ALIGNMENT) + b"".join(data)


def packed(kind: int, value: Any) -> bytes:
    """The bytes of a value; ``bytes`` stand for themselves, an array is (type, values)."""
    if kind in FORMATS and not isinstance(value, bytes):
        return struct.pack("<" + FORMATS[kind], value)
    if kind == ARRAY and isinstance(value, tuple):
        inner, values = value
        return struct.pack("<IQ", inner, len(values)) + b"".join(packed(inner, v) for v in values)
    return _string(value) if kind == STRING else bytes(value)


def _string(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def payload(kind: str, elements: int, rng: np.random.Generator) -> bytes:
    """Random bytes of a type that are valid: scales of the size that models have, any codes."""
    _, block, size = TYPES[kind]
    if kind in ("f16", "f32"):
        values = rng.standard_normal(elements) / 16
        return values.astype(np.float16 if kind == "f16" else np.float32).tobytes()
    if kind in formats.TYPES:
        return formats.TYPES[kind].random_blocks(elements // block, rng, 1 / 64).tobytes()
    data = rng.integers(0, 81, (elements // block, size), dtype=np.uint8)
    scales = np.abs(rng.normal(size=(len(data), 2)) / 64).astype("<f2").view(np.uint8)
    at = 80 if kind == "q2_k" else 0
    data[:, at : at + 4] = scales.reshape(len(data), -1)
    return data.tobytes()


def tiny_file(kind: str, layers: int = tiny_model.LAYERS) -> File:
    """The tiny model of pt2-llama's smoke test with random matrices of a type."""
    rng = np.random.default_rng(0)
    tokens, scores, types = tiny_model.tiny_vocabulary()
    sizes = {
        "context_length": tiny_model.CONTEXT, "embedding_length": tiny_model.EMBED,
        "block_count": layers, "feed_forward_length": tiny_model.FFN,
        "attention.head_count": tiny_model.HEADS, "attention.head_count_kv": tiny_model.KV_HEADS,
        "rope.dimension_count": tiny_model.EMBED // tiny_model.HEADS, "vocab_size": len(tokens),
    }  # fmt: skip
    keys: list[tuple[bytes, int, Any]] = [(b"general.architecture", STRING, b"llama")]
    keys += [(b"general.name", STRING, b"tiny"), (b"general.file_type", U32, TYPES[kind][0])]
    keys += [(f"llama.{k}".encode(), U32, v) for k, v in sizes.items()]
    keys += [(b"llama.attention.layer_norm_rms_epsilon", F32, 1e-5)]
    if ours := formats.TYPES.get(kind):
        keys += [(ours.layout_key().encode(), U32, ours.layout)]
    keys += [
        (b"tokenizer.ggml.model", STRING, b"llama"),
        (b"tokenizer.ggml.tokens", ARRAY, (STRING, tokens)),
        (b"tokenizer.ggml.scores", ARRAY, (F32, scores)),
        (b"tokenizer.ggml.token_type", ARRAY, (5, types)),
        (b"tokenizer.ggml.bos_token_id", U32, 1),
        (b"tokenizer.ggml.eos_token_id", U32, 2),
        (b"tokenizer.ggml.unknown_token_id", U32, 0),
    ]
    tensors = []
    for name, value in tiny_model.tiny_tensors().items():
        if name.startswith("blk.") and int(name.split(".")[1]) >= layers:
            continue
        here = "f32" if value.ndim == 1 else kind
        dims = [int(n) for n in reversed(value.shape)]
        tensors.append(Tensor(name.encode(), dims, TYPES[here][0], payload(here, value.size, rng)))
    return File(keys, tensors)
