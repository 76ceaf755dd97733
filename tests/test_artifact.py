"""The artifact: packing, writing and reading back, and refusing what is damaged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load_file, save_file

from pt2_core.artifact.folder import Artifact, ArtifactWriter, first_difference, remove_leftovers
from pt2_core.artifact.matrix import TernaryMatrix, pack_ternary, unpack_ternary
from pt2_core.errors import PT2Error
from pt2_core.files import sha256_file
from pt2_core.safetensors_file import read_header

IDENTITY = {
    "model": {"fingerprint": "f", "architecture": "LlamaForCausalLM", "tensors": {}},
    "settings": {"order": "none", "block_size": 8},
    "versions": {"torch": "1"},
    "calibration": {"source": "x"},
    "kept": {},
}
NAME = "model.layers.0.mlp.up_proj"
BLOCK = "block-00000.safetensors"


def matrix(rows: int = 6, cols: int = 16, block: int = 8) -> TernaryMatrix:
    rng = np.random.default_rng(0)
    return TernaryMatrix(
        NAME,
        pack_ternary(rng.integers(-1, 2, (rows, cols)).astype(np.int8)),
        rng.random((rows, cols // block)).astype(np.float16),
        rng.standard_normal((rows, cols // block)).astype(np.float16),
        rng.permutation(cols).astype(np.int32),
    )


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    writer = ArtifactWriter.create(tmp_path / "a", IDENTITY)
    writer.write_global(np.arange(4))
    writer.write_block(0, [matrix()], {NAME: {"rows": 6, "cols": 16}})
    writer.finish()
    return tmp_path / "a"


@given(st.integers(1, 9), st.integers(0, 9), st.data())
@settings(max_examples=50, deadline=None)
def test_packing_round_trips(rows, quads, data):
    t = data.draw(arrays(np.int8, (rows, 4 * quads), elements=st.integers(-1, 2)))
    packed = pack_ternary(t)
    assert packed.dtype == np.uint8 and packed.shape == (rows, quads)
    assert np.array_equal(unpack_ternary(packed), t)


def test_packing_is_lowest_bits_first():
    assert pack_ternary(np.array([[-1, 0, 1, 1]], dtype=np.int8))[0, 0] == 0b10_10_01_00
    assert pack_ternary(np.array([[2, -1, 2, 0]], dtype=np.int8))[0, 0] == 0b01_11_00_11


@pytest.mark.parametrize("bad", [np.zeros((1, 6), np.int8), np.full((1, 4), 3, np.int8)])
def test_packing_refuses_what_is_no_level(bad):
    with pytest.raises(ValueError):
        pack_ternary(bad)


def test_dequantize_is_the_formula_of_the_design():
    m = matrix()
    t, w = m.codes(), m.dequantize()
    for j in range(m.cols):
        g = j // m.block_size
        want = m.alpha[:, g].astype(np.float32) * t[:, j] + m.mu[:, g].astype(np.float32)
        assert np.allclose(w[:, m.perm[j]], want, atol=1e-6)


def test_what_was_written_is_read(artifact: Path):
    a = Artifact.open(artifact)
    got = a.block(0)[NAME]
    for part in ("ternary", "alpha", "mu", "perm"):
        assert np.array_equal(getattr(got, part), getattr(matrix(), part))
    assert a.n_blocks == 1 and a.residual_perm.tolist() == [0, 1, 2, 3]


def test_four_levels_are_read_where_the_manifest_says_so(tmp_path: Path):
    m = matrix()
    t = m.codes()
    t[0, :3] = 2
    four = replace(m, ternary=pack_ternary(t), levels=4)
    writer = ArtifactWriter.create(tmp_path / "a", IDENTITY)
    writer.write_global(np.arange(4))
    writer.write_block(0, [four], {NAME: {"rows": 6, "cols": 16, "levels": 4}})
    writer.finish()
    got = Artifact.open(tmp_path / "a").block(0)[NAME]
    assert got.levels == 4 and np.array_equal(got.codes(), t)
    assert np.array_equal(got.dequantize(), four.dequantize())
    writer.manifest["matrices"][NAME]["levels"] = 3
    writer.finish()
    with pytest.raises(PT2Error, match="not ternary"):
        Artifact.open(tmp_path / "a").block(0)


def rewrite(file: Path, change) -> None:
    """Change a block's tensors and its checksum with them: only the content can tell."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    manifest = json.loads((file.parent / "manifest.json").read_text())
    manifest["files"][file.name] = sha256_file(file)
    (file.parent / "manifest.json").write_text(json.dumps(manifest))


def edit(file: Path, **changes) -> None:
    manifest = json.loads(file.read_text())
    manifest.update(changes)
    file.write_text(json.dumps(manifest))


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def put(key: str, value):
    return lambda tensors: tensors.__setitem__(f"{NAME}.{key}", value)


