"""Perplexity in torch, of a model as it is or with an artifact's ``alpha*T + mu`` in its place.

    python -m quantize.evaluate MODEL --text wiki.valid.txt
    python -m quantize.evaluate MODEL --artifact MODEL-pt2 --text wiki.test.txt --protocol llama.cpp
    python -m quantize.evaluate MODEL --artifact MODEL-pt2 --text tokens.safetensors:valid

Two protocols. ``windows``: the text is cut into windows of ``--ctx`` tokens and every token of a
window but its first is scored (with 2048, the GPTQ papers' protocol). ``llama.cpp``: as its
llama-perplexity does it, only the second half of each window is scored, and where the model's
tokenizer adds a BOS token, the first token of every window is replaced by it. Decoder blocks are
streamed: memory holds one, and the windows' activations.
"""

from __future__ import annotations

from quantize.stop import until_run_cli

if __name__ == "__main__":
    until_run_cli("quantize.evaluate")

import quantize.waiting  # noqa: F401  before torch is loaded

# isort: split

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from quantize.artifact import Array, Artifact
from quantize.calibration import encode, load_tokenizer, read_text, read_tokens
from quantize.checkpoint import Checkpoint
from quantize.common import ArgumentParser, PT2Error, check_threads, run_cli
from quantize.config import DEVICES, DTYPES
from quantize.hf_model import StreamedModel
from quantize.machine import arithmetic, pick_device
from quantize.progress import Reporter, RichReporter

PROTOCOLS = ("windows", "llama.cpp")
GridChange = Callable[[Array, Array], tuple[Array, Array]]


@dataclass(frozen=True)
class Score:
    """Perplexity, the standard error of its logarithm, and how many tokens were scored."""

    perplexity: float
    log_error: float
    tokens: int


