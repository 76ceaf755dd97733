"""pt2-export on small models of every family: what is in the files, and what is refused."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import subprocess

import gguf
import numpy as np
import pytest
import torch
from export_support import (
    FAMILIES,
    TEXT,
    dequantized_model,
    foldable_orders,
    make_artifact,
    make_model,
)

from export import ExportConfig, export_gguf, types
from export.cli import main, newest_artifact
from quantize.artifact import MANIFEST, Artifact
from quantize.common import PT2Error
from third_party.pt2_llama import api

pytestmark = pytest.mark.llama
BUILD = api.find_build()
if BUILD is None:
    pytest.skip("needs llama.cpp: run pt2-llama build", allow_module_level=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes a model and its artifact once for each set of arguments."""
    cache = {}

    def make(family="llama", group=128, **options):
        key = (family, group, *sorted(options.items()))
        if key not in cache:
            root = tmp_path_factory.mktemp(family)
            model = make_model(root / "model", family, **options)
            cache[key] = (model, make_artifact(root / "artifact", model, group=group))
        return cache[key]

    return make


def read(path):
    """GGUF name -> reader's tensor, and metadata."""
    types.register()
    reader = gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in reader.fields.items()}
    return {t.name: t for t in reader.tensors}, fields


# What is written ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tq2_1", "tq1_1"])
def test_file_holds_the_artifact_to_the_bit(kind, made, tmp_path):
    model, artifact = made()
    report = export_gguf(artifact, tmp_path / "m.gguf", ExportConfig(type=kind))
    tensors, _ = read(tmp_path / "m.gguf")
    block = Artifact.open(artifact).block(1)
    codec = types.TERNARY_TYPES[kind]
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
    assert report.verified and report.ternary_bpw == {"tq2_1": 2.25, "tq1_1": 1.875}[kind]
    assert report.file_bytes == (tmp_path / "m.gguf").stat().st_size


def test_metadata(made, tmp_path):
    _, artifact = made()
    manifest = Artifact.open(artifact).manifest
    for kind, file_type in {"tq2_1": 120, "tq1_1": 121, "q2_k": 10}.items():
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


@pytest.mark.parametrize(
    ("family", "tied", "kind"),
    [
        *((f, f == "qwen3", "tq2_1") for f in FAMILIES),
        ("qwen2", True, "tq1_1"),
        ("qwen3", False, "q2_k"),
    ],
)
def test_llama_cpp_predicts_as_the_artifacts_weights_do(family, tied, kind, made, tmp_path):
    """Folded, converted and quantised, on llama.cpp, against transformers with alpha T + mu.

    Q2_K on an unmodified llama.cpp, where one has been built.
    """
    model, artifact = made(family, tied=tied)
    stock = api.find_build("stock") if kind == "q2_k" else None
    assert divergence(model, artifact, tmp_path, kind, stock or BUILD) < 0.003


def test_rope_factors_of_llama_3_pass_through(tmp_path):
    scaling = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    model = make_model(tmp_path / "model", rope_parameters=scaling)
    artifact = make_artifact(tmp_path / "artifact", model)
    assert divergence(model, artifact, tmp_path, "tq2_1", BUILD) < 0.003
    factors = read(tmp_path / "m.gguf")[0]["rope_freqs.weight"]
    assert factors.tensor_type.name == "F32" and float(np.max(factors.data)) == 8.0


def test_the_comparison_notices_a_missing_fold(made, tmp_path, monkeypatch):
    """A control: without the order of one block's v rows the predictions are visibly others."""
    from export import pipeline

    plan = pipeline.fold_plan

    def forgetful(*args):
        result = plan(*args)
        del result.rows["model.layers.1.self_attn.v_proj.weight"]
        return result

    monkeypatch.setattr(pipeline, "fold_plan", forgetful)
    assert divergence(*made(), tmp_path, "tq2_1", BUILD) > 0.1


