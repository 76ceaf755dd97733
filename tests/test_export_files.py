"""pt2-export on small models: what is in the files, and that wrong bytes in them are noticed."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
from export_support import foldable_orders, make_artifact, make_model, read

from export import ExportConfig, export_gguf
from export.cli import main
from pt2_core import formats
from pt2_core.artifact.folder import Artifact
from pt2_core.errors import PT2Error
from pt2_core.formats import DEFAULT

pytestmark = pytest.mark.llama


@pytest.mark.parametrize("kind", formats.TYPES)
def test_file_holds_the_artifact_to_the_bit(kind, made, tmp_path):
    model, artifact = made()
    report = export_gguf(artifact, tmp_path / "m.gguf", ExportConfig(type=kind))
    tensors, _ = read(tmp_path / "m.gguf")
    block = Artifact.open(artifact).block(1)
    codec = formats.TYPES[kind]
    residual, orders = foldable_orders(model)
    down = orders["model.layers.1.mlp.down_proj"]
    # up: rows in down's order. down: rows in the stream's order. k: rows as rotary embeddings want.
    up = block["model.layers.1.mlp.up_proj"]
    got = codec.unpack(np.asarray(tensors["blk.1.ffn_up.weight"].data))
    assert np.array_equal(got[0], (up.codes() + 1)[down])
    assert np.array_equal(got[1], up.alpha[down]) and np.array_equal(got[2], up.mu[down])
    rows = block["model.layers.1.mlp.down_proj"]
    got = codec.unpack(np.asarray(tensors["blk.1.ffn_down.weight"].data))
    assert np.array_equal(got[0], (rows.codes() + 1)[residual])
    k = block["model.layers.1.self_attn.k_proj"].codes() + 1
    got = codec.unpack(np.asarray(tensors["blk.1.attn_k.weight"].data))
    halves = k.reshape(2, 2, 32, -1).swapaxes(1, 2).reshape(128, -1)
    assert np.array_equal(got[0], halves)
    assert report.verified and report.ternary_bpw == codec.bpw()
    assert report.file_bytes == (tmp_path / "m.gguf").stat().st_size


def test_metadata(made, tmp_path):
    _, artifact = made()
    manifest = Artifact.open(artifact).manifest
    file_types = {name: t.file_type for name, t in formats.TYPES.items()}
    for kind, file_type in {**file_types, "q2_k": 10}.items():
        export_gguf(artifact, tmp_path / f"{kind}.gguf", ExportConfig(type=kind))
        tensors, f = read(tmp_path / f"{kind}.gguf")
        assert f["general.file_type"] == file_type
        assert f["general.quantization_version"] == gguf.GGML_QUANT_VERSION
        assert (f["pt2.version"], f["pt2.type"], f["pt2.group_size"]) == (1, kind, 128)
        assert f["pt2.model_fingerprint"] == manifest["model"]["fingerprint"]
        assert json.loads(f["pt2.settings"])["quantize"] == manifest["settings"]
        bits = 8 * sum(t.n_bytes for t in tensors.values())
        elements = sum(t.n_elements for t in tensors.values())
        assert f["pt2.bpw"] == pytest.approx(bits / elements, rel=1e-6)
        layouts = {k for k in f if k.endswith(".layout")}
        assert layouts == ({f"pt2.{kind}.layout"} if kind != "q2_k" else set())
        assert f["general.architecture"] == "llama"
        assert "messages" in f["tokenizer.chat_template"]
        assert len(f["tokenizer.ggml.tokens"]) == f["llama.vocab_size"]
        assert f["general.size_label"] == "1.3M"
        assert {t.tensor_type.name for t in tensors.values()} == {
            kind.upper(),
            "Q4_K",
            "Q5_K",
            "F32",
        }


def test_the_same_input_gives_the_same_bytes(made, tmp_path):
    _, artifact = made()
    for name in ("a", "b"):
        export_gguf(artifact, tmp_path / f"{name}.gguf", ExportConfig(type="q2_k"))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_sharded_model(tmp_path):
    model = make_model(tmp_path / "model", max_shard="1MB")
    assert len(list(model.glob("*.safetensors"))) > 2
    artifact = make_artifact(tmp_path / "artifact", model)
    assert export_gguf(artifact, tmp_path / "m.gguf").verified


def test_blocks_of_256_and_64(made, tmp_path):
    _, wide = made(group=256)
    assert export_gguf(wide, tmp_path / "wide.gguf").verified
    _, fine = made(group=64)
    with pytest.raises(PT2Error, match=r"blocks of 64.*--type q2_k"):
        export_gguf(fine, tmp_path / "fine.gguf")
    report = export_gguf(fine, tmp_path / "fine.gguf", ExportConfig(type="q2_k"))
    assert 0 < report.error < 0.05


def test_widths_that_do_not_fit_fall_back_by_name(made, tmp_path):
    _, artifact = made("llama", ffn=384, hidden=256)
    report = export_gguf(artifact, tmp_path / "m.gguf", ExportConfig(type="q2_k"))
    assert report.fallbacks == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]
    reasons = {name: (kind, why) for name, _, kind, why in report.others}
    assert reasons["blk.0.ffn_down.weight"] == (
        "Q8_0",
        "384 columns are no whole q2_k blocks of 256",
    )
    with pytest.raises(PT2Error, match=r"--strict: model\.layers\.0\.mlp\.down_proj"):
        export_gguf(artifact, tmp_path / "s.gguf", ExportConfig(type="q2_k", strict=True))
    assert not (tmp_path / "s.gguf").exists()


def test_embeddings_of_a_width_that_does_not_fit(tmp_path):
    model = make_model(tmp_path / "model", hidden=128)
    artifact = make_artifact(tmp_path / "artifact", model)
    report = export_gguf(artifact, tmp_path / "m.gguf", ExportConfig(embedding_type="q4_k"))
    kinds = {name: (kind, why) for name, _, kind, why in report.others}
    assert kinds["token_embd.weight"][0] == "Q5_0"
    assert "128 columns are no whole Q4_K blocks" in kinds["token_embd.weight"][1]


def test_kept_linears_are_listed_with_their_reason(tmp_path):
    model = make_model(tmp_path / "model")
    name = "model.layers.0.self_attn.v_proj"
    artifact = make_artifact(tmp_path / "artifact", model, kept={name: "left out by --skip"})
    report = export_gguf(artifact, tmp_path / "m.gguf", ExportConfig(fallback_type="q5_k"))
    assert report.fallbacks == ["blk.0.attn_v.weight"]
    entry = next(o for o in report.others if o[0] == "blk.0.attn_v.weight")
    assert entry[2:] == ("Q5_K", "kept: left out by --skip")
    with pytest.raises(PT2Error, match=r"--strict.*left out by --skip"):
        export_gguf(artifact, tmp_path / "s.gguf", ExportConfig(strict=True))


def test_a_byte_changed_after_writing_is_found(made, tmp_path, monkeypatch):
    from export import pipeline

    _, artifact = made()
    write = pipeline.write_gguf

    def write_and_damage(*args, **options):
        files, digests = write(*args, **options)
        data = bytearray(files[0].read_bytes())
        data[-5000] ^= 1
        files[0].write_bytes(data)
        return files, digests

    monkeypatch.setattr(pipeline, "write_gguf", write_and_damage)
    with pytest.raises(PT2Error, match="does not read back"):
        export_gguf(artifact, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_packer_that_disagrees_with_c_is_found(made, tmp_path, monkeypatch):
    """Two codes exchanged by the packer: the bytes are as written, the weights are not as meant."""
    _, artifact = made()
    pack = DEFAULT.pack.__func__

    def wrong(cls, codes, alpha, mu):
        return pack(cls, codes[:, np.r_[1, 0, 2 : codes.shape[1]]], alpha, mu)

    monkeypatch.setattr(DEFAULT, "pack", classmethod(wrong))
    with pytest.raises(PT2Error, match=r"does not read back.*weights"):
        export_gguf(artifact, tmp_path / "m.gguf")


def test_types_of_tied_embeddings(made, tmp_path, capfd):
    """One tensor is both: the head's default counts, unless --embedding-type is given."""
    _, artifact = made("qwen3", tied=True)
    argv = ["--from", str(artifact), "--overwrite", "--output-type"]
    out = tmp_path / "m.gguf"
    assert main([str(out), *argv, "q8_0"]) == 0
    tensors, _ = read(out)
    assert "output.weight" not in tensors
    assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"
    capfd.readouterr()
    assert main([str(out), *argv, "q8_0", "--embedding-type", "q6_k"]) == 0
    assert "--output-type q8_0 is not used" in " ".join(capfd.readouterr().out.split())
    assert read(out)[0]["token_embd.weight"].tensor_type.name == "Q6_K"
