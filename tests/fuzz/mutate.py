"""Changes at random to bytes, JSON, safetensors, YAML and GGUF files."""

from __future__ import annotations

import copy
import json
import random
import re
import struct
from typing import Any

from pt2_core import formats

from . import gguf_file

Rng = random.Random

ODD_INTEGERS = (0, 1, 2, -1, 127, 255, 4096, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**60, 2**63 - 1,
                2**63, 2**64 - 1)  # fmt: skip
# Written as they stand: what json.dumps would not write.
RAW = ("NaN", "Infinity", "-Infinity", "1e999", "1e308", "-0.0", "9" * 5000, "1" + "0" * 400,
       "[" * 2000 + "]" * 2000, '{"a":' * 300 + "1" + "}" * 300, '"\\ud800"', "[0,0,0,0,0,0,0,0,0]",
       "[" + "1," * 3000 + "1]", '{"a": 1, "a": 2}', "1.0", "tru", '"\\u0000"')  # fmt: skip
ODD_VALUES = (None, True, False, 1.5, -1.5, "", "x", "a" * 3000, "../../etc/passwd", [], {}, [[]],
              {"": 1}, *ODD_INTEGERS)  # fmt: skip
ODD_YAML = ("[" * 5000, "{a: " * 3000, "&a [*a]", "&a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", ".nan",
            ".inf", "1e999", "2001-99-99", "!!bool x", '!!int ""', "!!float x", "!!timestamp x",
            "!!binary x", "!!set x", "!!python/object/apply:os.system [true]", "? [a]\n: b", "{}",
            "[]", "-1", "9" * 5000, "1:" * 500 + "1", "0x", "0b", "null", "yes", "'\x01'", "|",
            "<<: 1", "\t", "%YAML 9", "---", "!!omap x", "!!pairs x", "!!null x")  # fmt: skip
