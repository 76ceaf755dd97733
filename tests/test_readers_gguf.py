"""The reader of GGUF: a file or one line, whatever it holds; each kind of fault by an example."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest
from fuzz import gguf_file, programs
from reader_support import refused

from pt2_core.formats import DEFAULT, Q8_T
from pt2_core.gguf_info import read_gguf

LAYOUT = DEFAULT.layout_key()


def read_changed(tmp_path: Path, change, kind: str = DEFAULT.ggml_name):
    """read_gguf of a file of a type, one thing of it changed."""
    file = gguf_file.tiny_file(kind, layers=1)
    change(file)
    (tmp_path / "m.gguf").write_bytes(file.to_bytes())
    return read_gguf(tmp_path / "m.gguf")


def key(name: str, kind: int, value: object):
    def change(file: gguf_file.File) -> None:
        file.keys = [k for k in file.keys if k[0] != name.encode()]
        file.keys.append((name.encode(), kind, value))

    return change


def entry(number: int, **changes: object):
    def change(file: gguf_file.File) -> None:
        for name, value in changes.items():
            setattr(file.tensors[number], name, value)

    return change


def counts(**changes: int):
    def change(file: gguf_file.File) -> None:
        for name, value in changes.items():
            setattr(file, name, value)

    return change


def twice(part: str):
    def change(file: gguf_file.File) -> None:
        getattr(file, part).append(getattr(file, part)[0])

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (key("llama.attention.head_count", 6, math.nan), "head_count"),
        (key("llama.attention.head_count", 12, math.inf), "head_count"),
        (key("llama.block_count", 6, 2.0), "block_count"),
        (key("llama.block_count", 5, -1), "block_count"),
        (key("llama.embedding_length", 7, True), "embedding_length"),
        (key("llama.expert_used_count", 4, 8), "experts"),
        (key("general.alignment", 7, True), "alignment"), (key("general.alignment", 4, 0), "align"),
        (key("general.alignment", 4, 24), "alignment"),
        (key("general.architecture", 4, 7), "general.architecture"),
        (key(LAYOUT, 7, True), "layout"), (key(LAYOUT, 6, 1.0), "layout"),
        (key(LAYOUT, 11, 1), "layout"), (key(LAYOUT, 4, 2), "layout"),
        (key("x", 9, struct.pack("<IQ", 8, 2**60)), "truncated"),
        (key("x", 9, struct.pack("<IQ", 0, 2**63)), "truncated"),
        (key("x", 8, b""), ""), (key("x", 13, b""), "value type"),
        (counts(n_keys=2**60), "truncated"), (counts(n_tensors=2**60), "truncated"),
        (counts(n_tensors=2**64 - 1), "truncated"), (twice("keys"), "twice"),
        (twice("tensors"), "twice"), (entry(0, type=Q8_T.id), f"unknown ggml type {Q8_T.id}"),
        (entry(0, type=43), "unknown ggml type"), (entry(1, offset=0), "is at byte"),
        (entry(0, offset=2**64 - 32), "truncated"), (entry(0, dims=[2**63, 2]), "shape"),
        (entry(0, dims=[2**62, 2**62]), "truncated"), (entry(0, dims=[256] * 5), "dimensions"),
        (entry(0, dims=[100, 4]), "blocks of"), (entry(0, dims=[0, 4]), "shape"),
    ],
)  # fmt: skip
def test_gguf_files_with_a_wrong_field_are_refused(tmp_path: Path, change, words: str):
    if words == "":  # the control: a harmless key more
        assert read_changed(tmp_path, change).parameters > 0
        return
    with refused(words):
        read_changed(tmp_path, change)


def with_type_122(path: Path, name: bytes) -> Path:
    """A file that fits together, one tensor of which is of the type of activations."""
    file = gguf_file.tiny_file(DEFAULT.ggml_name)
    t = next(t for t in file.tensors if t.name == name)
    t.type, t.data = Q8_T.id, bytes(math.prod(t.dims) // Q8_T.block * Q8_T.nbytes)
    path.write_bytes(file.to_bytes())
    return path


@pytest.mark.llama
@pytest.mark.parametrize("name", [b"blk.0.ffn_down.weight", b"token_embd.weight", b"output.weight"])
def test_a_tensor_of_the_type_of_activations_is_refused_by_every_program(tmp_path: Path, name):
    model = with_type_122(tmp_path / "m.gguf", name)
    with refused(f"unknown ggml type {Q8_T.id}"):
        read_gguf(model)
    for program in programs.PROGRAMS:
        code, words = programs.run_program(program, model)
        assert code == 1, (program, code, words)
    assert "of type q8_t, which is never in a file" in words  # llama-quantize loses no lines