DAMAGE = {
    "no folder": (lambda a: shutil.rmtree(a), "is not an artifact"),
    "no manifest": (lambda a: (a / "manifest.json").unlink(), "is not an artifact"),
    "manifest cut": (lambda a: (a / "manifest.json").write_text('{"format'), "not valid JSON"),
    "manifest list": (lambda a: (a / "manifest.json").write_text("[]"), "not the manifest"),
    "foreign": (lambda a: edit(a / "manifest.json", format="gguf"), "not the manifest"),
    "newer": (lambda a: edit(a / "manifest.json", format_version=3), "format version 3"),
    "files wrong": (lambda a: edit(a / "manifest.json", files=[]), "'files' is missing"),
    "incomplete": (lambda a: edit(a / "manifest.json", complete=False), "not complete"),
    "no global": (lambda a: (a / "global.safetensors").unlink(), "global.safetensors"),
    "no block": (lambda a: (a / BLOCK).unlink(), BLOCK),
    "block cut": (lambda a: (a / BLOCK).write_bytes((a / BLOCK).read_bytes()[:-9]), "truncated"),
    "block empty": (lambda a: (a / BLOCK).write_bytes(b""), "not a whole safetensors"),
    "bit flip": (lambda a: flip(a / BLOCK, -3), "checksum"),
    "header flip": (lambda a: flip(a / BLOCK, 3), "not a whole safetensors"),
    "code 3": (lambda a: rewrite(a / BLOCK, put("ternary", np.full((6, 4), 255, np.uint8))),
               "not ternary"),
    "nan": (lambda a: rewrite(a / BLOCK, put("mu", np.full((6, 2), np.nan, np.float16))), "NaN"),
    "negative": (lambda a: rewrite(a / BLOCK, put("alpha", np.full((6, 2), -1, np.float16))),
                 "negative alpha"),
    "dtype": (lambda a: rewrite(a / BLOCK, put("alpha", np.ones((6, 2), np.float32))), "float16"),
    "shape": (lambda a: rewrite(a / BLOCK, put("alpha", np.ones((5, 2), np.float16))), "shapes"),
    "perm": (lambda a: rewrite(a / BLOCK, put("perm", np.zeros(16, np.int32))), "permutation"),
    "part gone": (lambda a: rewrite(a / BLOCK, lambda t: t.pop(f"{NAME}.mu")), "does not match"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_in_one_line(artifact: Path, name: str):
    damage, message = DAMAGE[name]
    damage(artifact)
    with pytest.raises(PT2Error, match=message) as e:
        Artifact.open(artifact).block(0)
    assert "\n" not in str(e.value)


@given(st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_no_flipped_bit_in_a_header_gets_past(tmp_path_factory, position):
    """Either the header is refused, or it still describes tensors that fit the file."""
    folder = tmp_path_factory.mktemp("flip")
    path = folder / "x.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(5, np.uint8)}, path)
    data = bytearray(path.read_bytes())
    header_bits = (len(data) - 29) * 8
    bit = position % header_bits
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    try:
        header = read_header(path)
    except PT2Error as e:
        assert "safetensors" in str(e)
    else:
        assert sum(t.end - t.begin for t in header.values()) == 29


def test_the_source_model_is_given_or_recorded(artifact: Path, tmp_path: Path):
    opened = Artifact.open(artifact)
    assert opened.source_model("elsewhere", "--model") == Path("elsewhere")
    with pytest.raises(PT2Error, match="give it with --model DIR"):
        opened.source_model(None, "--model")
    (artifact / "run.json").write_text(json.dumps({"model_dir": str(tmp_path)}))
    assert opened.source_model(None, "--model") == tmp_path
    (artifact / "run.json").write_text(json.dumps({"model_dir": str(tmp_path / "gone")}))
    with pytest.raises(PT2Error, match="give it with --source DIR"):
        opened.source_model(None, "--source")


def test_resume_names_the_first_difference(artifact: Path):
    other = {**IDENTITY, "settings": {"order": "ssr", "block_size": 8}}
    with pytest.raises(PT2Error, match=r"settings\.order was 'none' and is now 'ssr'"):
        ArtifactWriter.resume(artifact, other)
    assert first_difference(IDENTITY, IDENTITY, "x") is None


def test_only_our_leftovers_are_removed(artifact: Path):
    (artifact / ".manifest.json.abc.tmp").write_text("half")
    (artifact / ".block-00007.safetensors.x1.tmp").write_text("half")
    (artifact / "notes.txt").write_text("mine")
    remove_leftovers(artifact)
    names = {p.name for p in artifact.iterdir()}
    assert names == {"manifest.json", "global.safetensors", BLOCK, "notes.txt"}
    remove_leftovers(artifact, everything=True)
    assert {p.name for p in artifact.iterdir()} == {"notes.txt"}