def divergence(model, artifact, folder, kind, build):
    """Export and return the mean KL divergence in nats of llama.cpp's predictions from torch's.

    Activations in eight bits cost 0.0002 to 0.0004 here, Q2_K's scales 0.001.
    """
    config = ExportConfig(type=kind, embedding_type="f32", output_type="f32")
    export_gguf(artifact, folder / "m.gguf", config)
    text = folder / "text.txt"
    words = np.random.default_rng(0).choice(TEXT.split(), 900)
    text.write_text(" ".join(words), encoding="utf-8")
    tokens, got = llama_predictions(folder / "m.gguf", text, build)
    with torch.no_grad():
        logits = dequantized_model(model, artifact)(torch.from_numpy(tokens)).logits
    meant = logits[:, tokens.shape[1] // 2 : -1].double().log_softmax(-1)
    got = torch.from_numpy(got).double().log_softmax(-1)
    return float((meant.exp() * (meant - got)).sum(-1).mean())


def llama_predictions(file, text, build=BUILD, chunks=4, context=128):
    """What llama-perplexity saves for its --kl-divergence.

    Returns:
        tokens int64 ``[chunks, context]``, each chunk beginning with BOS, and log-probabilities
        float32 ``[chunks, context - 1 - context / 2, vocab]`` of the second halves.
    """
    saved = file.with_suffix(".logits")
    command = [build.tool("llama-perplexity"), "-m", file, "-f", text, "-c", str(context),
               "--chunks", str(chunks), "-t", "1", "--save-all-logits", saved]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=build.env())
    assert done.returncode == 0, done.stderr[-2000:]
    data = saved.read_bytes()
    assert data[:8] == b"_logits_"
    _, vocab, n = np.frombuffer(data, "<i4", 3, offset=8)
    assert n == chunks
    tokens = np.frombuffer(data, "<i4", chunks * context, offset=20).reshape(chunks, context)
    tokens = tokens.astype(np.int64)
    tokens[:, 0] = 1
    rows = chunks * (context - 1 - context // 2)
    row_size = 2 * ((vocab + 1) // 2) + 4
    values = np.frombuffer(data, "<u2", offset=20 + 4 * tokens.size).reshape(rows, row_size)
    scale, least = np.ascontiguousarray(values[:, :4]).view("<f4").T
    result = values[:, 4 : 4 + vocab] * scale[:, None] + least[:, None]
    return tokens, result.reshape(chunks, -1, vocab)


def test_splits_are_named_and_hold_everything(made, tmp_path):
    _, artifact = made()
    whole = export_gguf(artifact, tmp_path / "one.gguf")
    report = export_gguf(artifact, tmp_path / "m.gguf", ExportConfig(split_max_size=150_000))
    n = len(report.files)
    assert n > 1
    assert [f.name for f in report.files] == [f"m-{i + 1:05d}-of-{n:05d}.gguf" for i in range(n)]
    assert not (tmp_path / "m.gguf").exists()
    parts = {}
    for i, file in enumerate(report.files):
        tensors, fields = read(file)
        assert (fields["split.no"], fields["split.count"]) == (i, n)
        parts |= {k: bytes(np.asarray(t.data).data) for k, t in tensors.items()}
    one, _ = read(whole.files[0])
    assert parts == {k: bytes(np.asarray(t.data).data) for k, t in one.items()}
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 12, encoding="utf-8")
    predictions = [llama_predictions(r.files[0], text)[1] for r in (whole, report)]
    assert np.array_equal(*predictions)


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
    pack = types.TQ2_1.pack.__func__

    def wrong(cls, codes, alpha, mu):
        return pack(cls, codes[:, np.r_[1, 0, 2 : codes.shape[1]]], alpha, mu)

    monkeypatch.setattr(types.TQ2_1, "pack", classmethod(wrong))
    with pytest.raises(PT2Error, match=r"does not read back.*weights"):
        export_gguf(artifact, tmp_path / "m.gguf")


# What is refused ----------------------------------------------------------------------------------


def damage_block(model, artifact):
    file = artifact / "block-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)


def truncate_block(model, artifact):
    file = artifact / "block-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def edit_manifest(**changes):
    def change(model, artifact):
        value = json.loads((artifact / MANIFEST).read_text())
        (artifact / MANIFEST).write_text(json.dumps({**value, **changes}))

    return change


def edit_config(**changes):
    def change(model, artifact):
        value = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**value, **changes}))

    return change


def flip_model_bit(model, artifact):
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (model / "model.safetensors").write_bytes(data)


def no_tokenizer(model, artifact):
    for file in model.glob("tokenizer*"):
        file.unlink()


