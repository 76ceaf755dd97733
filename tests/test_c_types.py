"""Our types in C: bytes against a model here, gguf-py, pt2_core.formats and FORMAT.md."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import c_support
import numpy as np
import pytest
from c_support import BLOCK, NAMES, Q8_T, SIZES, load, random_payload

from pt2_core import formats
from pt2_core.formats import DEFAULT, SMALLEST
from pt2_llama import api

pytestmark = pytest.mark.llama
TERNARY = pytest.mark.parametrize("kind", c_support.TERNARY, ids=NAMES.get)
KEY = DEFAULT.layout_key().encode()
FORMAT = Path(__file__).parents[1] / "third_party" / "llama.cpp" / "FORMAT.md"


@pytest.fixture(scope="module")
def build():
    return api.require_build("cpu")


@pytest.fixture(scope="module")
def libs(build):
    return load(build.lib_dir)


@pytest.fixture(scope="module")
def gguf_py():
    """gguf-py of the patched source; the installed one is put back for the other tests."""

    def take():
        names = [n for n in sys.modules if n == "gguf" or n.startswith("gguf.")]
        return {name: sys.modules.pop(name) for name in names}

    installed = take()
    sys.path.insert(0, str(api.source_dir() / "gguf-py"))
    try:
        return importlib.import_module("gguf")
    finally:
        sys.path.pop(0)
        take()
        sys.modules.update(installed)


# ---- the model: one block, from docs/design.md and the paper's equations -------------------------


def tree(values):
    """Sum of 128 float64 by halving, the documented order of summation."""
    values = np.asarray(values, np.float64)
    while len(values) > 1:
        half = len(values) // 2
        values = values[:half] + values[half:]
    return float(values[0])


def nearest(x, mu, half_step):
    r = x - mu
    return np.where(r > half_step, 1, np.where(r < -half_step, -1, 0))


def fit(x, w):
    """(alpha, mu, t) of one block: init (eq. 4-5), then fitting until T stays (eq. 9-10)."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    if not tree(w) > 0:
        w = np.ones(BLOCK)
    sw, swx = tree(w), tree(w * x)
    mean = swx / sw
    t = nearest(x, mean, 0.75 * (tree(w * np.abs(x - mean)) / sw))
    alpha, mu = 0.0, mean
    for _ in range(50):
        st, stt, sxt = tree(w * t), tree(w * t * t), tree(w * x * t)
        det = sw * stt - st * st
        if not det > 1e-7 * (sw * stt):
            alpha = 0.0
            break
        alpha, mu = (sw * sxt - st * swx) / det, (stt * swx - st * sxt) / det
        new = nearest(x, mu, 0.5 * alpha)
        if (new == t).all():
            break
        t = new
    a16 = np.float16(np.float32(alpha))
    if a16 == 0:
        return np.float16(0), np.float16(np.float32(mean)), np.zeros(BLOCK, int)
    m16 = np.float16(np.float32(mu))
    return a16, m16, nearest(x, float(m16), 0.5 * float(a16))


