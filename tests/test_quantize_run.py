"""The whole quantiser on tiny models: determinism, resume, kill -9, recipes, bad input."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from quantize_support import (
    ARCHITECTURES,
    SAMPLES,
    SEQLEN,
    artifact_bytes,
    tiny_model,
    token_file,
)
from safetensors.torch import load_file, save_file

import quantize
from pt2_core.artifact.folder import Artifact
from pt2_core.errors import PT2Error
from pt2_core.model.checkpoint import Checkpoint
from quantize import calibration, cli
from quantize.config import ORDERS, RECIPES, Config, load_recipe
from quantize.evaluate import perplexity
from quantize.model.streamed import StreamedModel


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("llama") / "m")


@pytest.fixture(scope="module")
def calib(tmp_path_factory) -> str:
    return token_file(tmp_path_factory.mktemp("tokens") / "t.safetensors")


def config(calib: str, **changes) -> Config:
    base = {"calibration": calib, "samples": SAMPLES, "seqlen": SEQLEN, "threads": 1,
            "device": "cpu", "order_samples": 4}  # fmt: skip
    return Config(**{**base, **changes})


@pytest.mark.parametrize("recipe", ["fast", "best"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_gives_a_foldable_artifact(architecture, recipe, tmp_path, calib):
    folder = tiny_model(tmp_path / "m", architecture)
    result = quantize.ternarize(folder, tmp_path / "a", config(calib, **RECIPES[recipe]))
    a = Artifact.open(tmp_path / "a")
    shape = StreamedModel(Checkpoint.open(folder)).config
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    shared = shape.num_attention_heads // shape.num_key_value_heads
    assert len(result.matrices) == 21 and not result.kept
    assert sorted(a.residual_perm.tolist()) == list(range(128))
    assert a.residual_perm.tolist() != list(range(128))
    for index in range(3):
        for name, m in a.block(index).items():
            linear = name.split(".")[-1]
            if linear in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
                assert np.array_equal(m.perm, a.residual_perm), name
            if linear == "o_proj":
                inner = m.perm.reshape(-1, head_dim)
                start = np.arange(len(inner))[:, None] * head_dim
                inner = inner - start
                assert (np.sort(inner) == np.arange(head_dim)).all()
                groups = inner.reshape(-1, shared, head_dim)
                assert (groups == groups[:, :1]).all()
            error, scale = a.matrices[name]["E_x"]["final"], a.matrices[name]["norm_x"]
            assert 0 < error < 0.5 * scale
    # The manifest's E_w is that of the very weights that are stored.
    name, m = next(iter(a.block(0).items()))
    w = load_file(folder / "model.safetensors")[f"{name}.weight"].float().numpy()
    want = float(((w - m.dequantize()).astype(np.float64) ** 2).sum())
    assert a.matrices[name]["E_w"]["final"] == pytest.approx(want, rel=1e-4)


def test_later_blocks_are_calibrated_on_the_quantised_ones(llama, tmp_path, calib):
    """Change only block 0's quantisation: the moments, and so block 1's bytes, must change."""
    quantize.ternarize(llama, tmp_path / "a", config(calib, order="none"))
    quantize.ternarize(llama, tmp_path / "b", config(calib, order="none", skip=r"layers\.0\."))
    a, b = Artifact.open(tmp_path / "a"), Artifact.open(tmp_path / "b")
    assert not b.block(0) and len(b.kept) == 7
    name = "model.layers.1.mlp.down_proj"
    assert not np.array_equal(a.block(1)[name].alpha, b.block(1)[name].alpha)
    assert a.matrices[name]["norm_x"] != b.matrices[name]["norm_x"]


@pytest.mark.parametrize("order", [o for o in ORDERS if o != "foldable"])
def test_other_orders_run(order, llama, tmp_path, calib):
    size = 128 if order == "none" else 64  # what can be exported must fit a type
    quantize.ternarize(llama, tmp_path / "a", config(calib, order=order, block_size=size))
    a = Artifact.open(tmp_path / "a")
    assert a.residual_perm.tolist() == list(range(128))
    perms = [a.block(1)[f"model.layers.1.self_attn.{p}_proj"].perm for p in "qk"]
    assert np.array_equal(*perms) == (order != "ssr")
    assert np.array_equal(perms[0], np.arange(128)) == (order == "none")


def test_the_method_beats_its_parts_in_output_error(llama, tmp_path, calib):
    def error(**changes):
        r = quantize.ternarize(llama, tmp_path / "x", config(calib, **changes), overwrite=True)
        assert perplexity(llama, torch.zeros(2, 8, dtype=torch.int64), artifact=r.path).tokens == 14
        return sum(m["E_x"]["final"] / m["norm_x"] for m in r.matrices.values())

    default, paper = error(), error(order="ssr", reround=0)
    assert default < paper < error(compensate=False, order="none", reround=0)


def test_sequential_hessians_see_the_quantised_linears_before_them(llama, tmp_path, calib):
    """o_proj's Hessian then comes from ternary q, k and v: its scale differs, q's does not."""
    both = [
        quantize.ternarize(llama, tmp_path / str(s), config(calib, sequential=s)).matrices
        for s in (False, True)
    ]
    first = "model.layers.0.self_attn."
    q, o = ([m[first + name]["norm_x"] for m in both] for name in ("q_proj", "o_proj"))
    assert q[0] == q[1]
    assert abs(o[0] - o[1]) > 1e-4 * o[0]


def test_asymmetric_targets_bring_the_models_outputs_closer(llama, tmp_path, calib):
    """On the calibration tokens themselves the last activations come nearer the full model's."""
    tokens = load_file(calib.removesuffix(":calibration"))["calibration"].long()

    def distance(**changes) -> float:
        r = quantize.ternarize(llama, tmp_path / "x", config(calib, **changes), overwrite=True)
        model, a = StreamedModel(Checkpoint.open(llama)), Artifact.open(r.path)
        full = model.start(tokens, len(tokens))
        quantised = full.clone()
        for index in range(model.n_blocks):
            weights = {n: torch.from_numpy(m.dequantize()) for n, m in a.block(index).items()}
            block = model.block(index)
            full.advance(block.module(), index)
            quantised.advance(block.module(weights), index)
        return float((full.batches[0].hidden - quantised.batches[0].hidden).square().mean())

    plain = distance(sequential=True)
    assert distance(sequential=True, asymmetry=0.5) < 0.98 * plain
    assert distance(sequential=True, asymmetry=0.5, stream=0.5) < 0.96 * plain