DOUBTFUL = (b"\xff" * 4, b"\x00" * 4, b"\x00\x7e", b"\x00\x7c", b"\x00\xfc", b"\x00\x00\xc0\x7f",
            b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff", b"\xff\xff\xff\x7f")  # fmt: skip


def mutate_bytes(data: bytes, rng: Rng) -> bytes:
    """Flip, cut, insert, repeat or overwrite."""
    out = bytearray(data)
    at = rng.randrange(len(out) + 1)
    if rng.random() < 0.5:  # headers stand in front
        at = min(at, rng.randrange(1, 400))
    kind = rng.randrange(7)
    if kind == 0 and at < len(out):
        out[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del out[at : at + rng.choice((1, 2, 8, 100, len(out)))]
    elif kind == 2:
        out[at:at] = rng.randbytes(rng.choice((1, 2, 8, 64)))
    elif kind == 3:
        out[at : at + 8] = struct.pack("<Q", rng.choice(ODD_INTEGERS) % 2**64)
    elif kind == 4:
        piece = rng.choice(DOUBTFUL)
        out[at : at + len(piece)] = piece
    elif kind == 5:
        out[at:at] = out[at : at + rng.choice((1, 8, 64, 500))]
    else:
        end = at + rng.choice((1, 4, 32, 256))
        out[at:end] = rng.choice((b"\xff", b"\x00", b"9", b"[", b" ")) * len(out[at:end])
    return bytes(out)


def mutate_json(text: bytes, rng: Rng) -> bytes:
    """Change one to three nodes of a JSON text, now and then its bytes."""
    if rng.random() < 0.1:
        return mutate_bytes(text, rng)
    value = json.loads(text)
    raw: list[str] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _mutate_node(value, rng, raw)
    out = json.dumps(value)
    for i, words in enumerate(raw):
        out = out.replace(json.dumps(_mark(i)), words)
    return out.encode("utf-8", "surrogatepass")


def _mark(i: int) -> str:
    return f"@raw {i}@"


def _odd(rng: Rng, raw: list[str]) -> Any:
    if rng.random() < 0.5:
        return copy.deepcopy(rng.choice(ODD_VALUES))
    raw.append(rng.choice(RAW))
    return _mark(len(raw) - 1)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every node below the top."""
    found, stack = [], [value]
    while stack:
        node = stack.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, inner in list(items):
            found.append((node, key))
            if isinstance(inner, dict | list):
                stack.append(inner)
    return found


def _mutate_node(value: Any, rng: Rng, raw: list[str]) -> Any:
    places = _places(value) if isinstance(value, dict | list) else []
    if not places or rng.random() < 0.01:
        return _odd(rng, raw)
    node, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind <= 2:
        node[key] = _odd(rng, raw)
    elif kind == 3:
        del node[key]
    elif kind == 4:
        node[key] = _other_type(node[key], rng)
    elif kind == 5:
        other, at = rng.choice(places)
        node[key] = copy.deepcopy(other[at])
    elif kind == 6 and isinstance(node, dict):
        node[rng.choice(("", "x", "a" * 500, key + "x", "\x1b[31m", "block-99999"))] = node[key]
        if rng.random() < 0.5:
            del node[key]
    else:
        node[key] = [node[key]] if rng.random() < 0.5 else {"x": node[key]}
    return value


def _other_type(value: Any, rng: Rng) -> Any:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int | float):
        return rng.choice((float(value), str(value), -value, value + 1, value * 2, value + 0.5,
                           bool(value)))  # fmt: skip
    if isinstance(value, str):
        return rng.choice((value.upper(), value[:-1], value + "\n", [value], len(value)))
    return str(value)


def mutate_safetensors(data: bytes, rng: Rng) -> bytes:
    """Change the header's JSON (its length kept right or not), or the data, or any byte."""
    kind = rng.random()
    length = struct.unpack("<Q", data[:8])[0]
    head, rest = data[8 : 8 + length], data[8 + length :]
    if kind < 0.2:
        return mutate_bytes(data, rng)
    if kind < 0.5:
        piece, at = rng.choice(DOUBTFUL), rng.randrange(len(rest))
        at -= at % len(piece)
        return data[: 8 + length] + (rest[:at] + piece + rest[at + len(piece) :])[: len(rest)]
    notes = json.loads(head)
    if kind < 0.8 and "__metadata__" in notes:  # what the records in the metadata say
        name = rng.choice(sorted(notes["__metadata__"]))
        inner = notes["__metadata__"][name].encode()
        inner = mutate_json(inner, rng) if inner[:1] in b"{[" else mutate_bytes(inner, rng)
        notes["__metadata__"][name] = inner.decode("utf-8", "replace")
        head = json.dumps(notes).encode()
    else:
        head = mutate_json(head, rng)
    stated = len(head) if rng.random() < 0.95 else rng.choice(ODD_INTEGERS) % 2**64
    return struct.pack("<Q", stated) + head + rest


def mutate_yaml(text: bytes, rng: Rng) -> bytes:
    """Change a value, a name or a line."""
    lines = text.decode().splitlines()
    at = rng.randrange(len(lines))
    kind = rng.randrange(8)
    name, colon, value = lines[at].partition(":")
    if kind <= 2:
        lines[at] = f"{name}{colon} {rng.choice(ODD_YAML)}"
    elif kind == 3:
        lines[at] = f"{rng.choice(ODD_YAML)}{colon}{value}"
    elif kind == 4:
        lines.insert(at, rng.choice((lines[at], *ODD_YAML)))
    elif kind == 5:
        del lines[at]
    elif kind == 6:
        lines[at] = re.sub(r"\d+", lambda m: str(rng.choice((0, 1, 64, 128, 999))), lines[at])
    else:
        return mutate_bytes(text, rng)
    return ("\n".join(lines) + "\n").encode()


def mutate_text(text: bytes, rng: Rng) -> bytes:
    """A word of digits and units."""
    if rng.random() < 0.5:
        return mutate_bytes(text, rng)
    return "".join(rng.choice("0123456789.KMGBeE-+ ٣n") for _ in range(rng.choice((1, 3, 6, 400)))
                   ).encode()  # fmt: skip


def mutate_gguf(seed: gguf_file.File, rng: Rng) -> bytes:
    """Change a field, with the rest of the file still fitting; or bytes of the header."""
    if rng.random() < 0.3:
        return mutate_bytes(seed.to_bytes(), rng)
    file = copy.copy(seed)
    file.keys, file.tensors = list(seed.keys), [copy.copy(t) for t in seed.tensors]
    for _ in range(rng.choice((1, 1, 2))):
        rng.choice((_mutate_key, _mutate_key, _mutate_tensor, _mutate_tensor, _mutate_counts))(
            file, rng
        )
    return file.to_bytes()


def _mutate_key(file: gguf_file.File, rng: Rng) -> None:
    at = rng.randrange(len(file.keys))
    key, kind, value = file.keys[at]
    what = rng.randrange(6)
    if what == 0:
        kind = rng.choice((*range(13), 13, 2**32 - 1))
        size = struct.calcsize(gguf_file.FORMATS.get(kind, "Q"))
        doubtful = rng.choice((rng.randbytes(8), b"\xff" * 8, b"\x01" + bytes(7)))
        value = doubtful if kind == gguf_file.STRING else doubtful[:size]
    elif what == 1 and kind in gguf_file.FORMATS:
        size = struct.calcsize(gguf_file.FORMATS[kind])
        value = (rng.choice(ODD_INTEGERS) % 2**64).to_bytes(8, "little")[:size]
    elif what == 2:
        key = rng.choice((b"", b"\xff", b"general.alignment", rng.choice(file.keys)[0]))
    elif what == 3:  # a number of another kind, NaN and infinities among them
        kind = rng.choice((5, 6, 7, 10, 11, 12))
        value = rng.choice((1, 3, 0)) if kind != 6 else rng.choice((1.5, float("nan"), 3e38))
        if kind == 12:
            value = rng.choice((float("inf"), float("nan"), 1.0))
    elif what == 4:
        del file.keys[at]
        return
    else:
        kind = gguf_file.ARRAY
        value = struct.pack("<IQ", rng.randrange(14), rng.choice(ODD_INTEGERS) % 2**64)
    file.keys[at] = (key, kind, value)


def _mutate_tensor(file: gguf_file.File, rng: Rng) -> None:
    t = rng.choice(file.tensors)
    what = rng.randrange(7)
    if what == 0:
        ours = [t.id for t in formats.ALL]
        others = (0, 1, 2, 4, 8, 10, 15, 30, 36, 43, max(ours) + 1, 2**32 - 1)
        t.type = rng.choice((*others, *ours))
    elif what == 1 and t.dims:
        t.dims = list(t.dims)
        t.dims[rng.randrange(len(t.dims))] = rng.choice(ODD_INTEGERS) % 2**64
    elif what == 2:
        t.dims = rng.choice(([], t.dims * 3, [*t.dims, 1], t.dims[::-1], [2**32, 2**32]))
    elif what == 3:
        t.offset = rng.choice((0, 1, 32, *ODD_INTEGERS)) % 2**64
    elif what == 4:
        t.name = rng.choice((b"", b"\xff", t.name + b"x", rng.choice(file.tensors).name))
    elif what == 5:
        t.data = t.data[: rng.randrange(len(t.data) + 1)]
    else:
        piece = rng.choice(DOUBTFUL)
        at = rng.randrange(len(t.data))
        t.data = (t.data[:at] + piece + t.data[at + len(piece) :])[: len(t.data)]


def _mutate_counts(file: gguf_file.File, rng: Rng) -> None:
    count = rng.choice((0, 1, 5, 2**32, 2**60, 2**64 - 1))
    what = rng.randrange(3)
    if what == 0:
        file.n_keys = count
    elif what == 1:
        file.n_tensors = count
    else:
        file.version = rng.choice((0, 1, 2, 4, 2**31))
