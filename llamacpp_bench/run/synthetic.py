"""GGUF files with the shapes of real models and random weights, to measure speed only.

Speed does not depend on the values (as long as no infinities appear), so a pool of random blocks
with sane scales is tiled over each tensor. Which tensor gets which type is asked of llama-quantize
itself: it is run dry (`--dry-run`) on a sparse F16 file of the same shape, which takes no disk.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llamacpp_bench.run.machine import usable_cores
from llamacpp_bench.run.process import run_tool
from llamacpp_bench.run.tools import ToolBox
from pt2_core import formats
from pt2_core.errors import PT2Error
from pt2_core.files import atomic_path, human_bytes
from pt2_core.ggml_types import BY_NAME, FILE_TYPES
from pt2_core.gguf_info import Tensor, header_bytes, padded

POOL_BLOCKS = 1 << 16
PIECE_BYTES = 64 << 20  # what one thread writes in one go
MAX_BUFFERS = 64  # of one write; the system's limit is 1024 or more
SCALE = 0.02  # what weights of trained models are about
LABEL = "random weights: speed only"


@dataclass(frozen=True)
class Shape:
    """Shape of a Llama model: LLaMA-1's sizes, and TinyLlama's for 1b."""

    name: str
    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int = 32000
    context: int = 4096

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes (row length first) in the order of llama.cpp's converter."""
        head = self.hidden // self.heads
        kv = head * self.kv_heads
        out: list[tuple[str, tuple[int, ...]]] = [("token_embd.weight", (self.hidden, self.vocab))]
        for i in range(self.layers):
            blk: dict[str, tuple[int, ...]] = {
                "attn_norm": (self.hidden,),
                "attn_q": (self.hidden, self.hidden),
                "attn_k": (self.hidden, kv),
                "attn_v": (self.hidden, kv),
                "attn_output": (self.hidden, self.hidden),
                "ffn_norm": (self.hidden,),
                "ffn_gate": (self.hidden, self.ffn),
                "ffn_up": (self.hidden, self.ffn),
                "ffn_down": (self.ffn, self.hidden),
            }
            out += [(f"blk.{i}.{name}.weight", shape) for name, shape in blk.items()]
        return [*out, ("output_norm.weight", (self.hidden,)), ("output.weight", out[0][1])]


SHAPES: dict[str, Shape] = {
    s.name: s
    for s in (
        Shape("tiny", 256, 2, 512, 4, 2, vocab=1024, context=512),
        Shape("1b", 2048, 22, 5632, 32, 4, context=2048),
        Shape("7b", 4096, 32, 11008, 32, 32),
        Shape("13b", 5120, 40, 13824, 40, 40),
        Shape("30b", 6656, 60, 17920, 52, 52),
        Shape("65b", 8192, 80, 22016, 64, 64),
    )
}

# Byte offsets, within a block, of its half-precision scales, and the size of a typical scale that
# gives weights of about SCALE (from the dequantisers in ggml/src/ggml-quants.c).
_HALVES: dict[str, tuple[tuple[int, ...], float]] = {
    "Q4_0": ((0,), SCALE / 4),
    "Q4_1": ((0, 2), SCALE / 8),
    "Q5_0": ((0,), SCALE / 8),
    "Q5_1": ((0, 2), SCALE / 16),
    "Q8_0": ((0,), SCALE / 64),
    "Q1_0": ((0,), SCALE),
    "Q2_0": ((0,), SCALE),
    "Q2_K": ((80, 82), SCALE / 10),
    "Q3_K": ((108,), SCALE / 40),
    "Q4_K": ((0, 2), SCALE / 200),
    "Q5_K": ((0, 2), SCALE / 400),
    "Q6_K": ((208,), SCALE / 300),
    "IQ2_XXS": ((0,), SCALE / 40),
    "IQ2_XS": ((0,), SCALE / 40),
    "IQ2_S": ((0,), SCALE / 40),
    "IQ3_XXS": ((0,), SCALE / 100),
    "IQ3_S": ((0,), SCALE / 100),
    "IQ1_S": ((0,), SCALE / 8),
    "IQ4_NL": ((0,), SCALE / 60),
    "IQ4_XS": ((0,), SCALE / 800),
    "TQ1_0": ((52,), SCALE),
    "TQ2_0": ((64,), SCALE),
}


def parse_shapes(text: str) -> list[Shape]:
    """`"7b,13b"` -> shapes.

    Raises:
        PT2Error: a name is not known; the known ones are listed.
    """
    names = [w.strip().lower() for w in text.split(",") if w.strip()]
    for name in names:
        if name not in SHAPES:
            raise PT2Error(f"unknown shape {name!r}: known are {', '.join(SHAPES)}")
    if not names:
        raise PT2Error("--synthetic needs at least one shape, for example --synthetic 1b")
    return [SHAPES[n] for n in dict.fromkeys(names)]


