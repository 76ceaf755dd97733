"""Perplexity in torch, of a model as it is or with an artifact's ``alpha*T + mu`` in its place.

    python -m quantize.evaluate MODEL --text wiki.valid.txt
    python -m quantize.evaluate MODEL --artifact MODEL-pt2 --text wiki.test.txt --protocol llama.cpp
    python -m quantize.evaluate MODEL --artifact MODEL-pt2 --text tokens.safetensors:valid

Two protocols. ``papers``: the text, with BOS in front where the model's tokenizer adds one, is cut
into windows of ``--ctx`` tokens and every token of a window but its first is scored (with 2048, as
GPTQ and PT2-LLM do). ``llama.cpp``: as its llama-perplexity does it, only the second half of each
window is scored, and where the tokenizer adds BOS, it takes the first place of every window. Token
ids are scored as they are. Decoder blocks are streamed: memory holds one, and the windows'
activations.
"""

from __future__ import annotations

from pt2_core.process.stop import until_run_cli

if __name__ == "__main__":
    until_run_cli("quantize.evaluate")

import quantize.model.waiting  # noqa: F401  before torch is loaded

# isort: split

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pt2_core.artifact.folder import Array, Artifact
from pt2_core.artifact.source import check_made_from
from pt2_core.cli import ArgumentParser, check_threads, run_cli
from pt2_core.errors import PT2Error
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.progress import Reporter, open_reporter
from pt2_core.texts.sources import read_text, token_source
from pt2_core.texts.tokens import (
    PROTOCOLS,
    bos_token,
    check_context,
    context_limit,
    encode,
    llama_windows,
    load_tokenizer,
    paper_windows,
    read_tokens,
    refuse_degenerate_tokens,
)
from quantize.config import DEVICES, DTYPES
from quantize.model.streamed import Stream, StreamedModel
from quantize.model.torch_setup import arithmetic, pick_device

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
        stream = model.start(tokens, batch_size)
        reporter.start("perplexity", len(stream.batches) * model.n_blocks)
        for index in range(model.n_blocks):
            layer = model.block(index).module(_dequantized(weights, index, grid))
            text = f"block {index + 1}/{model.n_blocks}"
            stream.advance(layer, index, partial(reporter.step, text))
        reporter.done()
        return _score(model, stream, tokens, second_half)


def _score(model: StreamedModel, stream: Stream, tokens: Tensor, second_half: bool) -> Score:
    # Position p predicts token p + 1; llama.cpp starts at p = ctx / 2.
    first = tokens.shape[1] // 2 if second_half else 0
    losses = []
    found = model.logits(stream, first, -1)
    for logits, ids in zip(found, tokens.to(model.device), strict=True):
        losses.append(nn.functional.cross_entropy(logits, ids[first + 1 :], reduction="none"))
    nll = torch.cat(losses).double()
    mean = float(nll.mean())
    if not math.isfinite(mean):
        raise PT2Error("the model's logits are NaN or Inf: use --dtype float32")
    return Score(math.exp(mean), float(nll.std()) / math.sqrt(nll.numel()), nll.numel())


def windows(
    source: str, model_dir: str | Path, ctx: int, protocol: str, limit: int | None = None, *,
    text_field: str | None = None, allow_long: bool = False, reporter: Reporter | None = None,
) -> Tensor:  # fmt: skip
    """Cut a text, or token ids of a safetensors file, into windows, int64 ``[n, ctx]``.

    Args:
        source: as :mod:`pt2_core.texts.sources` has them, or ``file.safetensors[:tensor]`` whose
        rows are
            used as they are.
        protocol: ``papers`` or ``llama.cpp``.
        limit: the first so many windows only.
        text_field: of JSON records, the field with the text (None: the usual one).
        allow_long: take windows that are longer than the model's context.
        reporter: told what was done to the text.

    Raises:
        PT2Error: no such text, windows longer than the context, or a degenerate text.
    """
    reporter = reporter or Reporter()
    folder = Path(model_dir)
    stated = context_limit(Checkpoint.open(folder).raw_config)
    check_context(ctx, stated, folder.name, "--ctx", allow=allow_long, warn=reporter.warn)
    file = token_source(source)
    if file is not None:
        if text_field is not None:
            raise PT2Error(f"--text-field {text_field}: {source} holds token ids")
        rows = read_tokens(*file)
        if rows.dim() == 1:
            rows = rows[: rows.shape[0] // ctx * ctx].reshape(-1, ctx)
        found = rows[:limit, :ctx].contiguous()
    else:
        text = read_text(source, "test", text_field=text_field)
        for note in text.notes:
            reporter.note(note)
        tokenizer = load_tokenizer(folder)
        ids, bos = encode(tokenizer, text.text), bos_token(tokenizer)
        if protocol == "llama.cpp":
            found = llama_windows(ids, bos, ctx, limit, text.name)
        else:
            found = paper_windows(ids, bos, ctx, limit or text.windows, text.name)
    refuse_degenerate_tokens(found, source)
    return found


def _artifact_for(checkpoint: Checkpoint, path: Path) -> Artifact:
    artifact = Artifact.open(path)
    check_made_from(artifact, checkpoint, "--artifact")
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
    parser.add_argument("--text", required=True, help="text file, JSON lines, folder, data set "
                        "(its test set), or FILE.safetensors:TENSOR")  # fmt: skip
    parser.add_argument("--text-field", metavar="NAME", help="of JSON records")
    parser.add_argument("--allow-long", action="store_true", help="windows beyond the context")
    parser.add_argument("--ctx", type=int, default=512, help="tokens in a window (512)")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="papers")
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
        with open_reporter() as reporter:
            tokens = windows(
                args.text, args.model, args.ctx, args.protocol, args.chunks, reporter=reporter,
                text_field=args.text_field, allow_long=args.allow_long,
            )  # fmt: skip
            score = perplexity(
                args.model, tokens,
                artifact=args.artifact, second_half=args.protocol == "llama.cpp",
                device=args.device, dtype=args.dtype, threads=args.threads,
                batch_size=args.batch_size, reporter=reporter,
            )  # fmt: skip
        print(
            f"perplexity {score.perplexity:.4f} +- {score.perplexity * score.log_error:.4f} "
            f"({score.tokens} tokens, {args.protocol} protocol, windows of {args.ctx})"
        )
        return 0

    return run_cli("quantize.evaluate", body, lower="--batch-size or --ctx")


if __name__ == "__main__":
    sys.exit(main())
