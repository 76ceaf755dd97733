"""What pt2-export refuses: one clear line, exit status 2, and nothing left beside the output."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil

import gguf
import numpy as np
import pytest
from export_support import foldable_orders, make_artifact

from export import export_gguf
from export.cli import main, newest_artifact
from pt2_core.artifact.folder import MANIFEST

pytestmark = pytest.mark.llama


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
        edit_config(num_attention_heads=3, head_dim=None), ["--no-verify"],
        "o_proj has a column order of its own, which nothing folds"
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


# Outputs ------------------------------------------------------------------------------------------


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
        check_refusal(argv, "ulimit -f), or the disk is full", capfd)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def raising(error):
    def raise_it(*args, **options):
        raise error

    return raise_it