def parse_types(text: str) -> list[str]:
    """`"q2_0,q2_k"` -> recipe names in upper case.

    Raises:
        PT2Error: a name is not known; the known ones are listed.
    """
    known = (*formats.NAMES, *(t for t in FILE_TYPES if t not in formats.NAMES))
    names = [w.strip().upper() for w in text.split(",") if w.strip()]
    for name in names:
        if name not in known:
            shown = ", ".join(known).lower()
            raise PT2Error(f"unknown type {name.lower()!r} for --types: known are {shown}")
    if not names:
        raise PT2Error("--types needs at least one type, for example --types q2_0,q2_k")
    return list(dict.fromkeys(names))


# --------------------------------------------------------------------------------------- recipes

_DRY_LINE = re.compile(r"^\[\s*\d+/\s*\d+\]\s+(\S+)\s+-.*?type =\s*(\S+?),.*?(?:\((\w+)\))?\s*$")


def parse_dry_run(text: str) -> dict[str, str]:
    """Tensor name -> type name (upper case), from the output of `llama-quantize --dry-run`."""
    types: dict[str, str] = {}
    for line in text.splitlines():
        if match := _DRY_LINE.match(line):
            types[match[1]] = (match[3] or match[2]).upper()
    return types


def recipe(tools: ToolBox, shape: Shape, kind: str, folder: Path) -> dict[str, str]:
    """The type of every tensor of `shape` in a file of type `kind`, as llama-quantize makes it.

    In files of our types the matrices of the blocks are ternary; embeddings and head are what
    llama-quantize gives to its own ternary TQ2_0 (Q4_K and Q6_K), so that types are compared and
    not heads. (pt2-export's head is smaller unless it is told otherwise.)

    Raises:
        PT2Error: llama-quantize failed, or left a tensor out.
    """
    ternary = kind in formats.NAMES
    ask = "TQ2_0" if ternary else kind
    tensors = [(n, s, "F32" if len(s) == 1 else "F16") for n, s in shape.tensors()]
    head, listed = header_bytes(metadata(shape, "F16"), tensors)
    skeleton = folder / f".{shape.name}-skeleton.gguf"
    try:
        with skeleton.open("wb") as f:
            f.write(head)
            f.truncate(len(head) + listed[-1].offset + padded(listed[-1].nbytes))
        argv = [str(tools.tool("llama-quantize")), "--dry-run", str(skeleton), ask]
        log = folder / f"recipe-{shape.name}-{kind}.log"
        done = run_tool(argv, tools.env, log)
        types = parse_dry_run(done.stdout + log.read_text("utf-8", "replace"))
    finally:
        skeleton.unlink(missing_ok=True)
    missing = [n for n, _ in shape.tensors() if n not in types]
    if missing:
        raise PT2Error(f"llama-quantize --dry-run did not name {missing[0]} (log: {log})")
    unknown = sorted(set(types.values()) - set(BY_NAME))
    if unknown:
        raise PT2Error(f"llama-quantize gives the type {unknown[0]}, which is not known here")
    if ternary:
        types |= {n: kind for n, s in shape.tensors() if n.startswith("blk.") and len(s) > 1}
    return types


def metadata(shape: Shape, kind: str) -> dict[str, str | bool | int | float]:
    """Metadata of a Llama model without a vocabulary (llama-bench feeds token numbers)."""
    head = shape.hidden // shape.heads
    out: dict[str, str | bool | int | float] = {
        "general.architecture": "llama",
        "general.name": f"synthetic {shape.name} {kind} ({LABEL})",
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
        "llama.block_count": shape.layers,
        "llama.context_length": shape.context,
        "llama.embedding_length": shape.hidden,
        "llama.feed_forward_length": shape.ffn,
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.kv_heads,
        "llama.attention.key_length": head,
        "llama.attention.value_length": head,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": head,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": shape.vocab,
        "tokenizer.ggml.model": "none",
        "pt2.synthetic": True,
    }
    if ours := formats.BY_NAME.get(kind):
        out |= {"pt2.version": 1, "pt2.type": kind, "pt2.group_size": ours.block}
        out[ours.layout_key()] = ours.layout
    return out


# ----------------------------------------------------------------------------------------- blocks


