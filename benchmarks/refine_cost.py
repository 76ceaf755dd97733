"""What refining a model of a given shape costs: a few measured steps with random weights.

    python benchmarks/refine_cost.py --shape 7b --device cuda
    python benchmarks/refine_cost.py --shape 7b --codes frozen --batch-size 8 --seqlen 2048

Neither speed nor memory depends on the weights' values, so they are random here, and so are the
token ids: this measures no quality. Prints tokens/s, the seconds of a step, the peak memory, and
the tokens that an hour would hold at this rate.
"""

from __future__ import annotations

import quantize.model.waiting  # noqa: F401  before torch is loaded

# isort: split

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pt2_core.cli import ArgumentParser, run_cli
from pt2_core.files import human_bytes
from pt2_core.progress import Reporter
from quantize.config import DEVICES, DTYPES
from quantize.model.student import build_teacher, ternary_maker
from quantize.model.torch_setup import arithmetic, pick_device
from quantize.refinement.config import CODES, RefineConfig
from quantize.refinement.training import Run

# LLaMA's shapes: width, blocks, heads, feed-forward width, vocabulary; "tiny" is for tests.
SHAPES = {
    "tiny": (256, 2, 4, 768, 512),
    "1b": (2048, 22, 32, 5632, 32000),
    "7b": (4096, 32, 32, 11008, 32000),
    "13b": (5120, 40, 40, 13824, 32000),
}
BLOCK = 128


def llama_config(shape: str) -> Any:
    """transformers' configuration of a LLaMA shape."""
    from transformers import LlamaConfig

    width, blocks, heads, inner, vocab = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads,
        intermediate_size=inner, vocab_size=vocab, max_position_embeddings=4096,
        tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return config


def random_matrices(config: Any, device: str, moving: bool) -> Iterator[tuple[str, Any]]:
    """(module name, maker) of every linear, with random codes and a random order."""
    width, inner = config.hidden_size, config.intermediate_size
    shapes = {f"self_attn.{n}_proj": (width, width) for n in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)}
    shapes["mlp.down_proj"] = (width, inner)
    for index in range(config.num_hidden_layers):
        for name, (rows, cols) in shapes.items():
            t = torch.randint(-1, 2, (rows, cols), dtype=torch.int8, device=device)
            alpha = torch.full((rows, cols // BLOCK), 0.02, device=device)
            perm = torch.randperm(cols, device=device)
            maker = ternary_maker(t, alpha, torch.zeros_like(alpha), perm, moving=moving)
            yield f"model.layers.{index}.{name}", maker


def measure(shape: str, config: RefineConfig, steps: int) -> dict[str, Any]:
    """Time ``steps`` optimiser steps after two to warm up."""
    device = pick_device(config.device)
    model = llama_config(shape)

    def read(name: str, size: tuple[int, ...]) -> Tensor:
        if len(size) == 1:
            return torch.ones(size)
        return torch.randn(size, device=device, dtype=torch.bfloat16) * 0.02

    with arithmetic(config.threads), torch.enable_grad():
        torch.manual_seed(0)
        count = (config.held_out + (steps + 3) * config.batch_size + 2) * config.seqlen
        run = Run(config, device, torch.randint(0, model.vocab_size, (count,)), Reporter())
        dtype = getattr(torch, config.dtype)
        run.teacher = build_teacher(model, read, device, dtype, tied=False)
        run.attach(model, random_matrices(model, device, config.codes != "frozen"))
        for _ in range(2):
            float(run.one_step())
        times = []
        for _ in range(steps):
            began = time.monotonic()
            float(run.one_step())  # waits for the device
            times.append(time.monotonic() - began)
    tokens = config.batch_size * config.seqlen
    median = sorted(times)[len(times) // 2]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {
        "shape": shape, "weights": "random", "codes": config.codes, "tokens_per_step": tokens,
        "seqlen": config.seqlen, "micro_batch": config.micro_batch,
        "checkpointing": config.checkpointing, "seconds_per_step": median, "seconds": times,
        "tokens_per_second": tokens / median, "peak_bytes": peak,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }  # fmt: skip


def run_main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="refine_cost.py", description=__doc__)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="7b")
    parser.add_argument("--codes", choices=CODES, default="ste")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    args = parser.parse_args(argv)
    config = RefineConfig(
        codes=args.codes, batch_size=args.batch_size, micro_batch=args.micro_batch,
        seqlen=args.seqlen, held_out=1, device=args.device, dtype=args.dtype,
    )  # fmt: skip
    result = measure(args.shape, config, args.steps)
    print(json.dumps(result))
    print(
        f"{args.shape} (random weights), T {args.codes}: {result['tokens_per_second']:.0f} "
        f"tokens/s, {result['seconds_per_step']:.2f} s a step of {result['tokens_per_step']} "
        f"tokens, peak {human_bytes(result['peak_bytes'])}; an hour holds "
        f"{result['tokens_per_second'] * 3600 / 1e6:.1f} M tokens"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_cli("refine_cost", run_main))