BAD = {
    "no artifact": (lambda m, a: shutil.rmtree(a), [], "not an artifact"),
    "manifest cut": (lambda m, a: (a / MANIFEST).write_text('{"a"'), [], "not valid JSON"),
    "version": (edit_manifest(format_version=9), [], "format version 9"),
    "incomplete": (edit_manifest(complete=False), [], "--resume"),
    "block gone": (lambda m, a: (a / "block-00001.safetensors").unlink(), [], "block-00001"),
    "block cut": (truncate_block, [], "block-00000.safetensors is not a whole"),
    "block bit flip": (damage_block, [], "checksum"),
    "no run.json": (lambda m, a: (a / "run.json").unlink(), [], "--model DIR"),
    "model gone": (lambda m, a: shutil.rmtree(m), [], "no longer at"),
    "model changed": (flip_model_bit, [], "is not the model"),
    "no tokenizer": (no_tokenizer, [], "no tokenizer"),
    "unknown architecture": (
        edit_config(architectures=["NewForCausalLM"]), ["--no-verify"], "NewForCausalLM"
    ),
    "heads do not fit": (
        edit_config(num_attention_heads=3, head_dim=None), ["--no-verify"], "3 heads"
    ),
    "type": (None, ["--type", "tq3_1"], "tq3_1"),
    "embedding type": (None, ["--embedding-type", "iq9"], "iq9"),
    "split size": (None, ["--split-max-size", "2 apples"], "2 apples"),
    "unknown option": (None, ["--typ", "q2_k"], "--typ"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_line_and_no_file(case, made, tmp_path, capfd):
    change, options, said = BAD[case]
    model, artifact = (shutil.copytree(p, tmp_path / p.name) for p in made())
    (artifact / "run.json").write_text(json.dumps({"model_dir": str(model)}))
    if change:
        change(model, artifact)
    out = tmp_path / "out"
    out.mkdir()
    check_refusal([str(out / "m.gguf"), "--from", str(artifact), *options], said, capfd)
    assert list(out.iterdir()) == []


def check_refusal(argv, said, capfd):
    capfd.readouterr()
    try:
        code = main(argv)
    except SystemExit as e:
        code = e.code
    err = capfd.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("pt2-export: error: ")]
    assert code == 2
    assert len(errors) == 1 and said in errors[0], err
    assert err.splitlines()[-1] == errors[0] and "Traceback" not in err


def test_bad_outputs(made, tmp_path, capfd):
    _, artifact = made()
    old = tmp_path / "old.gguf"
    old.write_text("mine")
    (tmp_path / "d.gguf").mkdir()
    for name, said in {
        "old.gguf": "--overwrite",
        "d.gguf": "is a folder",
        "m.bin": "must end in .gguf",
        "nowhere/m.gguf": "does not exist",
    }.items():
        check_refusal([str(tmp_path / name), "--from", str(artifact)], said, capfd)
    assert old.read_text() == "mine"
    assert main([str(old), "--from", str(artifact), "--overwrite"]) == 0
    assert old.read_bytes()[:4] == b"GGUF"


def test_no_permission(made, tmp_path, capfd, monkeypatch):
    _, artifact = made()
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.geteuid() == 0:  # root may write anywhere, so the answer is put into the system's mouth
        monkeypatch.setattr(os, "access", lambda *args: False)
    check_refusal([str(closed / "m.gguf"), "--from", str(artifact)], "permission denied", capfd)
    assert list(closed.iterdir()) == []


def test_leftovers_of_a_killed_export_are_removed(made, tmp_path):
    _, artifact = made()
    for name in (".m.gguf.dead.tmp", ".other.gguf.dead.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
        (tmp_path / name / "carrier.gguf").write_bytes(b"x" * 100)
    busy = tmp_path / ".m.gguf.busy.tmp"
    busy.mkdir()
    with (busy / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        export_gguf(artifact, tmp_path / "m.gguf")
    left = sorted(f.name for f in tmp_path.iterdir())
    assert left == [".m.gguf.busy.tmp", ".other.gguf.dead.tmp", "m.gguf"]


def test_full_disk(made, tmp_path, capfd, monkeypatch):
    """Announced before anything is written when it can be known, and as it happens when not."""
    from export import checks

    _, artifact = made()
    argv = [str(tmp_path / "m.gguf"), "--from", str(artifact)]
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(checks.shutil, "disk_usage", lambda p: usage._replace(free=10_000))
        check_refusal(argv, "too full", capfd)
    with monkeypatch.context() as m:
        # What NumPy raises on a short write: no error number.
        short = OSError("180 requested and 100 written")
        m.setattr(gguf.GGUFWriter, "write_tensor_data", raising(short))
        check_refusal(argv, "disk is full", capfd)
    # The converter's own process may be the one that runs out: here of room for a single file.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        check_refusal(argv, "disk is full", capfd)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def raising(error):
    def raise_it(*args, **options):
        raise error

    return raise_it


def test_orders_that_cannot_be_folded(made, tmp_path, capfd):
    model, _ = made()
    residual, orders = foldable_orders(model)
    own = np.random.default_rng(5).permutation(len(residual)).astype(np.int32)
    orders = {**orders, "model.layers.1.mlp.up_proj": own}
    artifact = make_artifact(tmp_path / "ssr", model, orders=(residual, orders))
    argv = [str(tmp_path / "m.gguf"), "--from", str(artifact)]
    check_refusal(argv, "model.layers.1.mlp.up_proj has a column order of its own", capfd)
    check_refusal(argv, "--order foldable", capfd)


def test_the_newest_complete_artifact_is_the_default(made, tmp_path, capfd, monkeypatch):
    _, artifact = made()
    monkeypatch.chdir(tmp_path)
    check_refusal(["m.gguf"], "no artifact in this folder", capfd)
    shutil.copytree(artifact, tmp_path / "older")
    shutil.copytree(artifact, tmp_path / "newer")
    shutil.copytree(artifact, tmp_path / "unfinished")
    edit_manifest(complete=False)(None, tmp_path / "unfinished")
    os.utime(tmp_path / "older" / MANIFEST, (1, 1))
    os.utime(tmp_path / "newer" / MANIFEST, (2, 2))
    assert newest_artifact(tmp_path).name == "newer"
    assert main(["m.gguf"]) == 0
    captured = capfd.readouterr()
    assert "exporting newer" in captured.err
    assert "bits per weight" in captured.out and (tmp_path / "m.gguf").exists()
    shutil.rmtree(tmp_path / "older")
    shutil.rmtree(tmp_path / "newer")
    check_refusal(["n.gguf"], "unfinished is not complete", capfd)


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