def random_blocks(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` random blocks of a type, uint8 `[count, bytes per block]`, of finite, small weights.

    Raises:
        PT2Error: no recipe for blocks of this type.
    """
    size = BY_NAME[kind].nbytes if kind in BY_NAME else 0
    if kind in ("F32", "F16"):
        floats = rng.normal(0, SCALE, count).astype(np.float32 if kind == "F32" else np.float16)
        return floats.view(np.uint8).reshape(count, size)
    if kind == "BF16":
        bits = rng.normal(0, SCALE, count).astype(np.float32).view(np.uint32) >> 16
        return bits.astype(np.uint16).view(np.uint8).reshape(count, size)
    if ours := formats.BY_NAME.get(kind):
        return ours.random_blocks(count, rng, SCALE)
    raw = rng.integers(0, 256, (count, size), dtype=np.uint8)
    if kind == "IQ1_M":
        return _iq1_m_scales(raw, rng)
    if kind not in _HALVES:
        raise PT2Error(f"no random blocks for the type {kind}; leave it out of --types")
    offsets, size_of_scale = _HALVES[kind]
    for at in offsets:
        scale = size_of_scale * rng.uniform(0.5, 1.5, count)
        raw[:, at : at + 2] = scale.astype("<f2").view(np.uint8).reshape(count, 2)
    return raw


def _iq1_m_scales(raw: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """IQ1_M has its half-precision scale in the top four bits of its four 16-bit scale words."""
    scale = (SCALE / 8 * rng.uniform(0.5, 1.5, len(raw))).astype("<f2").view(np.uint16)
    words = raw[:, 48:56].copy().view("<u2")
    for i in range(4):
        words[:, i] = words[:, i] & 0x0FFF | (scale >> (4 * i) & 0xF) << 12
    raw[:, 48:56] = words.view(np.uint8)
    return raw


def norm_values(elements: int) -> bytes:
    """Weights of a norm: ones, so that activations keep their size."""
    return np.ones(elements, dtype="<f4").tobytes()


# ---------------------------------------------------------------------------------------- writing


def plan_file(shape: Shape, kind: str, types: dict[str, str]) -> tuple[bytes, list[Tensor], int]:
    """Header, tensors and total size in bytes of a synthetic file."""
    head, tensors = header_bytes(
        metadata(shape, kind), [(n, s, types[n]) for n, s in shape.tensors()]
    )
    return head, tensors, len(head) + tensors[-1].offset + padded(tensors[-1].nbytes)


def check_disk(folder: Path, needed: int) -> None:
    """Refuse before anything is written when the disk cannot hold all files of one shape.

    They are needed at the same time, because their runs are interleaved.

    Raises:
        PT2Error: too little space; both figures are named.
    """
    free = shutil.disk_usage(folder).free
    if needed + (64 << 20) > free:
        raise PT2Error(
            f"{folder} has {human_bytes(free)} free, the synthetic files of one shape take "
            f"{human_bytes(needed)}; use fewer --types or a smaller shape, or another --work"
        )


@dataclass(frozen=True)
class Piece:
    """`nbytes` bytes at `offset` of a file: `pool` from its beginning, over and over."""

    offset: int
    nbytes: int
    pool: bytes

    def write(self, fd: int) -> int:
        """Write the piece; returns `nbytes`."""
        whole, rest = divmod(self.nbytes, len(self.pool))
        buffers = [memoryview(self.pool)] * whole + [memoryview(self.pool)[:rest]]
        at, todo = self.offset, self.nbytes
        while todo:
            n = os.pwritev(fd, buffers[:MAX_BUFFERS], at)
            at, todo = at + n, todo - n
            while n:  # what was written is dropped from the front, maybe a part of a buffer
                taken = min(n, len(buffers[0]))
                buffers[0] = buffers[0][taken:]
                n -= taken
                if not buffers[0]:
                    del buffers[0]
        return self.nbytes


def pieces(head: bytes, tensors: Sequence[Tensor], rng: np.random.Generator) -> Iterator[Piece]:
    """The pieces of a file, none larger than about :data:`PIECE_BYTES`."""
    yield Piece(0, len(head), head)
    pools: dict[str, bytes] = {}
    for t in tensors:
        if len(t.shape) == 1:
            pool = norm_values(t.elements)
        else:
            if t.type.name not in pools:
                pools[t.type.name] = random_blocks(t.type.name, POOL_BLOCKS, rng).tobytes()
            pool = pools[t.type.name]
        step = max(1, PIECE_BYTES // len(pool)) * len(pool)
        for at in range(0, t.nbytes, step):
            yield Piece(len(head) + t.offset + at, min(step, t.nbytes - at), pool)


def write_synthetic(
    path: Path,
    shape: Shape,
    kind: str,
    types: dict[str, str],
    seed: int = 0,
    on_bytes: Callable[[int], None] | None = None,
    writers: int = 16,
) -> None:
    """Write one synthetic GGUF (atomic); the same arguments give the same bytes.

    Args:
        on_bytes: called with the bytes of each piece that is written.
        writers: threads that write at once, each into a place of its own. In a file system of
            memory that is several times as fast as one; more than the cores are no use.

    Raises:
        PT2Error: a type without random blocks, or the disk is full.
    """
    head, tensors, size = plan_file(shape, kind, types)
    rng = np.random.default_rng(seed)
    with atomic_path(path) as tmp, tmp.open("r+b") as f:
        f.truncate(size)  # what lies between the tensors is zero
        with ThreadPoolExecutor(min(writers, usable_cores())) as pool:
            jobs = [pool.submit(p.write, f.fileno()) for p in pieces(head, tensors, rng)]
            try:
                for job in as_completed(jobs):
                    if on_bytes is not None:
                        on_bytes(job.result())
                    job.result()
            finally:
                pool.shutdown(cancel_futures=True)
