"""Does a mixture of experts lose as little as the dense model that it was made of?

    python -m benchmarks.moe_from_dense MODEL --calibration calib.txt --text wiki.valid.txt -o OUT

Every MLP of a small Llama is copied into eight experts, each perturbed, behind a random router
whose outputs are shares of two of them. One expert's row of the router is 0, so that few tokens
reach it. The model is written once as Mixtral and once as Qwen3-MoE, whose files hold a linear
for each expert. All three are quantised alike; the table compares the ratios of their
perplexities to full precision.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantize
from quantize.config import load_recipe
from quantize.evaluate import perplexity, windows

EXPERTS, CHOSEN = 8, 2
KEPT = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")


def write_mixture(source: Path, folder: Path, kind: str, noise: float) -> Path:
    """Write the mixture of a dense Llama.

    Args:
        kind: ``mixtral`` or ``qwen3_moe``.
        noise: of the experts' weights, as a share of each matrix's root mean square.
    """
    g = torch.Generator().manual_seed(0)
    config = json.loads((source / "config.json").read_text())
    dense = load_file(source / "model.safetensors")
    tensors: dict[str, Tensor] = {}
    for name, value in dense.items():
        layer, _, part = name.partition(".mlp.")
        if not part:
            tensors[name] = value
            continue
        for e in range(EXPERTS):
            rms = value.float().square().mean().sqrt()
            other = value.float() + noise * rms * torch.randn(value.shape, generator=g)
            tensors[_expert(layer, part, e, kind)] = other.to(value.dtype)
    hidden, head = config["hidden_size"], config["head_dim"]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        router = torch.randn(EXPERTS, hidden, generator=g) * 0.1
        router[0] = 0.0
        gate = "block_sparse_moe.gate" if kind == "mixtral" else "mlp.gate"
        tensors[f"{layer}.{gate}.weight"] = router.bfloat16()
        if kind == "qwen3_moe":  # whose norms of single heads nothing in a Llama stands for
            for norm in ("q_norm", "k_norm"):
                tensors[f"{layer}.self_attn.{norm}.weight"] = torch.ones(head).bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(config, kind), indent=1))
    for name in KEPT:
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)
    return folder


def _expert(layer: str, part: str, expert: int, kind: str) -> str:
    if kind == "mixtral":
        names = {"gate_proj.weight": "w1", "down_proj.weight": "w2", "up_proj.weight": "w3"}
        return f"{layer}.block_sparse_moe.experts.{expert}.{names[part]}.weight"
    return f"{layer}.mlp.experts.{expert}.{part}"


def _config(config: dict[str, object], kind: str) -> dict[str, object]:
    """The dense model's settings as one of a mixture."""
    common = {"model_type": kind, "num_experts_per_tok": CHOSEN}
    drop = ("architectures", "mlp_bias", "pretraining_tp", "dtype")
    kept = {k: v for k, v in config.items() if k not in drop}
    if kind == "mixtral":
        more = {"architectures": ["MixtralForCausalLM"], "num_local_experts": EXPERTS,
                "sliding_window": None}  # fmt: skip
    else:
        more = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": EXPERTS,
                "moe_intermediate_size": config["intermediate_size"], "norm_topk_prob": True,
                "decoder_sparse_step": 1, "mlp_only_layers": []}  # fmt: skip
    return {**kept, **common, **more}


def measured(model: Path, out: Path, args: argparse.Namespace) -> tuple[float, float, str]:
    """(perplexity in full precision, of the ternary model, what was said of experts)."""
    config = load_recipe(
        args.recipe, calibration=args.calibration, samples=args.samples, seqlen=512,
        threads=args.threads, proof_tokens=0, device=args.device,
    )  # fmt: skip
    result = quantize.ternarize(model, out, config, overwrite=True)
    rows = windows(args.text, model, 512, "papers", args.windows)
    found = [
        perplexity(model, rows, artifact=a, threads=args.threads, device=args.device).perplexity
        for a in (None, out)
    ]
    return found[0], found[1], "; ".join(result.starved())


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path, help="folder of a small Llama")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--noise", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    models = {"dense": args.model}
    for kind in ("mixtral", "qwen3_moe"):
        models[kind] = write_mixture(args.model, args.out / kind, kind, args.noise)
    print("| model | full precision | ternary | ratio | to dense | experts |")
    print("|---|---|---|---|---|---|")
    dense = 0.0
    for name, model in models.items():
        full, ternary, said = measured(model, args.out / f"{name}-pt2", args)
        ratio = ternary / full
        dense = dense or ratio
        print(
            f"| {name} | {full:.2f} | {ternary:.2f} | {ratio:.3f} | {ratio / dense - 1:+.1%} | "
            f"{said} |", flush=True,
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
