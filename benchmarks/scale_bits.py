"""What would coarser alpha and mu cost? Perplexity of an artifact with its grid rounded further.

    python benchmarks/scale_bits.py MODEL --artifact best --text tokens.safetensors:valid --ctx 512

Every alpha and mu is rounded to the formats of :data:`FORMATS`. The scale pair
(docs/scale-pairs.md) stands by itself; the others have one fp16 scale for each row of a matrix and
otherwise so many bits for each block. T stays, so this is an upper bound: a
quantiser that knew of the rounding would choose T behind it. OUT (-o) gets the figures as JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pt2_core import scale_pairs
from pt2_core.artifact.folder import Array
from pt2_core.cli import ArgumentParser, run_cli
from pt2_core.files import write_json
from quantize.evaluate import GridChange, perplexity, windows


def linear(values: Array, bits: int, signed: bool) -> Array:
    """Rounded to equal steps of each row's largest magnitude; float32, same shape."""
    levels = 2 ** (bits - signed) - 1
    top = np.abs(values.astype(np.float32)).max(axis=1, keepdims=True)
    step = (top / levels).astype(np.float16).astype(np.float32)
    step[step == 0] = 1.0
    return np.clip(np.rint(values.astype(np.float32) / step), -levels, levels) * step


def e4m3(values: Array) -> Array:
    """Rounded to fp8 (4 bits of exponent, 3 of mantissa), scaled by each row's largest."""
    top = torch.from_numpy(values.astype(np.float32)).abs().amax(1, keepdim=True)
    scale = (top / 448).half().float().clamp(min=1e-7)
    scaled = torch.from_numpy(values.astype(np.float32)) / scale
    return (scaled.clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).numpy()


def uniform(bits: int) -> GridChange:
    """Alpha unsigned, mu signed."""
    return lambda alpha, mu: (linear(alpha, bits, False), linear(mu, bits, True))


# name -> bits of alpha and mu for each block, and what to make of them
FORMATS: dict[str, tuple[int, GridChange | None]] = {
    "fp16": (32, None),
    "scale pair": (16, scale_pairs.rounded),
    "8 bits, equal steps": (16, uniform(8)),
    "fp8 e4m3": (16, lambda alpha, mu: (e4m3(alpha), e4m3(mu))),
    "6 bits, equal steps": (12, uniform(6)),
    "4 bits, equal steps": (8, uniform(4)),
}


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="scale_bits.py", description=__doc__)
    parser.add_argument("model", help="folder of the Hugging Face model")
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--text", required=True, help="file, or file.safetensors:tensor")
    parser.add_argument("--ctx", type=int, default=512, help="tokens in a window (512)")
    parser.add_argument("--windows", type=int, help="the first so many (all)")
    parser.add_argument("--block-size", type=int, default=128, help="of the artifact (128)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args(argv)
    tokens = windows(args.text, args.model, args.ctx, "papers", args.windows)
    rows: list[dict[str, Any]] = []
    print("| alpha and mu | bits a weight | perplexity | ratio to fp16 |\n|---|---|---|---|")
    for name, (bits, grid) in FORMATS.items():
        score = perplexity(args.model, tokens, artifact=args.artifact, grid=grid,
                           device=args.device, threads=args.threads)  # fmt: skip
        rows.append(
            {"format": name, "bits": bits / args.block_size, "perplexity": score.perplexity}
        )
        relative = score.perplexity / rows[0]["perplexity"]
        share = bits / args.block_size
        print(f"| {name} | {share:.4f} | {score.perplexity:.3f} | {relative:.4f} |", flush=True)
        if args.out:
            write_json(args.out, {"artifact": args.artifact.name, "windows": len(tokens),
                                  "ctx": args.ctx, "rows": rows})  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(run_cli("scale_bits", main))