@pytest.mark.parametrize("recipe", ["fast", "best"])
def test_two_runs_give_the_same_bytes_and_resume_finishes_any_state(recipe, llama, tmp_path, calib):
    cfg = config(calib, **RECIPES[recipe])
    quantize.ternarize(llama, tmp_path / "a", cfg)
    moved = shutil.copytree(llama, tmp_path / "moved")
    quantize.ternarize(moved, tmp_path / "b", cfg)
    want = artifact_bytes(tmp_path / "a")
    assert artifact_bytes(tmp_path / "b") == want
    assert str(tmp_path).encode() not in want["manifest.json"]
    with pytest.raises(PT2Error, match="holds a complete artifact: use --resume or --overwrite"):
        quantize.ternarize(llama, tmp_path / "a", cfg)
    # Back to the state after block 0, with a torn temporary file lying about.
    manifest = json.loads(want["manifest.json"])
    manifest["complete"] = False
    for key in ("block-00001.safetensors", "block-00002.safetensors"):
        del manifest["files"][key]
    manifest["matrices"] = {k: v for k, v in manifest["matrices"].items() if "layers.0." in k}
    del manifest["activations"]["1"]
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "b" / ".block-00002.safetensors.xy.tmp").write_text("torn")
    (tmp_path / "b" / "block-00001.safetensors").write_text("torn")
    with pytest.raises(PT2Error, match="unfinished"):
        quantize.ternarize(llama, tmp_path / "b", cfg)
    with pytest.raises(PT2Error, match=r"settings\.seed was 0 and is now 1"):
        quantize.ternarize(llama, tmp_path / "b", dataclasses.replace(cfg, seed=1), resume=True)
    quantize.ternarize(llama, tmp_path / "b", cfg, resume=True)
    assert artifact_bytes(tmp_path / "b") == want
    # A machine that computes other activations is noticed.
    manifest["activations"]["0"] = "0" * 64
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PT2Error, match="other activations after block 0"):
        quantize.ternarize(llama, tmp_path / "b", cfg, resume=True)
    # Another model is refused by its fingerprint.
    other = tiny_model(tmp_path / "other", rope_theta=5000.0)
    with pytest.raises(PT2Error, match=r"model\.fingerprint was"):
        quantize.ternarize(other, tmp_path / "a", cfg, resume=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_and_resume_gives_the_same_bytes(llama, calib):
    script = Path(__file__).with_name("kill_resume.py")
    kills = os.environ.get("PT2_KILLS", "3")
    done = subprocess.run(
        [sys.executable, str(script), str(llama), calib, "--kills", kills],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{kills} kills" in done.stdout


# Settings ----------------------------------------------------------------------------------------


def test_recipes(tmp_path):
    paper = load_recipe("paper")
    assert (paper.order, paper.reround, paper.block_size, paper.samples) == ("ssr", 0, 128, 128)
    assert load_recipe("default") == load_recipe("fast") == Config()
    best = load_recipe("best")
    assert best == dataclasses.replace(Config(), **RECIPES["best"]) != Config()
    assert best.rounds and best.noise and best.sequential and best.asymmetry == best.stream == 0.5
    assert load_recipe("paper", reround=2, seed=None).reround == 2
    file = tmp_path / "r.yaml"
    file.write_text("recipe: best\nnoise: 0\n")
    assert load_recipe(str(file)) == dataclasses.replace(best, noise=0.0)
    file.write_text(yaml.safe_dump({"recipe": "paper", "block_size": 64, "damping": 1}))
    assert load_recipe(str(file)) == dataclasses.replace(paper, block_size=64, damping=1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blocksize: 64", "unknown setting 'blocksize'"),
        ("block_size: big", "block_size must be of type int"),
        ("block_size: 100", "block_size must be one of 64, 128, 256"),
        ("recipe: none", "recipe must be one of"),
        ("aga: 3", "aga must be of type bool"),
        ("samples: 0", "samples must be at least 1"),
        ("damping: -1", "damping must be above 0"),
        ("asymmetry: 1.5", "asymmetry must lie in 0 to 1"),
        ("recipe: [a]", "recipe must be one of"),
        ("skip: '['", "not a regular expression"),
        ("- a", "must hold lines"),
        ("a: [", "cannot read the recipe"),
    ],
)
def test_bad_recipes(tmp_path, text, message):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(PT2Error, match=message):
        load_recipe(str(file))


def test_the_package_does_not_import_torch_before_it_is_needed():
    code = "import sys, pt2_core.cli, pt2_core.artifact.folder, quantize; assert 'torch' not in sys.modules; quantize.ternarize; assert 'torch' in sys.modules"  # noqa: E501
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Calibration text ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory) -> Path:
    """A model folder with a word tokenizer that, like Llama's, adds a BOS token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder = tiny_model(tmp_path_factory.mktemp("tok") / "m")
    vocab = {"<unk>": 0, "<s>": 1, **{f"w{i}": i + 2 for i in range(90)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def load(source: Path | str, model: Path, **changes):
    base = {"samples": 4, "seqlen": 8, "vocab": 96, "seed": 0, "bos": False}
    return calibration.load_calibration(str(source), model, **{**base, **changes})


def test_windows_are_drawn_by_the_seed_and_do_not_overlap(tmp_path, with_tokenizer):
    words = [f"w{i % 90}" for i in range(90)]
    (tmp_path / "t.txt").write_text(" ".join(words))
    got = load(tmp_path / "t.txt", with_tokenizer)
    assert torch.equal(got.tokens, load(tmp_path / "t.txt", with_tokenizer).tokens)
    assert not torch.equal(got.tokens, load(tmp_path / "t.txt", with_tokenizer, seed=1).tokens)
    assert got.tokens.unique().numel() == 32  # every word once: no overlap, no special token
    assert bool((got.tokens.diff(dim=1) == 1).all())
    bos = load(tmp_path / "t.txt", with_tokenizer, bos=True).tokens
    assert bool((bos[:, 0] == 1).all()) and torch.equal(bos[:, 1:], got.tokens[:, :-1])
    (tmp_path / "d").mkdir()
    for name, part in (("b.txt", words[45:]), ("a.md", words[:45]), ("c.bin", ["w1"] * 99)):
        (tmp_path / "d" / name).write_text(" ".join(part))
    assert torch.equal(load(tmp_path / "d", with_tokenizer).tokens, got.tokens)
    assert got.record["source"] == "t.txt"


def test_too_little_text_is_said_with_the_numbers(tmp_path, with_tokenizer):
    (tmp_path / "t.txt").write_text("w1 " * 20)
    with pytest.raises(
        PT2Error, match=r"t\.txt has 20 tokens, but 4 samples of 8 need 32.*samples 2"
    ):
        load(tmp_path / "t.txt", with_tokenizer)
    with pytest.raises(PT2Error, match="--seqlen 5"):
        load(tmp_path / "t.txt", with_tokenizer, seqlen=21)


# Bad input on the command line --------------------------------------------------------------------


def rewrite(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def put(name: str, value):
    def change(tensors):
        tensors[name] = value(tensors[name])

    return change


def poison(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t.view(-1)[5] = float("nan")
    return t


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    value = json.loads(file.read_text())
    value.update(changes)
    file.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def cut(file: Path, by: int) -> None:
    file.write_bytes(file.read_bytes()[:-by])


Q = "model.layers.1.self_attn.q_proj.weight"
ST = "model.safetensors"
BAD_MODELS = {
    "truncated": (lambda m: cut(m / ST, 1000), "truncated"),
    "too long": (lambda m: (m / ST).write_bytes((m / ST).read_bytes() + b"xx"), "longer"),
    "empty file": (lambda m: (m / ST).write_bytes(b""), "not a whole safetensors"),
    "not safetensors": (lambda m: (m / ST).write_bytes(b"GGUF" * 99), "not a whole safetensors"),
    "no weights": (lambda m: (m / ST).unlink(), "has no model.safetensors"),
    "no config": (lambda m: (m / "config.json").unlink(), "has no config.json"),
    "broken config": (lambda m: (m / "config.json").write_text("{"), "not valid JSON"),
    "config list": (lambda m: (m / "config.json").write_text("[1]"), "does not hold"),
    "unknown": (lambda m: edit_config(m, architectures=["FooForCausalLM"]), "does not know"),
    "no architecture": (lambda m: edit_config(m, architectures=None, model_type=None), "(none)"),
    "layers": (lambda m: edit_config(m, num_hidden_layers="many"), "cannot use"),
    "more layers": (lambda m: edit_config(m, num_hidden_layers=9), "hold 3 decoder blocks"),
    "shape": (lambda m: edit_config(m, vocab_size=99), "config.json asks for [99, 128]"),
    "missing tensor": (lambda m: rewrite(m, lambda t: t.pop(Q)), f"no tensor {Q}"),
    "nan": (lambda m: rewrite(m, put(Q, poison)), f"tensor {Q}"),
    "integers": (lambda m: rewrite(m, put(Q, lambda t: t.to(torch.int8))), "of type I8"),
    "width": (lambda m: rewrite(m, put(Q, lambda t: t[:, :9].contiguous())), "shape [128, 9]"),
    "huge": (lambda m: rewrite(m, put(Q, lambda t: t.float() * 1e9)), "float16"),
    "index": (lambda m: (m / f"{ST}.index.json").write_text("{}"), "weight_map"),
    "tokenizer": (lambda m: None, "has no tokenizer"),
}  # fmt: skip


def check_one_line(capsys, code: int, message: str) -> None:
    err = capsys.readouterr().err.strip()
    assert code == 2, err
    line = err.splitlines()[-1]
    assert line.startswith("pt2-quantize: error: ") and message in line, err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models(name, llama, calib, tmp_path, capsys):
    damage, message = BAD_MODELS[name]
    folder = shutil.copytree(llama, tmp_path / "m")
    damage(folder)
    text = tmp_path / "t.txt"
    text.write_text("some words")
    source = str(text) if name == "tokenizer" else calib
    argv = [str(folder), "-o", str(tmp_path / "a"), "--calibration", source, "-q", "--samples",
            str(SAMPLES), "--seqlen", str(SEQLEN), "--threads", "1", "--device", "cpu"]  # fmt: skip
    check_one_line(capsys, cli.main(argv), message)
    manifest = tmp_path / "a" / "manifest.json"
    assert not manifest.exists() or not json.loads(manifest.read_text())["complete"]


BAD_OPTIONS = {
    "no model": (["/nonexistent/m"], "there is no model folder"),
    "hub name": (["org/name"], "there is no folder org/name"),
    "no such text": (["M", "--calibration", "nope.txt"], "no calibration text 'nope.txt'"),
    "wrong tensor": (["M", "--calibration", "T:nope"], "has no tensor 'nope'"),
    "not ids": (["M", "--calibration", "T:other"], "not rows of token ids"),
    "two tensors": (["M", "--calibration", "T"], "has no tensor ''"),
    "few samples": (["M", "--samples", "7"], "has 6 rows of 24 tokens"),
    "recipe": (["M", "--recipe", "nope"], "no recipe 'nope'"),
    "report": (["M", "--report", "x.pdf"], "must end in .html or .png"),
    "skip all": (["M", "--skip", "."], "matches every linear"),
    "regex": (["M", "--skip", "("], "not a regular expression"),
    "seed": (["M", "--seed", "-1"], "seed must be at least 0"),
    "out is a file": (["M", "-o", "T"], "is a file"),
    "out unwritable": (["M", "-o", "/proc/pt2/out"], "cannot make the folder"),
    "resume nothing": (["M", "-o", "FOREIGN", "--resume"], "not the manifest"),
    "int expected": (["M", "--samples", "ten"], "invalid int value"),
    "choice": (["M", "--order", "best"], "invalid choice"),
    "unknown option": (["M", "--orders", "ssr"], "unrecognized arguments"),
    "both": (["M", "--resume", "--overwrite"], "not allowed with"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(name, llama, calib, tmp_path, capsys):
    options, message = BAD_OPTIONS[name]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "manifest.json").write_text("{}")
    names = {"M": str(llama), "T": calib.removesuffix(":calibration"), "FOREIGN": str(foreign)}
    options = [names.get(o, o.replace("T:", f"{names['T']}:")) for o in options]
    base = ["-o", str(tmp_path / "a"), "--calibration", calib, "--samples", str(SAMPLES),
            "--seqlen", str(SEQLEN), "--threads", "1", "--device", "cpu", "-q"]  # fmt: skip
    try:
        code = cli.main([*base, *options])
    except SystemExit as e:  # argparse
        code = int(e.code or 0)
    check_one_line(capsys, code, message)
    assert not (tmp_path / "a" / "manifest.json").exists()


def test_a_full_disk_leaves_no_file_under_its_final_name(
    llama, calib, tmp_path, capsys, monkeypatch
):
    import pt2_core.artifact.folder

    real = pt2_core.artifact.folder.save_file

    def full(tensors, path):
        if "block-00001" in str(path):
            Path(path).write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(pt2_core.artifact.folder, "save_file", full)
    argv = [str(llama), "-o", str(tmp_path / "a"), "--calibration", calib, "-q", "--samples",
            str(SAMPLES), "--seqlen", str(SEQLEN), "--threads", "1", "--device", "cpu"]  # fmt: skip
    check_one_line(capsys, cli.main(argv), "the disk is full")
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert names == {"manifest.json", "run.json", "global.safetensors", "block-00000.safetensors"}
    monkeypatch.undo()
    assert cli.main([*argv, "--resume"]) == 0
    assert Artifact.open(tmp_path / "a").n_blocks == 3


def test_the_command_prints_a_summary(llama, calib, tmp_path, capsys):
    argv = [str(llama), "-o", str(tmp_path / "a"), "--calibration", calib, "--samples",
            str(SAMPLES), "--seqlen", str(SEQLEN), "--threads", "1", "--device", "cpu",
            "--report", str(tmp_path / "r.html")]  # fmt: skip
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    for word in ("down_proj", "init", "itf", "aga", "reround", "final", "1.835 bits", "pt2-export"):
        assert word in out
    assert len(out.splitlines()) < 25
    assert "<svg" in (tmp_path / "r.html").read_text()
    assert cli.main([*argv, "--overwrite", "--report", str(tmp_path / "r.png")]) == 0
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
