"""Small random models of any architecture and artifacts of them, for the exporter's tests.

The artifacts are not good ones: alpha, mu and T come from a plain threshold. What is of interest is
where everything goes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from export_support import make_byte_tokenizer, make_tokenizer, ternarise
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from pt2_core.artifact.folder import RUN, Artifact, ArtifactWriter
from pt2_core.artifact.matrix import TernaryMatrix, pack_ternary
from pt2_core.files import write_json
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.model.fold_edges import FoldEdges, Heads, edges_for
from pt2_core.model.weight_files import SINGLE

F32 = NDArray[np.float32]
SMALL: dict[str, Any] = dict(
    hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=256, num_experts=4,
    num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=128,
    shared_expert_intermediate_size=128, n_shared_experts=1, shared_intermediate_size=128,
    n_group=1, topk_group=1, first_k_dense_replace=1, n_embd=256, n_layer=2, n_head=4,
    n_positions=256, n_inner=512, ffn_dim=512, word_embed_proj_dim=256, sliding_window=64,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
# Of few rows, and what decides where a token goes: never ternary.
NEVER = re.compile(r"(mlp\.gate|router|wg|shared_expert_gate|block_sparse_moe\.gate|layer)\.weight")


def make_any_model(folder: Path, kind: str, *, spm: bool = False, **extra: Any) -> Path:
    """Save a random model of a transformers class with a tokenizer; nothing in it is neutral."""
    folder.mkdir(parents=True)
    vocab = make_tokenizer(folder) if spm else make_byte_tokenizer(folder)
    known = transformers.CONFIG_MAPPING[kind]()
    settings = {k: v for k, v in SMALL.items() if hasattr(known, k)} | {"vocab_size": vocab}
    if types := getattr(known, "layer_types", None):
        settings["layer_types"] = (list(dict.fromkeys(types)) * 2)[:2]
    config = transformers.CONFIG_MAPPING[kind](**{**settings, **extra})
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(torch.rand_like(p) + 0.5 if "norm" in name else torch.randn_like(p) * 0.1)
            elif p.ndim > 1:
                p.copy_(torch.randn_like(p) * (p.shape[-1] ** -0.5))
    model.save_pretrained(folder)
    return folder


def random_order(edges: FoldEdges | None, matrix: str, cols: int, stream: Any, rng: Any) -> Any:
    """An order that can be folded: int32 ``[cols]``."""
    role = "none" if edges is None else edges.role(matrix)
    if role == "residual":
        return stream
    if role == "free":
        return rng.permutation(cols).astype(np.int32)
    if role == "heads":
        assert edges is not None
        heads = edges.edges[matrix].heads
        assert isinstance(heads, Heads)
        inner = np.stack([rng.permutation(heads.dim) for _ in range(heads.n_kv)])
        inner = np.repeat(inner, heads.n_head // heads.n_kv, axis=0)
        return (inner + np.arange(heads.n_head)[:, None] * heads.dim).reshape(-1).astype(np.int32)
    return np.arange(cols, dtype=np.int32)


def make_any_artifact(
    folder: Path,
    model_dir: Path,
    *,
    transposed: str = r"(?!)",
    skip: str = r"(?!)",
    group: int = 128,
) -> Path:
    """Write an artifact of every matrix in the decoder blocks whose columns the blocks divide.

    Args:
        transposed: tensors that the file holds as ``[..., cols, rows]``.
        skip: matrices that are kept.
    """
    model = Checkpoint.open(model_dir)
    shapes = {name: list(info.shape) for name, info in model.tensors.items()}
    edges = edges_for(model.settings, shapes)
    rng = np.random.default_rng(1)
    hidden = next(iter(shapes[n][-1] for n in shapes if "emb" in n or "wte" in n))
    stream = np.arange(hidden, dtype=np.int32)
    if edges is not None:
        stream = rng.permutation(hidden).astype(np.int32)
    kept: dict[str, str] = {}
    blocks: dict[int, list[tuple[str, str, int | None, bool]]] = {}
    for tensor, shape in shapes.items():
        block = re.search(r"\.(\d+)\.", tensor)
        turned = bool(re.search(transposed, tensor))
        if block is None or not 2 <= len(shape) <= 3 or NEVER.search(tensor) or "bias" in tensor:
            continue
        if shape[-2 if turned else -1] % group:
            continue
        base = tensor.removesuffix(".weight")
        for e in [None] if len(shape) == 2 else range(shape[0]):
            name = base if e is None else f"{base}[{e}]"
            if re.search(skip, name):
                kept[name] = "matches --skip"
                continue
            blocks.setdefault(int(block[1]), []).append((name, tensor, e, turned))
    writer = ArtifactWriter.create(
        folder,
        {
            "model": model.identity(model.fingerprint()[0]),
            "settings": {"order": "foldable", "block_size": group},
            "versions": {}, "calibration": {}, "kept": kept,
            "fold": None if edges is None else edges.to_json(),
        },
    )  # fmt: skip
    writer.write_global(stream)
    for number, members in sorted(blocks.items()):
        matrices, records = [], {}
        for name, tensor, e, turned in members:
            weight = model.read(tensor).float().numpy()
            weight = weight if e is None else weight[e]
            weight = np.ascontiguousarray(weight.T) if turned else weight
            order = random_order(edges, name, weight.shape[1], stream, rng)
            t, alpha, mu = ternarise(weight, order, group)
            matrices.append(TernaryMatrix(name, pack_ternary(t), alpha, mu, order))
            records[name] = {"rows": t.shape[0], "cols": t.shape[1], "block_size": group}
            if tensor != f"{name}.weight":
                records[name]["tensor"] = tensor
            if turned:
                records[name]["transposed"] = True
        writer.write_block(number, matrices, records)
    writer.finish()
    write_json(folder / RUN, {"model_dir": str(model_dir)})
    return folder


def dequantized_folder(target: Path, model_dir: Path, artifact_dir: Path) -> Path:
    """A copy of a model with ``alpha T + mu`` for its ternary matrices, in the source's order."""
    target.mkdir()
    for file in model_dir.iterdir():
        if file.name != SINGLE:
            (target / file.name).symlink_to(file)
    tensors = load_file(model_dir / SINGLE)
    artifact = Artifact.open(artifact_dir)
    for block in range(artifact.n_blocks):
        for name, matrix in artifact.block(block).items():
            tensor, e = artifact.tensor_of(name)
            value = torch.from_numpy(matrix.dequantize())
            value = value.T if artifact.transposed(name) else value
            (tensors[tensor] if e is None else tensors[tensor][e]).copy_(value)
    save_file(tensors, target / SINGLE, metadata={"format": "pt"})
    return target
