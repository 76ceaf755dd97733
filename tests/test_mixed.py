"""Sensitivities and mixed precision: what is measured, what is chosen, what is in the file."""

from __future__ import annotations

import dataclasses
import itertools
import json

import gguf
import numpy as np
import pytest
import torch
from export_support import make_artifact, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_support import tiny_model, token_file
from safetensors.torch import load_file, save_file

import quantize
from export import ExportConfig, export_gguf, gguf_types
from export.cli import main
from export.config import parse_size
from export.fold import dense_plan
from export.mixed import Option, knapsack
from export.source import TernarySource
from pt2_core.artifact import sensitivity
from pt2_core.artifact.folder import Artifact
from pt2_core.artifact.sensitivity import Linear, Sensitivity
from pt2_core.errors import PT2Error
from pt2_core.formats import DEFAULT, SMALLEST
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.texts.tokens import read_tokens
from quantize import sensitivities
from quantize.config import Config

# The knapsack -------------------------------------------------------------------------------------

OPTIONS = st.lists(
    st.tuples(st.integers(1, 60), st.floats(-1, 1, allow_nan=False)), min_size=1, max_size=4
)


@given(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(0, 300))
@settings(max_examples=200, deadline=None)
def test_the_knapsack_is_exact(items, budget):
    options = [[Option("t", n, loss) for n, loss in item] for item in items]
    fitting = [
        sum(o.loss for o in pick)
        for pick in itertools.product(*options)
        if sum(o.nbytes for o in pick) <= budget
    ]
    if not fitting:
        with pytest.raises(PT2Error, match="use a larger --target-size"):
            knapsack(options, budget)
        return
    chosen = [item[i] for item, i in zip(options, knapsack(options, budget), strict=True)]
    assert sum(o.nbytes for o in chosen) <= budget
    assert sum(o.loss for o in chosen) == pytest.approx(min(fitting))


def test_a_large_knapsack_stays_within_its_budget_and_near_the_bound():
    rng = np.random.default_rng(0)
    items = [
        [Option("a", int(n), 0.0), Option("b", int(1.4 * n), -float(g) * 0.7),
         Option("c", int(2.4 * n), -float(g))]
        for n, g in zip(rng.integers(10**5, 10**8, 300), rng.random(300), strict=True)
    ]  # fmt: skip
    least = sum(i[0].nbytes for i in items)
    budget = least + least // 5
    pick = knapsack(items, budget)
    assert pick == knapsack(items, budget)
    spent = sum(i[n].nbytes for i, n in zip(items, pick, strict=True))
    assert 0.99 * budget < spent <= budget
    gain = -sum(i[n].loss for i, n in zip(items, pick, strict=True))
    # No choice can gain more than the budget spent at the steepest prices (the linear relaxation).
    steps = []
    for a, b, c in items:
        first, both = -b.loss / (b.nbytes - a.nbytes), -c.loss / (c.nbytes - a.nbytes)
        assert first > both
        steps += [(first, b.nbytes - a.nbytes), ((b.loss - c.loss) / (c.nbytes - b.nbytes),
                                                 c.nbytes - b.nbytes)]  # fmt: skip
    left, bound = budget - least, 0.0
    for price, size in sorted(steps, reverse=True):
        bound += price * min(size, left)
        left -= min(size, left)
    assert 0.99 * bound <= gain <= bound * (1 + 1e-9)


# Measuring ----------------------------------------------------------------------------------------