def perplexity(
    model_dir: str | Path,
    tokens: Tensor,
    *,
    artifact: str | Path | None = None,
    grid: GridChange | None = None,
    second_half: bool = False,
    device: str = "auto",
    dtype: str = "float32",
    threads: int = 0,
    batch_size: int = 4,
    reporter: Reporter | None = None,
) -> Score:
    """Perplexity over windows of token ids.

    Args:
        tokens: int64 ``[windows, ctx]``.
        artifact: take the weights of its linears instead of the model's.
        grid: what to make of its alpha and mu first, each ``[rows, blocks]``.
        second_half: score only the tokens that llama.cpp's perplexity tool scores.

    Raises:
        PT2Error: the model or the artifact cannot be used, or they do not belong together.
    """
    reporter = reporter or Reporter()
    checkpoint = Checkpoint.open(model_dir)
    weights = None if artifact is None else _artifact_for(checkpoint, Path(artifact))
    with arithmetic(threads):
        model = StreamedModel(checkpoint, pick_device(device), dtype)
        hidden = model.embed(tokens)
        batches = -(-tokens.shape[0] // batch_size)
        reporter.start("perplexity", batches * model.n_blocks)
        for index in range(model.n_blocks):
            layer = model.load_block(index, _dequantized(weights, index, grid))
            for batch in hidden.split(batch_size):
                batch.copy_(model.forward_block(layer, batch, index))
                reporter.step(f"block {index + 1}/{model.n_blocks}")
        reporter.done()
        return _score(model, hidden, tokens, second_half)


def _score(model: StreamedModel, hidden: Tensor, tokens: Tensor, second_half: bool) -> Score:
    head = model.head()
    # Position p predicts token p + 1; llama.cpp starts at p = ctx / 2.
    first = tokens.shape[1] // 2 if second_half else 0
    losses = []
    for states, ids in zip(hidden, tokens.to(hidden.device), strict=True):
        logits = head(states[first:-1])
        losses.append(nn.functional.cross_entropy(logits, ids[first + 1 :], reduction="none"))
    nll = torch.cat(losses).double()
    mean = float(nll.mean())
    if not math.isfinite(mean):
        raise PT2Error("the model's logits are NaN or Inf: use --dtype float32")
    return Score(math.exp(mean), float(nll.std()) / math.sqrt(nll.numel()), nll.numel())


def windows(
    source: str, model_dir: str | Path, ctx: int, protocol: str, limit: int | None = None
) -> Tensor:
    """Cut a text, or token ids of a safetensors file, into windows, int64 ``[n, ctx]``.

    Args:
        source: a text file, or ``file.safetensors:tensor`` whose rows are used as they are.
        protocol: ``windows`` or ``llama.cpp``.
        limit: the first so many windows only.
    """
    stem, mark, tensor = source.partition(".safetensors")
    if mark:
        ids = read_tokens(Path(stem + mark), tensor.removeprefix(":"))
    else:
        tokenizer = load_tokenizer(Path(model_dir))
        text, _ = read_text(source, 1 << 62)
        bos = tokenizer.bos_token_id
        adds_bos = protocol == "llama.cpp" and bos is not None and tokenizer.encode("a")[0] == bos
        plain = encode(tokenizer, text.removesuffix("\n"))
        ids = llama_windows(plain, bos if adds_bos else None, ctx, name=source)
    if ids.dim() == 1:
        ids = ids[: ids.shape[0] // ctx * ctx].reshape(-1, ctx)
    return ids[:limit, :ctx].contiguous()


def llama_windows(
    ids: list[int], bos: int | None, ctx: int, limit: int | None = None, name: str = "the text"
) -> Tensor:
    """Cut a text's tokens as llama-perplexity does, int64 ``[n, ctx]``.

    Args:
        bos: where the tokenizer adds one: put before the text, and in the first place of every
            window.
        limit: the first so many windows only.
    """
    ids = ([] if bos is None else [bos]) + ids
    count = len(ids) // ctx
    if count == 0:
        raise PT2Error(f"{name} has {len(ids)} tokens, fewer than one window of {ctx}")
    found = torch.tensor(ids[: count * ctx]).view(count, ctx)[:limit].clone()
    if bos is not None:
        found[:, 0] = bos
    return found


def _artifact_for(checkpoint: Checkpoint, path: Path) -> Artifact:
    artifact = Artifact.open(path)
    digest, _ = checkpoint.fingerprint()
    if artifact.manifest["model"].get("fingerprint") != digest:
        raise PT2Error(f"{path} was not made from the model in {checkpoint.path}")
    checkpoint.replaced = {k: torch.from_numpy(v) for k, v in artifact.replaced().items()}
    return artifact


def _dequantized(
    artifact: Artifact | None, index: int, grid: GridChange | None
) -> Mapping[str, Tensor] | None:
    if artifact is None:
        return None
    matrices = artifact.block(index)
    if grid is not None:
        changed = {n: grid(m.alpha, m.mu) for n, m in matrices.items()}
        matrices = {
            n: replace(m, alpha=changed[n][0], mu=changed[n][1]) for n, m in matrices.items()
        }
    return {n: torch.from_numpy(m.dequantize()) for n, m in matrices.items()}


def main(argv: list[str] | None = None) -> int:
    """The command ``python -m quantize.evaluate``."""
    parser = ArgumentParser(
        prog="python -m quantize.evaluate", description=__doc__.split("\n\n")[0],
        epilog="examples:\n" + "\n\n".join(__doc__.split("\n\n")[1:]),
    )  # fmt: skip
    parser.add_argument("model", help="folder of the Hugging Face model")
    parser.add_argument("--artifact", help="an artifact made from it (default: the model as it is)")
    parser.add_argument("--text", required=True, help="text file, or FILE.safetensors:TENSOR")
    parser.add_argument("--ctx", type=int, default=512, help="tokens in a window (512)")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="windows")
    parser.add_argument("--chunks", type=int, help="the first so many windows only")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args(argv)

    def body() -> int:
        few = args.chunks is not None and args.chunks < 1
        check_threads(args.threads)
        if args.ctx < 2 or args.batch_size < 1 or few:
            raise PT2Error("--ctx must be at least 2, --batch-size and --chunks at least 1")
        score = perplexity(
            args.model,
            windows(args.text, args.model, args.ctx, args.protocol, args.chunks),
            artifact=args.artifact, second_half=args.protocol == "llama.cpp",
            device=args.device, dtype=args.dtype, threads=args.threads,
            batch_size=args.batch_size, reporter=RichReporter(),
        )  # fmt: skip
        print(
            f"perplexity {score.perplexity:.4f} +- {score.perplexity * score.log_error:.4f} "
            f"({score.tokens} tokens, {args.protocol} protocol, windows of {args.ctx})"
        )
        return 0

    return run_cli("quantize.evaluate", body, lower="--batch-size or --ctx")


if __name__ == "__main__":
    sys.exit(main())
