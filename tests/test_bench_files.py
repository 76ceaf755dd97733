"""pt2-bench: reading GGUF headers, sizes, synthetic files."""

from __future__ import annotations

import errno
import os
import re
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from bench_support import METADATA, TENSORS, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from llamacpp_bench.run import synthetic
from llamacpp_bench.run.synthetic import (
    SHAPES,
    Shape,
    check_disk,
    parse_dry_run,
    parse_shapes,
    parse_types,
    plan_file,
    random_blocks,
    write_synthetic,
)
from pt2_core import formats
from pt2_core.errors import PT2Error
from pt2_core.formats import DEFAULT, SMALLEST
from pt2_core.ggml_types import BY_NAME, FILE_TYPES
from pt2_core.gguf_info import header_bytes, read_gguf

WRITABLE = sorted(set(BY_NAME) - {"Q8_1", "Q8_K"})


def test_sizes_and_bpw_are_exact(tmp_path: Path) -> None:
    info = read_gguf(write_gguf(tmp_path / "m.gguf"))
    assert info.parameters == 256 * (8 + 4 + 4 + 1 + 8)
    assert info.file_bytes == (tmp_path / "m.gguf").stat().st_size
    assert info.bpw == 8 * info.file_bytes / info.parameters
    row = 256 // 32 * 34
    assert [t.nbytes for t in info.tensors] == [8 * row, 4 * row, 4 * row, 1024, 8 * row]
    assert info.types()["Q8_0"] == {"tensors": 4, "elements": 24 * 256, "bytes": 24 * row}
    assert info.main_type() == "Q8_0"


def test_decode_reads_one_row_of_the_embeddings_unless_they_are_the_head(tmp_path: Path) -> None:
    row = 256 // 32 * 34
    info = read_gguf(write_gguf(tmp_path / "m.gguf"))
    assert info.decode_bytes() == row * (1 + 4 + 4 + 8) + 1024
    tied = read_gguf(write_gguf(tmp_path / "tied.gguf", TENSORS[:-1]))
    assert tied.decode_bytes() == row * (8 + 4 + 4) + 1024
    # 2 layers, 2 key-value heads of 64, keys and values of two bytes
    assert info.kv_bytes_per_token() == 2 * 2 * 2 * 64 * 2


def test_decode_reads_the_share_of_the_experts_that_is_used(tmp_path: Path) -> None:
    tensors = [
        ("token_embd.weight", (256, 8), "F16"),
        ("blk.0.ffn_up_exps.weight", (256, 4, 8), "F16"),
    ]
    metadata = {**METADATA, "llama.expert_count": 8, "llama.expert_used_count": 2}
    info = read_gguf(write_gguf(tmp_path / "moe.gguf", tensors, metadata))
    assert info.decode_bytes() == 256 * 8 * 2 + 256 * 4 * 8 * 2 // 4


def test_a_cut_at_every_byte_gives_one_line(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    head = len(header_bytes(METADATA, TENSORS)[0])
    path = tmp_path / "cut.gguf"
    for n in [*range(head + 1), len(whole) - 33]:
        path.write_bytes(whole[:n])
        with pytest.raises(PT2Error, match=r"truncated|not a GGUF") as e:
            read_gguf(path)
        assert "\n" not in str(e.value)


@given(at=st.integers(0, len(header_bytes(METADATA, TENSORS)[0]) - 1), value=st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_any_changed_byte_gives_a_header_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "flip.gguf"
    raw = bytearray(write_gguf(path).read_bytes())
    raw[at] = value
    path.write_bytes(raw)
    try:
        info = read_gguf(path)
    except PT2Error as e:
        assert str(path) in str(e)
    else:
        assert len(info.tensors) == len(TENSORS)


@given(
    rows=st.lists(
        st.tuples(st.sampled_from(WRITABLE), st.integers(1, 4), st.integers(1, 5)), min_size=1
    ),
    metadata=st.dictionaries(
        st.text(min_size=1).filter(lambda k: k != "general.alignment" and k != "split.count"),
        st.one_of(st.text(), st.booleans(), st.integers(0, 2**64 - 1), st.floats(width=32)),
    ),
)
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, int, int]],
    metadata: dict[str, str | bool | int | float],
) -> None:
    layouts: dict[str, str | bool | int | float] = {
        DEFAULT.layout_key(): 1,
        SMALLEST.layout_key(): 1,
    }
    metadata = {**metadata, **layouts}
    tensors = [
        (f"t{i}", (BY_NAME[kind].block * blocks, n), kind)
        for i, (kind, blocks, n) in enumerate(rows)
    ]
    path = tmp_path_factory.getbasetemp() / "round.gguf"
    info = read_gguf(write_gguf(path, tensors, metadata))
    assert [(t.name, t.shape, t.type.name) for t in info.tensors] == tensors
    for key, value in metadata.items():
        same = info.metadata[key] == value or (value != value)  # NaN
        assert same and type(info.metadata[key]) is type(value)


