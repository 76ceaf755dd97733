"""Read (and write) the header of a GGUF file: metadata and the list of tensors.

A reader of our own, for two reasons: gguf-py raises on tensor types it does not know, and a file
that is cut short or is not GGUF at all has to end in one clear line rather than in a traceback.
Every length in the file is checked against the file's size before anything is read or allocated.

The format is described in llama.cpp's ggml/include/gguf.h: magic, version, counts, key-value
pairs, tensor infos, then the data, aligned to `general.alignment` (32 if absent).
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pt2_core import formats
from pt2_core.errors import PT2Error
from pt2_core.files import first_double
from pt2_core.ggml_types import BY_NAME, TYPES, GGMLType

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_UINT32, _STRING, _ARRAY = 4, 8, 9
# Far above any model, and few enough to read in a second.
MAX_ENTRIES, MAX_STRINGS, MAX_STRING = 1 << 20, 1 << 22, 1 << 24
HPARAMS = (
    "block_count", "embedding_length", "attention.head_count", "attention.head_count_kv",
    "attention.key_length", "attention.value_length", "expert_count", "expert_used_count",
)  # fmt: skip


@dataclass(frozen=True)
class ArrayInfo:
    """An array in the metadata: only its element type id and length are kept."""

    type_id: int
    length: int


@dataclass(frozen=True)
class Tensor:
    """One tensor: `shape` is ggml's order (the row length first), `nbytes` its size in the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int

    @property
    def elements(self) -> int:
        n = 1
        for d in self.shape:
            n *= d
        return n

    @property
    def nbytes(self) -> int:
        return self.type.size(self.elements)