def pack(kind, alpha, mu, t):
    c = [int(v) + 1 for v in t]
    head = np.array([alpha, mu], "<f2").tobytes()
    if kind == formats.TQ2_1.id:
        codes = [sum(c[32 * p + lane] << (2 * p) for p in range(4)) for lane in range(32)]
    else:
        codes = [sum(c[32 * p + i] * 3**p for p in range(4)) for i in range(26)]
        for i in range(24):
            codes[i] += 81 * c[32 * (i % 4) + 26 + i // 4]
    return head + bytes(codes)


def model_quantize(kind, x, w=None):
    w = np.ones(x.shape[-1]) if w is None else w
    out = b""
    for row in x:
        for b in range(0, len(row), BLOCK):
            out += pack(kind, *fit(row[b : b + BLOCK], w[b : b + BLOCK]))
    return np.frombuffer(out, np.uint8).reshape(len(x), -1)


def model_codes(kind, block):
    qs = [int(v) for v in block[4:]]
    if kind == formats.TQ2_1.id:
        return np.array([qs[e % 32] >> 2 * (e // 32) & 3 for e in range(BLOCK)])
    c = np.zeros((4, 32), int)
    for i, v in enumerate(qs):
        for p in range(4):
            c[p, i] = v // 3**p % 3
        if i < 24:
            c[i % 4, 26 + i // 4] = min(v // 81, 2)
    return c.reshape(-1)


def model_dequantize(kind, data):
    blocks = data.reshape(-1, SIZES[kind])
    scales = np.ascontiguousarray(blocks[:, :4]).view("<f2").astype(np.float32)
    codes = np.array([model_codes(kind, b) for b in blocks]).astype(np.float32)
    return (scales[:, :1] * (codes - np.float32(1)) + scales[:, 1:]).reshape(len(data), -1)


def difficult_rows(rng):
    """Rows of two blocks: what a quantiser may meet beside ordinary weights."""
    k = 2 * BLOCK
    normal = rng.standard_normal(k)
    outlier = 0.01 * normal
    outlier[7] = 5.0
    ternary = 0.75 * rng.integers(-1, 2, k) - 0.5
    rows = {
        "ordinary": 0.02 * normal, "offset": 0.02 * normal + 3, "heavy tails": normal**3,
        "all zero": np.zeros(k), "negative zero": -np.zeros(k), "all equal": np.full(k, 0.3),
        "two levels": np.where(normal > 0, 1.0, -2.0), "one outlier": outlier,
        "exactly ternary": ternary, "half's subnormals": 1e-7 * normal,
        "below half": 1e-12 * normal,
        "float's subnormals": 1e-41 * normal, "near half's limit": 65504 * np.sign(normal),
        "positive only": np.abs(normal), "sorted": np.sort(normal),
    }  # fmt: skip
    return np.array(list(rows.values())).astype(np.float32), list(rows)


# ---- the reference quantiser ---------------------------------------------------------------------


@TERNARY
def test_quantiser_matches_the_model_byte_for_byte(libs, kind):
    rng = np.random.default_rng(1)
    x, names = difficult_rows(rng)
    for importance in (None, rng.gamma(0.5, size=x.shape[1]), np.zeros(x.shape[1])):
        weights = None if importance is None else importance.astype(np.float32)
        got, want = libs.quantize(kind, x, weights), model_quantize(kind, x, weights)
        wrong = [n for n, g, w in zip(names, got, want, strict=True) if (g != w).any()]
        assert not wrong
        assert libs.valid(kind, got)


@TERNARY
def test_degenerate_blocks_have_defined_results(libs, kind):
    x, names = difficult_rows(np.random.default_rng(1))
    back = dict(zip(names, libs.dequantize(kind, libs.quantize(kind, x)), strict=True))
    x = dict(zip(names, x, strict=True))
    assert (back["all zero"] == 0).all() and (back["negative zero"] == 0).all()
    assert (back["all equal"] == np.float16(0.3)).all()
    assert (back["two levels"] == x["two levels"]).all()
    assert (back["exactly ternary"] == x["exactly ternary"]).all()
    assert back["one outlier"][7] == pytest.approx(5.0, rel=1e-3)


@TERNARY
def test_quantiser_is_better_than_its_init_and_importance_pays(libs, kind):
    rng = np.random.default_rng(2)
    x = (0.02 * rng.standard_normal((64, 4 * BLOCK))).astype(np.float32)
    weights = rng.gamma(0.3, size=x.shape[1]).astype(np.float32)
    plain = (libs.dequantize(kind, libs.quantize(kind, x)) - x) ** 2
    informed = (libs.dequantize(kind, libs.quantize(kind, x, weights)) - x) ** 2
    # three levels, each normal weight to its nearest: 0.1902 of the variance is the optimum for the
    # distribution, and a fit to 128 samples is a little under it
    assert 0.16 < plain.mean() / x.var() < 0.1902
    assert (informed * weights).sum() < 0.9 * (plain * weights).sum()


@TERNARY
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e9])
def test_what_cannot_be_stored_is_found_by_validation(libs, kind, bad):
    x = np.zeros((1, 2 * BLOCK), np.float32)
    assert libs.valid(kind, libs.quantize(kind, x))
    x[0, 200] = bad
    assert not libs.valid(kind, libs.quantize(kind, x))


def test_validation_finds_impossible_codes(libs):
    kind = formats.TQ1_1.id
    data = random_payload(kind, 1, 3, np.random.default_rng(0))
    assert libs.valid(kind, data)
    size = SIZES[kind]
    for byte, value in ((4, 243), (size - 1, 81)):
        broken = data.copy()
        broken[0, size + byte] = value
        assert not libs.valid(kind, broken)
        with pytest.raises(ValueError, match="row 0, block 1 has bytes that are no codes"):
            formats.TYPES[NAMES[kind]].check(broken)


@TERNARY
def test_validation_finds_every_scale_that_is_no_number(libs, kind):
    data = random_payload(kind, 1, 3, np.random.default_rng(0))
    for at in (0, 2):  # alpha, mu
        for half in (0x7C00, 0xFC00, 0x7E00, 0xFC01):
            broken = data.copy()
            broken[0, SIZES[kind] + at : SIZES[kind] + at + 2] = np.array([half], "<u2").view("u1")
            assert not libs.valid(kind, broken)
            with pytest.raises(ValueError, match="row 0, block 1 has a NaN or infinite scale"):
                formats.TYPES[NAMES[kind]].check(broken)


# ---- reading -------------------------------------------------------------------------------------


@TERNARY
def test_dequantisation_is_exact_for_any_scales(libs, gguf_py, kind):
    rng = np.random.default_rng(5)
    data = random_payload(kind, 40, 4, rng).reshape(40, 4, -1)
    halves = rng.integers(0, 2**16, (40, 4, 2), dtype=np.uint16)
    halves[(halves & 0x7C00) == 0x7C00] = 0x7BFF  # infinities and NaN become the largest number
    halves[0, :, :] = [[0, 0x8000], [0x8000, 0x8000], [0x0001, 0x83FF], [0x7BFF, 0xFBFF]]
    data[..., :4] = halves.view(np.uint8).reshape(40, 4, 4)
    data = data.reshape(40, -1)
    got = libs.dequantize(kind, data)
    want = model_dequantize(kind, data)
    assert (got.view(np.uint32) == want.view(np.uint32)).all()
    other = gguf_py.quants.dequantize(data, gguf_py.GGMLQuantizationType(kind))
    assert (other.view(np.uint32) == want.view(np.uint32)).all()


@TERNARY
def test_any_bytes_have_one_value(libs, gguf_py, kind):
    """In C, gguf-py and the packers, also bytes that no encoder writes; FORMAT.md says which."""
    rng = np.random.default_rng(11)
    data = rng.integers(0, 256, (64, 4, SIZES[kind]), dtype=np.uint8)
    halves = np.ascontiguousarray(data[..., :4]).view("<f2").astype(np.float32)
    finite = np.isfinite(halves).all(-1)
    assert finite.any() and not finite.all()
    data = data.reshape(64, -1)
    with np.errstate(invalid="ignore"):
        want = model_dequantize(kind, data).reshape(64, 4, BLOCK)
    want[~finite] = np.nan
    want = want.reshape(64, -1)
    others = [libs.dequantize(kind, data), formats.TYPES[NAMES[kind]].dequantize(data)]
    others.append(gguf_py.quants.dequantize(data, gguf_py.GGMLQuantizationType(kind)))
    for got in others:
        assert np.array_equal(got, want, equal_nan=True)


@TERNARY
def test_gguf_py_quantises_to_the_same_bytes(libs, gguf_py, kind):
    rng = np.random.default_rng(6)
    x = np.concatenate([difficult_rows(rng)[0], rng.standard_normal((200, 256)).astype(np.float32)])
    got = gguf_py.quants.quantize(x, gguf_py.GGMLQuantizationType(kind))
    assert (got == libs.quantize(kind, x)).all()


@TERNARY
def test_export_packs_what_c_reads(libs, kind):
    rng = np.random.default_rng(7)
    packer = formats.TYPES[NAMES[kind]]
    codes = rng.integers(0, 3, (9, 5 * BLOCK), dtype=np.uint8)
    alpha = rng.uniform(0, 0.1, (9, 5)).astype(np.float16)
    mu = rng.normal(0, 0.05, (9, 5)).astype(np.float16)
    want = alpha.astype(np.float32)[..., None] * (codes.reshape(9, 5, BLOCK).astype(np.float32) - 1)
    want += mu.astype(np.float32)[..., None]
    got = libs.dequantize(kind, packer.pack(codes, alpha, mu).reshape(9, -1))
    assert (got == want.reshape(9, -1)).all()


@TERNARY
def test_the_worked_example_of_format_md(libs, kind):
    text = FORMAT.read_text()
    match = re.search(rf"^{NAMES[kind].upper()}:\n\n```\n(.*?)```", text, re.M | re.S)
    data = np.frombuffer(bytes.fromhex(match[1]), np.uint8)[None, :]
    codes = np.arange(BLOCK) // 3 % 3
    assert data.tobytes() == pack(kind, 0.5, -0.25, codes - 1)
    assert (libs.dequantize(kind, data)[0] == 0.5 * (codes - 1) - 0.25).all()


# ---- activations ---------------------------------------------------------------------------------


def test_q8_t_rounds_to_even_and_keeps_its_sum(libs):
    rng = np.random.default_rng(8)
    x = (rng.standard_normal((50, 2 * BLOCK)) * np.exp(rng.normal(0, 5, (50, 1)))).astype(
        np.float32
    )
    x[0] = np.arange(2 * BLOCK) % 2 - 0.5
    x[1, :BLOCK] = np.arange(BLOCK) - 63.5
    x[1, 0] = 127  # the scale is 1, and every other value a tie
    data = libs.quantize(Q8_T, x).reshape(-1, SIZES[Q8_T])
    head = np.ascontiguousarray(data[:, :8]).view("<f4")
    qs = data[:, 8:].view(np.int8)
    blocks = x.reshape(-1, BLOCK)
    amax = np.abs(blocks).max(axis=1)
    assert (head[:, 0] == amax / np.float32(127)).all()
    assert (qs == np.rint(blocks * (np.float32(127) / amax)[:, None])).all()
    assert (head[:, 1] == head[:, 0] * qs.sum(axis=1, dtype=np.int32).astype(np.float32)).all()


def test_q8_t_shows_nan_and_infinity_and_takes_zeros(libs):
    x = np.zeros((3, BLOCK), np.float32)
    x[1, 5], x[2, 7] = np.nan, -np.inf
    head = np.ascontiguousarray(libs.quantize(Q8_T, x)[:, :8]).view("<f4")
    assert (head[0] == 0).all()
    assert np.isnan(head[1:]).all()


# ---- llama-quantize and the loader ---------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(build, gguf_py, tmp_path_factory):
    """A one-block llama in F16 without a tokenizer, and its copies by llama-quantize."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(9)
    writer = gguf_py.GGUFWriter(folder / "f16.gguf", "llama")
    for add, value in (
        ("context_length", 128), ("embedding_length", 256), ("block_count", 1),
        ("feed_forward_length", 384), ("head_count", 4), ("head_count_kv", 2),
        ("layer_norm_rms_eps", 1e-5), ("rope_dimension_count", 64), ("vocab_size", 64),
        ("tokenizer_model", "no_vocab"), ("file_type", 1),
    ):  # fmt: skip
        getattr(writer, f"add_{add}")(value)
    shapes = {
        "token_embd": (64, 256), "output": (64, 256), "output_norm": (256,),
        "blk.0.attn_norm": (256,), "blk.0.ffn_norm": (256,), "blk.0.attn_q": (256, 256),
        "blk.0.attn_k": (128, 256), "blk.0.attn_v": (128, 256), "blk.0.attn_output": (256, 256),
        "blk.0.ffn_gate": (384, 256), "blk.0.ffn_up": (384, 256), "blk.0.ffn_down": (256, 384),
    }  # fmt: skip
    for name, shape in shapes.items():
        data = 0.05 * rng.standard_normal(shape)
        writer.add_tensor(
            f"{name}.weight", data.astype(np.float32 if len(shape) == 1 else np.float16)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def quantize(source, target, *options):
        command = [build.tool("llama-quantize"), *options[:-1], folder / source, folder / target]
        command += [options[-1]]
        return subprocess.run(
            command, env=build.env(), capture_output=True, text=True, errors="replace"
        )

    return folder, quantize


@TERNARY
def test_llama_quantize_makes_our_types_and_names_the_layout(libs, tiny, gguf_py, kind):
    folder, quantize = tiny
    name = NAMES[kind]
    done = quantize("f16.gguf", f"{name}.gguf", name.upper())
    assert done.returncode == 0, done.stderr[-2000:]
    source, reader = (
        gguf_py.GGUFReader(folder / "f16.gguf"),
        gguf_py.GGUFReader(folder / f"{name}.gguf"),
    )
    assert reader.fields[f"pt2.{name}.layout"].contents() == formats.TYPES[name].layout
    assert reader.fields["general.file_type"].contents() == formats.TYPES[name].file_type
    weights = {t.name: t.data for t in source.tensors}
    ours = [t for t in reader.tensors if t.tensor_type == kind]
    assert len(ours) == 7
    for tensor in ours:
        want = libs.quantize(kind, weights[tensor.name].astype(np.float32))
        assert (tensor.data == want).all(), tensor.name


@pytest.mark.parametrize(
    ("kind", "damage"),
    [(formats.TQ1_1.id, "codes"), (formats.TQ1_1.id, "alpha"), (formats.TQ2_1.id, "alpha")],
)
def test_check_tensors_refuses_what_no_encoder_writes(build, tiny, gguf_py, kind, damage):
    folder, quantize = tiny
    file = folder / f"damaged-{damage}-{NAMES[kind]}.gguf"
    assert quantize("f16.gguf", file.name, NAMES[kind].upper()).returncode == 0
    (folder / "text.txt").write_text("any text")
    command = [build.tool("llama-perplexity"), "-m", file, "-f", folder / "text.txt"]

    def load():
        done = subprocess.run(
            [*command, "--check-tensors"], env=build.env(), capture_output=True, text=True,
            errors="replace", timeout=120,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    found = "ggml_validate_row_data: found"  # the loader's own last line can be lost
    assert found not in load()[1]
    reader = gguf_py.GGUFReader(file, "r+")
    data = next(t for t in reader.tensors if t.name == "blk.0.ffn_up.weight").data
    data.reshape(-1, SIZES[kind])[5, 4 if damage == "codes" else 1] = 0xFF
    reader.data.flush()
    status, output = load()
    assert status != 0 and found in output


def test_a_single_tensor_of_our_type_names_the_layout_too(tiny, gguf_py):
    folder, quantize = tiny
    done = quantize(
        "f16.gguf", "mixed.gguf", "--tensor-type", f"ffn_up={SMALLEST.ggml_name}", "Q8_0"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    fields = gguf_py.GGUFReader(folder / "mixed.gguf").fields
    assert fields[SMALLEST.layout_key()].contents() == SMALLEST.layout
    assert DEFAULT.layout_key() not in fields


@TERNARY
def test_the_loader_refuses_levels_that_a_type_has_not(tiny, kind):
    folder, quantize = tiny
    name = NAMES[kind]
    assert quantize("f16.gguf", "good.gguf", name.upper()).returncode == 0
    data, number = (folder / "good.gguf").read_bytes(), b"\4\0\0\0"  # a uint32 follows
    old, new = b"llama.vocab_size" + number, f"pt2.{name}.levels".encode() + number
    assert data.count(old) == 1
    for levels in {formats.TQ1_1.id: (2, 4), formats.TQ2_1.id: (2, 5)}[kind]:
        changed = data.replace(old + b"\x40", new + bytes([levels]))
        (folder / "bad.gguf").write_bytes(changed)
        done = quantize("bad.gguf", "copy.gguf", "COPY")
        assert done.returncode != 0
        assert f"pt2.{name}.levels must be a uint32, 3 or (of TQ2_1) 4" in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((KEY, KEY.upper()), f"the key {KEY.decode()} is missing"),
        ((KEY + b"\4\0\0\0\1", KEY + b"\4\0\0\0\2"), f"{KEY.decode()} is 2"),
        ((KEY + b"\4\0\0\0", KEY + b"\5\0\0\0"), "must be a uint32"),
    ],
    ids=["missing", "unknown", "wrong type"],
)
def test_the_loader_refuses_a_layout_it_does_not_know(tiny, change, message):
    folder, quantize = tiny
    assert quantize("f16.gguf", "good.gguf", DEFAULT.name).returncode == 0
    data = (folder / "good.gguf").read_bytes()
    assert data.count(change[0]) == 1
    (folder / "bad.gguf").write_bytes(data.replace(*change))
    done = quantize("bad.gguf", "copy.gguf", "COPY")
    assert done.returncode != 0
    assert message in done.stderr
    assert quantize("good.gguf", "copy.gguf", "COPY").returncode == 0