def test_shards_count_together(tmp_path: Path) -> None:
    for i, part in enumerate((TENSORS[:2], TENSORS[2:]), 1):
        metadata = {**METADATA, "split.count": 2}
        write_gguf(tmp_path / f"m-{i:05d}-of-00002.gguf", part, metadata)
    first = tmp_path / "m-00001-of-00002.gguf"
    info = read_gguf(first)
    assert len(info.tensors) == len(TENSORS)
    assert info.file_bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(PT2Error, match=r"00002-of-00002\.gguf is missing"):
        read_gguf(first)


@pytest.mark.parametrize(("layout", "state"), [(None, "is missing"), (2, "is 2")])
def test_an_unknown_layout_is_refused(tmp_path: Path, layout: int | None, state: str) -> None:
    tensors = [("blk.0.ffn_up.weight", (128, 2), DEFAULT.name)]
    extra: dict[str, str | bool | int | float] = {}
    if layout is not None:
        extra[DEFAULT.layout_key()] = layout
    path = write_gguf(tmp_path / "m.gguf", tensors, {**METADATA, **extra})
    with pytest.raises(PT2Error, match=f"pt2.{DEFAULT.ggml_name}.layout {state}"):
        read_gguf(path)


def test_other_bad_headers_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    good = write_gguf(path).read_bytes()
    bad = {
        "not a GGUF file": b"PK" + good[2:],
        "version 16777216": good[:4] + struct.pack(">I", 1) + good[8:],
        "unknown ggml type 31": good.replace(
            b"output_norm.weight" + struct.pack("<IQI", 1, 256, 0),
            b"output_norm.weight" + struct.pack("<IQI", 1, 256, 31),
        ),
        "does not fill blocks": good.replace(
            b"blk.0.ffn_up.weight" + struct.pack("<IQ", 2, 256),
            b"blk.0.ffn_up.weight" + struct.pack("<IQ", 2, 250),
        ),
    }
    for words, raw in bad.items():
        path.write_bytes(raw)
        with pytest.raises(PT2Error, match=words):
            read_gguf(path)
    with pytest.raises(PT2Error, match="no such file"):
        read_gguf(tmp_path / "none.gguf")


# ---------------------------------------------------------------------------------------- synthetic


@pytest.mark.parametrize("kind", WRITABLE)
def test_random_blocks_have_the_size_of_the_type(kind: str) -> None:
    rng = np.random.default_rng(0)
    try:
        raw = random_blocks(kind, 64, rng)
    except PT2Error as e:
        assert kind in ("I8", "I16", "I32", "I64", "F64", "MXFP4", "NVFP4"), e
        return
    assert raw.shape == (64, BY_NAME[kind].nbytes) and raw.dtype == np.uint8
    assert len(np.unique(raw, axis=0)) > 32