@dataclass
class GGUFInfo:
    """Header of a model, over all of its shards.

    `file_bytes` is the size on disk of every shard; `tensors` lists the tensors of all of them.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: list[Tensor]
    file_bytes: int
    shards: list[Path] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(t.elements for t in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits of the file over parameters: the true size, with header, norms and embeddings."""
        return 8 * self.file_bytes / self.parameters

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "unknown"))

    def hparam(self, key: str, default: int = 0) -> int:
        """An integer hyper-parameter of the architecture, e.g. ``hparam("block_count")``.

        ``default`` where it is not stated, or stated per block (an array).
        """
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        return default if isinstance(value, ArrayInfo) else int(value)

    def types(self) -> dict[str, dict[str, int]]:
        """Per tensor type: how many tensors, values and bytes."""
        out: dict[str, dict[str, int]] = {}
        for t in self.tensors:
            row = out.setdefault(t.type.name, {"tensors": 0, "elements": 0, "bytes": 0})
            row["tensors"] += 1
            row["elements"] += t.elements
            row["bytes"] += t.nbytes
        return dict(sorted(out.items(), key=lambda kv: -kv[1]["bytes"]))

    def main_type(self) -> str:
        """The type that holds most of the bytes of the block matrices."""
        sizes: dict[str, int] = {}
        for t in self.tensors:
            if len(t.shape) > 1 and t.name.startswith("blk."):
                sizes[t.type.name] = sizes.get(t.type.name, 0) + t.nbytes
        return max(sizes, key=lambda k: sizes[k]) if sizes else next(iter(self.types()), "?")

    def decode_bytes(self) -> int:
        """Bytes of weights that one decoded token has to read at batch 1.

        Every weight once, but of the token embeddings one row only (all of them where they are
        also the head), and of the experts of a mixture the share that is used.
        """
        tied = not any(t.name == "output.weight" for t in self.tensors)
        n_expert, n_used = self.hparam("expert_count"), self.hparam("expert_used_count")
        total = 0.0
        for t in self.tensors:
            share = 1.0
            if t.name == "token_embd.weight" and not tied:
                share = 1 / max(1, t.elements // t.shape[0])
            elif "_exps." in t.name and n_expert:
                share = n_used / n_expert
            total += t.nbytes * share
        return round(total)

    def kv_bytes_per_token(self) -> int:
        """Bytes of an f16 KV cache per token of context (0 where the shape is not stated)."""
        heads = self.hparam("attention.head_count")
        if not heads:
            return 0
        kv_heads = self.hparam("attention.head_count_kv", heads)
        width = self.hparam("embedding_length") // heads
        key = self.hparam("attention.key_length", width)
        value = self.hparam("attention.value_length", width)
        return 2 * self.hparam("block_count") * kv_heads * (key + value)


class _Reader:
    """Bounds-checked little-endian reads; each failure is a PT2Error that names the place."""

    def __init__(self, f: BinaryIO, path: Path) -> None:
        self.f, self.path = f, path
        self.size = os.fstat(f.fileno()).st_size
        self.at = 0

    def fail(self, what: str) -> PT2Error:
        return PT2Error(f"{self.path} is not a usable GGUF file: {what}")

    def need(self, n: int, what: str) -> None:
        if self.at + n > self.size:
            raise PT2Error(
                f"{self.path} is truncated: {what} at byte {self.at} needs {n} bytes, "
                f"the file has {self.size}; copy or make it again"
            )

    def take(self, n: int, what: str) -> bytes:
        self.need(n, what)
        data = self.f.read(n)
        if len(data) != n:
            raise self.fail(f"{what} could not be read at byte {self.at}")
        self.at += n
        return data

    def skip(self, n: int, what: str) -> None:
        self.need(n, what)
        self.f.seek(n, os.SEEK_CUR)
        self.at += n

    def scalar(self, fmt: str, what: str) -> Any:
        return struct.unpack("<" + fmt, self.take(struct.calcsize("<" + fmt), what))[0]

    def count(self, n: int, most: int, nbytes: int, what: str) -> int:
        """``n`` entries of at least ``nbytes`` each, if the file has room for them."""
        self.need(nbytes * n, f"a list of {n} {what}")
        if n > most:
            raise self.fail(f"it lists {n} {what}")
        return n

    def string(self, what: str) -> str:
        length = self.scalar("Q", f"the length of {what}")
        if length > MAX_STRING:
            self.need(length, what)
            raise self.fail(f"{what} is a text of {length} bytes")
        raw = self.take(length, what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as e:
            raise self.fail(f"{what} near byte {self.at} is not UTF-8") from e

    def value(self, type_id: int, what: str) -> Any:
        if type_id in _SCALARS:
            return self.scalar(_SCALARS[type_id], what)
        if type_id == _STRING:
            return self.string(what)
        if type_id == _ARRAY:
            return self.array(what)
        raise self.fail(f"{what} has the unknown value type {type_id}")

    def array(self, what: str) -> ArrayInfo:
        type_id, length = self.scalar("I", what), self.scalar("Q", what)
        if type_id in _SCALARS:
            self.skip(length * struct.calcsize("<" + _SCALARS[type_id]), what)
        elif type_id == _STRING:
            self.count(length, MAX_STRINGS, 8, f"texts in {what}")
            for _ in range(length):
                self.skip(self.scalar("Q", what), what)
        else:
            raise self.fail(f"{what} is an array of the unknown type {type_id}")
        return ArrayInfo(type_id, length)


def _read_tensor(r: _Reader) -> Tensor:
    name = r.string("a tensor's name")
    what = f"tensor {name!r}"
    n_dims = r.scalar("I", what)
    if not 1 <= n_dims <= MAX_DIMS:
        raise r.fail(f"{what} has {n_dims} dimensions")
    shape = tuple(r.scalar("Q", what) for _ in range(n_dims))
    type_id, offset = r.scalar("I", what), r.scalar("Q", what)
    if type_id not in TYPES:
        raise r.fail(f"{what} has the unknown ggml type {type_id}; this tool may be too old for it")
    kind = TYPES[type_id]
    if 0 in shape or max(shape) >= 1 << 63 or shape[0] % kind.block:
        raise r.fail(f"{what} of shape {shape} does not fill blocks of {kind.block} ({kind.name})")
    return Tensor(name, shape, kind, offset)


def _read_one(path: Path) -> tuple[dict[str, Any], list[Tensor], int]:
    """Metadata, tensors and file size of one shard."""
    with path.open("rb") as f:
        r = _Reader(f, path)
        if r.size < 4 or (magic := r.take(4, "the magic")) != MAGIC:
            found = repr(magic) if r.size >= 4 else f"only {r.size} bytes"
            raise PT2Error(f"{path} is not a GGUF file (it begins with {found}, not b'GGUF')")
        version = r.scalar("I", "the version")
        if version not in (2, 3):
            raise r.fail(f"version {version} (2 and 3 are known; is it a big-endian file?)")
        n_tensors, n_kv = r.scalar("Q", "the tensor count"), r.scalar("Q", "the key count")
        metadata: dict[str, Any] = {}
        kinds: dict[str, int] = {}
        for _ in range(r.count(n_kv, MAX_ENTRIES, 12, "keys")):
            key = r.string("a metadata key")
            if key in metadata or not key:
                raise r.fail(f"key {key!r} is there twice" if key else "a key without a name")
            kinds[key] = r.scalar("I", f"key {key!r}")
            metadata[key] = r.value(kinds[key], f"key {key!r}")
        _check_kinds(r, metadata, kinds)
        tensors = [_read_tensor(r) for _ in range(r.count(n_tensors, MAX_ENTRIES, 24, "tensors"))]
        _check_extent(r, metadata, tensors)
        return metadata, tensors, r.size


def _check_kinds(r: _Reader, metadata: Mapping[str, Any], kinds: Mapping[str, int]) -> None:
    """What is computed with must be of the type that llama.cpp asks for as well."""
    if kinds.get("general.architecture", _STRING) != _STRING:
        raise r.fail("general.architecture is no text")
    arch = metadata.get("general.architecture", "unknown")
    hparams = [f"{arch}.{name}" for name in HPARAMS]
    layouts = [k for t in formats.TYPES.values() for k in (t.layout_key(), t.levels_key())]
    for key in ("general.alignment", *layouts, *hparams):
        kind = kinds.get(key, _UINT32)
        if kind != _UINT32 and not (kind == _ARRAY and key in hparams):
            raise r.fail(f"key {key!r} is {metadata[key]!r}, not a uint32")


def _check_extent(r: _Reader, metadata: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
    """Every tensor's bytes must lie inside the file, each tensor's behind those of the last."""
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if alignment <= 0 or alignment & (alignment - 1):
        raise r.fail(f"general.alignment is {alignment!r}, not a power of two")
    start = -(-r.at // alignment) * alignment
    if (twice := first_double(t.name for t in tensors)) is not None:
        raise r.fail(f"tensor {twice!r} is there twice")
    expected = 0
    for t in tensors:
        end = start + t.offset + t.nbytes
        if end > r.size:
            raise PT2Error(
                f"{r.path} is truncated: tensor {t.name!r} ends at byte {end}, the file has "
                f"{r.size}; copy or make it again"
            )
        if t.offset != expected:
            raise r.fail(f"tensor {t.name!r} is at byte {t.offset} of the data, not {expected}")
        expected += -(-t.nbytes // alignment) * alignment


_SHARD = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")


def _shards(path: Path, count: int) -> list[Path]:
    match = _SHARD.match(path.name)
    if match is None or int(match[3]) != count:
        raise PT2Error(
            f"{path} says it is one of {count} shards; name it like model-00001-of-{count:05d}.gguf"
        )
    return [path.with_name(f"{match[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]


def read_gguf(path: str | os.PathLike[str]) -> GGUFInfo:
    """Read the header of a GGUF file, and of its other shards when it is split.

    Raises:
        PT2Error: no such file, not GGUF, truncated, a tensor type or a value type that is not
            known, or a layout of one of ours that is missing or not known.
    """
    path = Path(path)
    if not path.is_file():
        raise PT2Error(f"{path}: no such file; give the path of a .gguf file")
    metadata, tensors, size = _read_one(path)
    count = metadata.get("split.count", 0)
    shards = [path]
    if isinstance(count, int) and not isinstance(count, bool) and count > 1:
        shards = _shards(path, count)
        metadata, tensors, size = {}, [], 0
        for shard in shards:
            if not shard.is_file():
                raise PT2Error(f"{shard} is missing; the model has {count} shards")
            m, t, s = _read_one(shard)
            metadata, tensors, size = {**m, **metadata}, tensors + t, size + s
        if (twice := first_double(t.name for t in tensors)) is not None:
            raise PT2Error(f"{path}: tensor {twice!r} is in two shards; split the model again")
    if not tensors:
        raise PT2Error(f"{path} holds no tensors; give a model, not a vocabulary or an adapter")
    info = GGUFInfo(path, metadata, tensors, size, shards)
    check_layouts(info)
    used, experts = info.hparam("expert_used_count"), info.hparam("expert_count")
    if used > experts:
        raise PT2Error(f"{path} is not a usable GGUF file: it uses {used} of {experts} experts")
    return info


def check_layouts(info: GGUFInfo) -> None:
    """Refuse a file with a type of ours whose layout is not stated, or not the one known here."""
    present = {t.type.name for t in info.tensors}
    for kind in formats.TYPES.values():
        key = kind.layout_key()
        layout = info.metadata.get(key)
        if kind.name in present and layout != kind.layout:
            state = "is missing" if layout is None else f"is {layout}"
            raise PT2Error(
                f"{info.path}: {key} {state}, known here: {kind.layout}; export the model again"
            )
        levels = info.metadata.get(kind.levels_key(), 3)
        if levels not in range(3, kind.levels + 1):
            raise PT2Error(
                f"{info.path}: {kind.levels_key()} is {levels}, but {kind.name} has "
                f"{kind.levels} codes; export the model again"
            )


# ------------------------------------------------------------------------------------- writing


def _pack_string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _pack_value(value: str | bool | int | float) -> bytes:
    """Type id and bytes of a scalar: bool, uint32 (uint64 above 2**32), float32 or string."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value) if value < 1 << 32 else struct.pack("<IQ", 10, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<I", _STRING) + _pack_string(value)


def header_bytes(
    metadata: Mapping[str, str | bool | int | float],
    tensors: Iterable[tuple[str, tuple[int, ...], str]],
) -> tuple[bytes, list[Tensor]]:
    """Make the header of a GGUF file, padded so that the tensor data can follow at once.

    Args:
        metadata: scalars only.
        tensors: name, shape in ggml's order, and type name, in the order of their data; each
            tensor's data has to be padded to 32 bytes.

    Returns:
        The bytes, and the tensors with their offsets into the data.
    """
    listed: list[Tensor] = []
    offset = 0
    body = b""
    for name, shape, type_name in tensors:
        t = Tensor(name, shape, BY_NAME[type_name], offset)
        listed.append(t)
        body += _pack_string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        body += struct.pack("<IQ", t.type.id, offset)
        offset += padded(t.nbytes)
    head = MAGIC + struct.pack("<IQQ", 3, len(listed), len(metadata))
    for key, value in metadata.items():
        head += _pack_string(key) + _pack_value(value)
    raw = head + body
    return raw + bytes(padded(len(raw)) - len(raw)), listed


def padded(n: int) -> int:
    """``n`` bytes rounded up to the alignment of tensor data."""
    return -(-n // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
