"""The files that are changed, each made on the spot: right ones, as small as they can be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from llamacpp_bench.results import Model, Perplexity, Placement, Results, Sample
from pt2_core.artifact import sensitivity
from pt2_core.artifact.folder import RUN, Artifact, ArtifactWriter
from pt2_core.artifact.matrix import TernaryMatrix, pack_ternary
from pt2_core.artifact.proof import Proof
from pt2_core.files import write_json
from pt2_core.formats import DEFAULT
from pt2_llama.builds import STAMP, Stamp

from . import gguf_file

HIDDEN, FFN, GROUP, LAYERS, VOCAB = 16, 32, 8, 2, 24
SITES = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
         "mlp.down_proj": (HIDDEN, FFN)}  # fmt: skip
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
    "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "rms_norm_eps": 1e-5, "head_dim": None,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "tie_word_embeddings": True,
}  # fmt: skip
NORM = "model.norm.weight"
RECIPE = """recipe: best
block_size: 64
damping: 0.02
aga: true
rounds: 2
calibration: wikitext2
skip: 'layers\\.0\\.'
"""
PUBLISHED = """name: Paper
source: a table of it
what: end to end
speedup:
  7b: {pp128: 1.5, tg256: 2.0}
  13b: {tg256: 2}
"""
HELD = {"kl": 0.1, "same_top": 0.9, "perplexity": 12.0, "teacher_perplexity": 11.0}
IDENTITY = {"settings": {"steps": 8}, "source": "0" * 64}


def _matrix(name: str, rows: int, cols: int, rng: np.random.Generator) -> TernaryMatrix:
    shape = (rows, cols // GROUP)
    return TernaryMatrix(
        name, pack_ternary(rng.integers(-1, 2, (rows, cols)).astype(np.int8)),
        rng.random(shape).astype(np.float16), rng.standard_normal(shape).astype(np.float16),
        rng.permutation(cols).astype(np.int32),
    )  # fmt: skip


def _record(rows: int, cols: int) -> dict[str, object]:
    errors = {"init": 0.5, "itf": 0.4, "final": 0.3}
    return {"rows": rows, "cols": cols, "block_size": GROUP, "order": "none", "norm_w": 2.0,
            "norm_x": 3.0, "E_w": errors, "E_x": errors}  # fmt: skip


def checkpoint(folder: Path) -> None:
    """A model's folder: config.json, and two shards with their index."""
    rng = np.random.default_rng(1)
    tensors = {
        f"model.layers.{i}.{site}.weight": rng.standard_normal(shape).astype(np.float16)
        for i in range(LAYERS)
        for site, shape in SITES.items()
    }
    tensors["model.embed_tokens.weight"] = rng.standard_normal((VOCAB, HIDDEN)).astype(np.float32)
    tensors[NORM] = np.ones(HIDDEN, np.float32)
    names = sorted(tensors)
    home = {n: f"model-0000{1 + (i > 3)}-of-00002.safetensors" for i, n in enumerate(names)}
    for shard in set(home.values()):
        save_file({n: tensors[n] for n in names if home[n] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
    (folder / "config.json").write_text(json.dumps(CONFIG))


def artifact(folder: Path) -> None:
    """A finished artifact of two blocks, with a replaced norm and a run.json."""
    rng = np.random.default_rng(2)
    shapes = {f"model.layers.{i}.{s}.weight": list(v) for i in range(LAYERS)
              for s, v in SITES.items()}  # fmt: skip
    model = {"fingerprint": "a" * 64, "architecture": "LlamaForCausalLM", "model_type": "llama",
             "tensors": {**shapes, NORM: [HIDDEN]}}  # fmt: skip
    writer = ArtifactWriter.create(folder, {
        "model": model, "settings": {"order": "none", "block_size": GROUP, "skip": None},
        "versions": {"torch": "2"}, "calibration": {"source": "x", "samples": 4},
        "kept": {"model.layers.0.mlp.up_proj": "skipped"},
        "refinement": {"before": HELD, "after": HELD},
    })  # fmt: skip
    writer.write_global(rng.permutation(HIDDEN))
    for i in range(LAYERS):
        matrices = [_matrix(f"model.layers.{i}.{s}", *v, rng) for s, v in SITES.items()]
        writer.record("activations", str(i), "b" * 64)
        writer.write_block(i, matrices, {m.name: _record(m.rows, m.cols) for m in matrices})
    writer.write_replaced({NORM: np.full(HIDDEN, 1.25)})
    writer.write_proof(some_proof().arrays(), some_proof().record())
    writer.finish()
    write_json(folder / RUN, {"model_dir": str(folder), "seconds": {"0": {"itf": 1.0}}})


def some_proof() -> Proof:
    """Two windows of eight tokens with two predictions at a position, and two lines."""
    rng = np.random.default_rng(5)
    top = np.stack([rng.permutation(20)[:6].reshape(3, 2) for _ in range(2)]).astype(np.int32)
    logprob = np.broadcast_to(np.log(np.array([0.5, 0.25], np.float32)), top.shape)
    tokens = rng.integers(0, 20, (2, 8)).astype(np.int32)
    ids = (np.array([1, 2], np.int32), np.array([3], np.int32))
    return Proof("text", tokens, 1, top, logprob.copy(), (("a", "x y"), ("b", "z")), ids)


def measured(folder: Path) -> None:
    """An artifact with the file of what each linear costs."""
    artifact(folder)
    opened, rng = Artifact.open(folder), np.random.default_rng(3)
    linears = {
        name: sensitivity.Linear(0.01, 0.5, rng.random(m["cols"], dtype=np.float32))
        for name, m in opened.matrices.items()
    }
    tables = {"embedding": 0.5, "head": 0.25}
    sensitivity.write(opened, sensitivity.Sensitivity(64, 0.2, linears, tables))


def state(folder: Path) -> None:
    """The state of an unfinished refinement."""
    import torch

    from quantize.refinement.state import save_state

    record = {"step": 4, "looks_without_gain": 0, "elapsed": 1.5, "before": HELD, "best": HELD,
              "history": [{"step": 0, "tokens": 0, "kl": None, "held_out": HELD}]}  # fmt: skip
    tensors = {"parameter.0": torch.rand(6), "snapshot.a.ternary": torch.ones(2, 2).byte(),
               "snapshot.a.alpha": torch.rand(2).half()}  # fmt: skip
    save_state(folder, IDENTITY, {"tensors": tensors, "record": record})


def tokens(folder: Path) -> None:
    """Token ids as --calibration takes them."""
    rng = np.random.default_rng(4)
    ids = rng.integers(0, VOCAB, (3, 8)).astype(np.int32)
    save_file({"calibration": ids, "other": ids.astype(np.float32)}, folder / "tokens.safetensors")


def results(folder: Path) -> None:
    """What pt2-bench writes, of two models."""
    models = [
        Model(
            name=name, file=f"{name}.gguf", origin="given", file_bytes=1000, sha256="0" * 64,
            parameters=4000, bpw=2.0, main_type=kind, decode_bytes=900, kv_bytes=2, peak_rss=5000,
            types={kind: {"tensors": 1, "elements": 4000, "bytes": 1000}},
            buffers={"CPU": 1.5}, placement=Placement(ops={kind: {"MUL_MAT": {"CPU": 2}}}),
            perplexity=[Perplexity("llama.cpp", 10.0, 0.1, 512, 10, 2550)],
        )
        for name, kind in (("base", "Q2_K"), ("ours", DEFAULT.name))
    ]  # fmt: skip
    tests = ("pp128", "tg64", "tg64@b1", "tg64@b8", "tg64@d512", "pp128+tg64")
    samples = [Sample(m.name, t, r, 10.0 + r) for m in models for t in tests for r in range(2)]
    whole = Results(
        machine={"cpu": "a CPU", "cores": 2, "ram_bytes": 1 << 30, "gpus": [], "system": "Linux",
                 "load_average": 0.0, "date": "2026-01-01"},
        build={"description": "test", "variant": "cpu", "build_commit": "abc", "backends": "CPU"},
        config={"threads": 2, "rounds": 2, "repeats": 3, "repack": True, "text": "t.txt",
                "text_sha256": "1", "chunks": None, "synthetic": None},
        models=models, samples=samples, baseline={"": "base"}, commands=["pt2-bench a.gguf"],
        bandwidth={"bytes_per_second": 1e6, "method": "test"}, warnings=["w"], complete=True,
    )  # fmt: skip
    whole.save(folder / "results.json")


def stamp(folder: Path) -> None:
    """The stamp of a build of llama.cpp."""
    known = Stamp("cpu", "k", "s", "o", "c", "off", ("llama-bench",), ("-DX=1",), "gcc",
                  {DEFAULT.ggml_name: 9.5}, library_path=("/usr/lib",))  # fmt: skip
    write_json(folder / STAMP, dataclasses.asdict(known))


def gguf(kind: str, folder: Path) -> None:
    """A GGUF file of a type."""
    (folder / "m.gguf").write_bytes(gguf_file.tiny_file(kind, layers=1).to_bytes())


def texts(folder: Path) -> None:
    """A recipe, published speeds, and a size of the command line."""
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "published.yaml").write_text(PUBLISHED)
    (folder / "size.txt").write_text("21.8MB")