@pytest.mark.parametrize(
    "kind",
    [*("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0"),
     *("TQ2_0", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL"),
     *("IQ4_XS", "F16", "BF16", "F32")],
)  # fmt: skip
def test_random_weights_are_small_and_finite(kind: str) -> None:
    raw = random_blocks(kind, 256, np.random.default_rng(1))
    values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    assert np.isfinite(values).all()
    assert 0.002 < np.sqrt(np.mean(np.square(values, dtype=np.float64))) < 0.2


def test_ternary_blocks_are_valid_codes() -> None:
    rng = np.random.default_rng(2)
    for kind in formats.TYPES.values():
        raw = random_blocks(kind.name, 500, rng)
        codes, alpha, mu = kind.unpack(raw)
        assert np.unique(codes).tolist() == [0, 1, 2]  # ternary, whatever else the type holds
        assert (kind.pack(codes, alpha, mu) == raw).all()


def test_a_synthetic_file_has_the_shape_it_claims(tmp_path: Path) -> None:
    shape = SHAPES["tiny"]
    types = {n: DEFAULT.name if len(s) > 1 else "F32" for n, s in shape.tensors()}
    path = tmp_path / "s.gguf"
    write_synthetic(path, shape, DEFAULT.name, types)
    info = read_gguf(path)
    assert info.file_bytes == plan_file(shape, DEFAULT.name, types)[2]
    assert {t.name: t.shape for t in info.tensors} == dict(shape.tensors())
    assert "random weights" in str(info.metadata["general.name"])
    write_synthetic(tmp_path / "again.gguf", shape, DEFAULT.name, types)
    assert path.read_bytes() == (tmp_path / "again.gguf").read_bytes()


def test_pieces_written_at_once_give_the_file_that_one_after_another_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces smaller than a tensor, writes that end in the middle of a buffer: the same bytes."""
    shape = SHAPES["tiny"]
    types = {n: SMALLEST.name if len(s) > 1 else "F32" for n, s in shape.tensors()}
    write_synthetic(tmp_path / "whole.gguf", shape, SMALLEST.name, types, writers=1)
    monkeypatch.setattr(synthetic, "PIECE_BYTES", 5000)
    whole_write = os.pwritev

    def short_write(fd: int, buffers: list[memoryview], at: int) -> int:
        data = b"".join(buffers)
        return whole_write(fd, [data[: max(1, 2 * len(data) // 3)]], at)

    for write in (whole_write, short_write):
        monkeypatch.setattr(synthetic.os, "pwritev", write)
        seen: list[int] = []
        path = tmp_path / "pieces.gguf"
        monkeypatch.setattr(synthetic, "usable_cores", lambda: 4)
        write_synthetic(path, shape, SMALLEST.name, types, on_bytes=seen.append)
        assert path.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
        assert 0 < sum(seen) <= path.stat().st_size and max(seen) <= 2 << 20
    monkeypatch.setattr(synthetic.os, "pwritev", lambda *args: (_ for _ in ()).throw(full))
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PT2Error, match="the disk is full"):
        write_synthetic(tmp_path / "full.gguf", shape, SMALLEST.name, types)
    assert not (tmp_path / "full.gguf").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("name", "billions"),
    [("1b", 1.10), ("7b", 6.74), ("13b", 13.02), ("30b", 32.53), ("65b", 65.29)],
)
def test_shapes_have_the_parameters_of_their_models(name: str, billions: float) -> None:
    count = sum(int(np.prod(s)) for _, s in SHAPES[name].tensors())
    assert round(count / 1e9, 2) == billions


def test_dry_run_lines_are_read() -> None:
    text = (
        "[   1/  56] output_norm.weight  - [   256,      1,      1,      1], type =    f32, "
        "size =    0.001 MiB\n"
        "[   2/  56] token_embd.weight   - [   256,   8192,      1,      1], type =   f16, "
        "size =     4.00 MiB ->     1.64 MiB (q6_K)\nnoise\n"
    )
    assert parse_dry_run(text) == {"output_norm.weight": "F32", "token_embd.weight": "Q6_K"}


def test_words_of_the_command_line_are_checked() -> None:
    assert [s.name for s in parse_shapes("1b, 7B,1b")] == ["1b", "7b"]
    assert parse_types(f"{DEFAULT.ggml_name},Q2_K") == [DEFAULT.name, "Q2_K"]
    assert all(t in BY_NAME or t == "Q4_K_M" for t in FILE_TYPES)
    for call, words in (
        (lambda: parse_shapes("2b"), "unknown shape '2b': known are tiny, 1b"),
        (lambda: parse_shapes(" , "), "at least one shape"),
        (
            lambda: parse_types("q9"),
            f"unknown type 'q9' for --types: known are {DEFAULT.ggml_name}",
        ),
        (lambda: parse_types(""), "at least one type"),
    ):
        with pytest.raises(PT2Error, match=re.escape(words)):
            call()


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path) -> None:
    with pytest.raises(PT2Error, match=r"free, the synthetic files of one shape take \d+.* TiB"):
        check_disk(tmp_path, 1 << 63)


def test_shapes_keep_heads_whole() -> None:
    for s in SHAPES.values():
        assert isinstance(s, Shape) and s.hidden % s.heads == 0 and s.heads % s.kv_heads == 0