def logits(folder, weights, tokens, inputs=None):
    """Log-probabilities of transformers' own model with other weights; ``inputs``, module name ->
    None, receives what these modules were given."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            own[f"{name}.weight"].copy_(torch.from_numpy(value))
        for name in inputs or {}:

            def take(_, args, name=name):
                inputs[name] = args[0].reshape(-1, args[0].shape[-1])

            model.get_submodule(name).register_forward_pre_hook(take)
        return model(tokens).logits.double().log_softmax(-1)


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2"])  # untied, tied
def test_gains_are_those_of_the_whole_model(architecture, tmp_path):
    folder = tiny_model(tmp_path / "m", architecture)
    if architecture == "Qwen2":  # with larger embeddings a tied model is sure of every token
        tensors = load_file(folder / "model.safetensors")
        tensors["model.embed_tokens.weight"] *= 0.1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    calib = token_file(tmp_path / "t.safetensors")
    config = Config(calibration=calib, samples=4, seqlen=24, threads=1, device="cpu",
                    order_samples=2, sensitivity=2)  # fmt: skip
    quantize.ternarize(folder, tmp_path / "a", config)
    artifact = Artifact.open(tmp_path / "a")
    result = sensitivity.read(artifact)
    tokens = read_tokens(tmp_path / "t.safetensors", "calibration")[4:6]
    ternary = {n: m.dequantize() for i in range(3) for n, m in artifact.block(i).items()}
    full = logits(folder, {}, tokens)

    def kl(weights):
        return float((full.exp() * (full - logits(folder, weights, tokens))).sum(-1).mean())

    assert result.tokens == 2 * 24
    assert result.kl == pytest.approx(kl(ternary), rel=1e-3) and result.kl > 1e-3
    assert set(result.linears) == set(ternary) == set(artifact.matrices)
    seen = dict.fromkeys(["model.layers.0.self_attn.v_proj", "model.layers.2.mlp.down_proj"])
    logits(folder, ternary, tokens, seen)
    for name, x in seen.items():
        without = {n: w for n, w in ternary.items() if n != name}
        assert result.linears[name].gain == pytest.approx(
            result.kl - kl(without), abs=2e-3 * result.kl
        )
        assert np.allclose(result.linears[name].energy, x.square().mean(dim=0), rtol=1e-3)
        original = Checkpoint.open(folder).read(f"{name}.weight").float()
        error = (x @ (original - torch.from_numpy(ternary[name])).T).square().sum(dim=1).mean()
        assert result.linears[name].error == pytest.approx(float(error), rel=1e-3)
    assert set(result.tables) == ({"embedding"} if architecture == "Qwen2" else
                                  {"embedding", "head"})  # fmt: skip
    assert all(v > 0 for v in result.tables.values())
    assert "nats per token" in sensitivities.summary(result)


def test_figures_of_another_state_or_damaged_ones_are_refused(tmp_path):
    folder = tiny_model(tmp_path / "m")
    calib = token_file(tmp_path / "t.safetensors")
    config = Config(calibration=calib, samples=4, seqlen=24, threads=1, device="cpu",
                    order_samples=2)  # fmt: skip
    quantize.ternarize(folder, tmp_path / "a", config)
    artifact = Artifact.open(tmp_path / "a")
    with pytest.raises(PT2Error, match=r"python -m quantize\.sensitivities"):
        sensitivity.read(artifact)
    argv = [str(tmp_path / "a"), "--calibration", calib, "--windows", "2", "--seqlen", "24",
            "--threads", "1", "--device", "cpu"]  # fmt: skip
    assert sensitivities.main(argv) == 0
    file = tmp_path / "a" / sensitivity.FILE
    first = file.read_bytes()
    assert sensitivities.main(argv) == 0 and file.read_bytes() == first
    file.write_bytes(first[:-8])
    with pytest.raises(PT2Error, match="damaged"):
        sensitivity.read(artifact)
    file.write_bytes(first)
    quantize.ternarize(folder, tmp_path / "b", dataclasses.replace(config, reround=0))
    (tmp_path / "b" / sensitivity.FILE).write_bytes(first)
    with pytest.raises(PT2Error, match="not of this state"):
        sensitivity.read(Artifact.open(tmp_path / "b"))
    quantize.ternarize(folder, tmp_path / "a", config, overwrite=True)
    assert not file.exists()
    assert sensitivities.main([str(tmp_path / "a"), "--calibration", calib, "--windows", "0"]) == 2


# Exporting ----------------------------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path):
    """A model, its artifact and made-up figures: what layer 1 gains is worth the most."""
    model = make_model(tmp_path / "model", "llama", hidden=256, ffn=512)
    folder = make_artifact(tmp_path / "artifact", model)
    artifact = Artifact.open(folder)
    rng = np.random.default_rng(0)
    linears = {
        name: Linear(
            0.1 if ".1." in name else 0.01, 0.2 * m["rows"],
            rng.uniform(0.5, 2, m["cols"]).astype(np.float32),
        )
        for name, m in artifact.matrices.items()
    }  # fmt: skip
    linears["model.layers.0.self_attn.q_proj"] = dataclasses.replace(
        linears["model.layers.0.self_attn.q_proj"], gain=-0.5
    )
    tables = {"embedding": 0.5, "head": 2.0}
    sensitivity.write(artifact, Sensitivity(64, 1.5, linears, tables))
    return model, folder


def read(path):
    gguf_types.register()
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


@pytest.mark.llama
def test_files_fit_their_target_and_larger_ones_lose_less(measured, tmp_path):
    _, artifact = measured
    plain = export_gguf(artifact, tmp_path / "p.gguf", ExportConfig(type=SMALLEST.ggml_name))
    assert plain.mixed is None
    kinds, gains = [], []
    for factor in (0.9, 1.1, 1.4, 3.0):
        target = int(factor * plain.file_bytes)
        config = ExportConfig(type=SMALLEST.ggml_name, target_size=target)
        report = export_gguf(artifact, tmp_path / f"{factor}.gguf", config)
        assert report.file_bytes <= target and report.verified
        assert report.mixed is not None and not report.fallbacks
        gains.append(float(report.mixed.split("save ")[1].split()[0]))
        kinds.append({n: t.tensor_type.name for n, t in read(tmp_path / f"{factor}.gguf").items()})
    assert gains == sorted(gains) and gains[0] < gains[-1]
    # Layer 1 is worth ten times layer 0; what has no gain stays ternary however much there is.
    upgraded = [n for n, kind in kinds[1].items() if kind in ("Q2_K", "Q3_K", "Q4_K")
                and n.startswith("blk")]  # fmt: skip
    assert upgraded and all(n.startswith("blk.1.") for n in upgraded)
    last = {n: k for n, k in kinds[3].items() if n.endswith("weight") and "norm" not in n}
    assert last.pop("blk.0.attn_q.weight") == SMALLEST.name
    assert last.pop("output.weight") == last.pop("token_embd.weight") == "Q8_0"
    assert set(last.values()) == {"Q4_K"}
    # Bits per weight are the same budget in other words; a type that is given stays.
    bits = 8 * 1.4 * plain.file_bytes / plain.parameters
    config = ExportConfig(type=SMALLEST.ggml_name, target_bpw=bits, output_type="q6_k")
    report = export_gguf(artifact, tmp_path / "b.gguf", config)
    assert report.bpw <= bits
    assert read(tmp_path / "b.gguf")["output.weight"].tensor_type.name == "Q6_K"
    field = gguf.GGUFReader(tmp_path / "b.gguf").fields["pt2.settings"].contents()
    assert json.loads(field)["export"]["target_bpw"] == pytest.approx(bits)


@pytest.mark.llama
def test_restored_linears_are_the_folded_originals(measured, tmp_path):
    """Q4_K of the source's weights, rows and columns where the fold has them."""
    model, folder = measured
    export_gguf(
        folder, tmp_path / "m.gguf", ExportConfig(type=SMALLEST.ggml_name, target_size=10**7)
    )
    tensors = read(tmp_path / "m.gguf")
    checkpoint, artifact = Checkpoint.open(model), Artifact.open(folder)
    orders = {n: m.perm for i in range(2) for n, m in artifact.block(i).items()}
    source = TernarySource.read(artifact, checkpoint, lambda *step: None)
    plan = dense_plan(source.plan, source.places, orders)
    for name, module in {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
                         "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}.items():  # fmt: skip
        source = f"model.layers.1.{module}.weight"
        meant = plan.apply(source, checkpoint.read(source).float().numpy())
        tensor = tensors[f"blk.1.{name}.weight"]
        assert tensor.tensor_type.name == "Q4_K"
        got = gguf.dequantize(np.asarray(tensor.data), tensor.tensor_type)
        error = np.square(got - meant).sum() / np.square(meant).sum()
        assert error < 0.01, name


@pytest.mark.llama
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-size", "100K"], "use a larger --target-size or --target-bpw"),
        (["--target-bpw", "0.5"], "use a larger --target-size or --target-bpw"),
        (["--target-size", "1M", "--target-bpw", "3"], "exclude each other"),
        (["--target-bpw", "-1"], "must lie in 0 to 32"),
        (["--target-size", "small"], "--target-size 'small' is not a size"),
        (
            ["--target-size", "1M", "--type", "q2_k"],
            f"need --type {DEFAULT.ggml_name} or {SMALLEST.ggml_name}",
        ),
        (["UNMEASURED", "--target-size", "1M"], "python -m quantize.sensitivities"),
    ],
)
def test_targets_that_cannot_be_met(options, message, measured, tmp_path, capsys):
    _, artifact = measured
    if options[0] == "UNMEASURED":
        options = options[1:]
        (artifact / sensitivity.FILE).unlink()
    argv = [
        str(tmp_path / "x.gguf"),
        "--from",
        str(artifact),
        "--type",
        SMALLEST.ggml_name,
        *options,
    ]
    assert main(argv) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "x.gguf").exists()


def test_sizes():
    assert parse_size("21.8MB") == 21_800_000 and parse_size("2g") == 2 * 10**9
    assert parse_size("1.7G") == 1_700_000_000 and parse_size("512") == 512
    for text in ("", "0", "1.5.2M", "-3M", "2T"):
        with pytest.raises(PT2Error, match="is not a size"):
            parse_size(text)
